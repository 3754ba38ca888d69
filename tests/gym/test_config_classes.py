"""The code of a server says which keys of its configuration may not be null; it is read, not run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from textwrap import dedent

import pytest

from gymexp.gym import config_classes
from gymexp.gym.config_classes import nulls
from gymexp.gym.install import site_packages

HEAD = """
from __future__ import annotations
from typing import Annotated, Any, ClassVar, Dict, List, Literal, Optional, Union
from pathlib import Path
from pydantic import BaseModel, Field, field_validator, model_validator
from nemo_gym.base_resources_server import BaseResourcesServerConfig, SimpleResourcesServer
class Kind(str, Enum):
    ONE = "one"
class Odd(Enum):
    ONE = "one"
    def _missing_(cls, value): return cls.ONE
"""
SERVER = """
class Room(SimpleResourcesServer):
    config: Config
"""
GYM = {
    "nemo_gym/__init__.py": "",
    "nemo_gym/base_resources_server.py": """
        from nemo_gym.server_utils import BaseRunServerInstanceConfig, SimpleServer
        class BaseResourcesServerConfig(BaseRunServerInstanceConfig):
            pass
        class SimpleResourcesServer(SimpleServer):
            config: BaseResourcesServerConfig
        """,
    "nemo_gym/server_utils.py": """
        from pydantic import BaseModel
        class BaseRunServerInstanceConfig(BaseModel):
            host: str
            port: int
            name: str
            entrypoint: str
            domain: str | None = None
        class SimpleServer(BaseModel):
            pass
        """,
}


def nulls_of(tmp_path: Path, code: str, values: dict | None = None, **others: str) -> list[str]:
    """The keys of a server with this code. others: files beside it, by their stems."""
    files = {f"resources_servers/room/{stem}.py": text for stem, text in others.items()}
    files |= {"resources_servers/room/app.py": HEAD + dedent(code), **GYM}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    values = {"entrypoint": "app.py"} | (values or {})
    return [at for at in nulls(values, "resources_servers.room.app", [tmp_path]) if at != "entrypoint"]


def config(fields: str, base: str = "BaseResourcesServerConfig") -> str:
    body = "\n".join(f"    {line}" for line in dedent(fields).strip().splitlines())
    return f"class Config({base}):\n{body}\n{SERVER}"


@pytest.mark.parametrize(
    "field",
    [
        "key: str",
        "key: 'str'",
        "key: str = Field(description='a key')",
        "key: str = Field(..., description='a key')",
        "key: int | str",
        "key: Union[int, List[str]]",
        "key: dict[str, Any]",
        "key: Literal['a', 'b']",
        "key: Path",
        "key: Kind",
    ],
)
def test_a_field_whose_type_has_no_null_must_be_set(field, tmp_path):
    assert nulls_of(tmp_path, config(field)) == ["key"]


@pytest.mark.parametrize("field", ["key: int = 5", "key: str = Field('')", "key: str = Field(default='x')"])
def test_a_field_with_a_default_may_be_left_out_and_may_not_be_null(field, tmp_path):
    assert nulls_of(tmp_path, config(field)) == []
    assert nulls_of(tmp_path, config(field), {"key": None}) == ["key"]


@pytest.mark.parametrize(
    "field",
    [
        "key: Odd",
        "key: Optional[str]",
        "key: str | None",
        "key: Union[str, None]",
        "key: Literal['a', None]",
        "key: Any",
        "key: Annotated[str, Lenient()]",
        "key: Unknown",
        "key: ClassVar[str]",
        "key: str = Field(alias='other')",
        "key = 'no field'",
        "key: str\n@field_validator('key', mode='before')\ndef read(cls, value): ...",
        "key: str\n@field_validator('*', mode='wrap')\ndef read(cls, value, handler): ...",
        "key: str\n@model_validator(mode='before')\ndef read(cls, values): ...",
    ],
)
def test_a_field_that_may_be_null_or_is_not_understood_is_not_demanded(field, tmp_path):
    assert nulls_of(tmp_path, config(field), {"key": None}) == []


def test_a_validator_of_another_field_or_after_pydantics_check_changes_nothing(tmp_path):
    fields = """
        key: str
        other: int = 1
        @field_validator('key')
        def read(cls, value): ...
        @field_validator('other', mode='before')
        def read_other(cls, value): ...
        @model_validator(mode='after')
        def whole(self): ...
        """
    assert nulls_of(tmp_path, config(fields), {"other": None}) == ["key"]


def test_classes_are_followed_through_bases_and_siblings_and_a_foreign_one_demands_nothing(tmp_path):
    mine = "from parts import Mine, Part\n"
    parts = """
        from pydantic import BaseModel
        from nemo_gym.base_resources_server import BaseResourcesServerConfig
        class Mine(BaseResourcesServerConfig):
            key: str
            loose: str
        class Part(BaseModel):
            url: str
            note: str | None = None
        """
    code = mine + config("loose: str = ''\npart: Part = Part(url='x')", "Mine")
    assert nulls_of(tmp_path, code, parts=parts) == ["key"]
    assert nulls_of(tmp_path / "2", code, {"part": {"note": None}}, parts=parts) == [
        "key",
        "part",
        "part.url",
    ]
    foreign = "from elsewhere import Mine\n" + config("key: str", "Mine")
    assert nulls_of(tmp_path / "3", foreign) == []


def test_the_class_of_an_inherited_server_is_found_and_code_that_cannot_be_read_demands_nothing(tmp_path):
    inherited = (
        config("key: str") + "\nclass Hall(Room):\n    pass\n\nclass NoServer(BaseModel):\n    config: int\n"
    )
    assert nulls_of(tmp_path, inherited) == ["key"]
    assert nulls_of(tmp_path / "2", "def broken(:") == []
    assert list(nulls({}, "resources_servers.nobody.app", [tmp_path])) == []


# Servers of NeMo Gym's, by module, that need no requirements of their own.
MODULES = [
    *(f"resources_servers.{name}.app" for name in ("mcqa", "critpt", "verifif", "over_refusal_detection")),
    *(
        f"resources_servers.{name}.app"
        for name in ("workplace_assistant", "blackjack", "equivalence_llm_judge")
    ),
    *(f"responses_api_agents.{name}.app" for name in ("simple_agent", "gymnasium_agent", "critpt_agent")),
    *(f"responses_api_models.{name}.app" for name in ("vllm_model", "openai_model")),
]
ASK_PYDANTIC = """
import json, sys
from pydantic import ValidationError
from server_code import Code  # the host's own import

def refused(cls, values):
    try:
        cls.model_validate(values)
    except ValidationError as error:
        return sorted({str(line["loc"][0]) for line in error.errors()})
    return []

found = {}
for name in json.load(sys.stdin):
    config = Code(name).cls.model_fields["config"].annotation
    fields = list(config.model_fields)
    found[name] = [fields, refused(config, dict.fromkeys(fields)), refused(config, {})]
print("\\n" + json.dumps(found))
"""


@pytest.mark.gym
def test_what_the_code_says_is_what_pydantic_says_of_nemo_gyms_own_servers(gym_python):
    code = f"import sys; sys.path.append({str(Path(config_classes.__file__).parent)!r})\n{ASK_PYDANTIC}"
    done = subprocess.run(
        [gym_python, "-c", code], input=json.dumps(MODULES), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    site, num_said, num_true = site_packages(gym_python), 0, 0
    for module, (fields, null, missing) in json.loads(done.stdout.splitlines()[-1]).items():
        given = {"host", "port", "name", "max_steps"}
        for values, refused in ((dict.fromkeys(fields), null), ({}, missing)):
            said, true = set(nulls(values, module, [site])), set(refused) - given
            assert said <= true, module
            num_said, num_true = num_said + len(said), num_true + len(true)
    assert num_said > 0.95 * num_true, "what cannot be read for certain is the exception"
