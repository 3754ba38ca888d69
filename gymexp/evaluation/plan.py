"""What an evaluation plays: its policies, tasks and samples, and the fingerprint that a resumed one must
have.

evaluation.json in the evaluation's directory keeps the plan, tasks.json the hash of each task's row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from gymexp.config.schema import RunConfig
from gymexp.data.prepare import Prepared
from gymexp.errors import RunDirectoryError
from gymexp.files import read_json, replace_file
from gymexp.record.directory import PLAN
from gymexp.rollout.outcome import Task

TASKS = "tasks.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SMALL = ("*.json", "*.jinja", "*.model", "additional_chat_templates/*")
_OF_TRAINING = {"complete.json", "trainer_state.json"}  # beside the weights in a checkpoint


@dataclass(frozen=True)
class Policy:
    """One row of the table. kind: model, endpoint or probe.

    label: its name in tables. file: the name of its file of rollouts. step: the optimizer steps behind its
    weights. directory: of its weights, for kind=model. digest: of its weights; of an endpoint its address and
    the model's name. reply: of a probe.
    """

    kind: str
    label: str
    file: str
    step: int = 0
    directory: str | None = None
    digest: str = ""
    reply: str | None = None

    @property
    def is_text(self) -> bool:
        """Whether its answers are text without token ids."""
        return self.kind != "model"


@dataclass(frozen=True)
class EndpointPlan:
    """Where an endpoint is: the fields of `endpoint.*`."""

    url: str
    model: str
    key_env: str | None
    timeout_s: float


@dataclass(frozen=True)
class Plan:
    """An evaluation: every policy plays every task `samples` times. fingerprint: what decides the results, by
    name."""

    policies: list[Policy]
    samples: int
    split: str
    endpoint: EndpointPlan | None = None
    fingerprint: dict[str, str] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        replace_file(directory / PLAN, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Plan:
        """Reads evaluation.json. Raises RunDirectoryError if the directory has none, or a damaged one."""
        try:
            fields = read_json(directory / PLAN)
            policies = [Policy(**one) for one in fields.pop("policies")]
            endpoint = fields.pop("endpoint")
            return cls(policies, endpoint=endpoint and EndpointPlan(**endpoint), **fields)
        except (KeyError, TypeError):
            raise RunDirectoryError(
                f"{directory} must be the directory of an evaluation, but has no {PLAN} of one"
            ) from None


def row_hash(task: Task) -> str:
    """Returns a hash of a task's row, which two evaluations of the same task have in common."""
    return _sha256(orjson.dumps(task.row, option=orjson.OPT_SORT_KEYS))


def tasks_of(prepared: Prepared) -> list[Task]:
    """Returns the tasks that an evaluation's `data/` has, in the order in which they are played."""
    return [*prepared.train, *(task for tasks in prepared.validation.values() for task in tasks)]


def task_hashes(tasks: Iterable[Task]) -> dict[str, str]:
    """Returns the content of tasks.json: the hash of each task's row, by key."""
    return {task.key: row_hash(task) for task in tasks}


def fingerprint(config: RunConfig, plan: Plan, tasks: Sequence[Task]) -> dict[str, str]:
    """Returns digests of all that decides the results of an evaluation, by name."""
    evaluation = dataclasses.asdict(config.evaluation)
    envs: dict[str, Any] = {name: dataclasses.asdict(env) for name, env in config.env.items()}
    for env in envs.values():  # how many are played at once, and where, decides no result
        for key in ("replicas", "max_concurrency", "memory_budget_mb", "data", "weight"):
            del env[key]
    return {
        **{f"policy {policy.label}": policy.digest for policy in plan.policies},
        "tasks": _digest(task_hashes(tasks)),
        "samples": str(plan.samples),
        "seed": str(config.seed),
        **{f"evaluation.{key}": json.dumps(value) for key, value in evaluation.items()},
        **{f"env.{name}": _digest(env) for name, env in envs.items()},
        "model.max_model_len": str(config.model.max_model_len),
        "model.dtype": config.model.dtype,
        "model.chat_template_kwargs": _digest(config.model.chat_template_kwargs),
    }


def weights_digest(directory: Path) -> str:
    """Returns a digest of all that decides what a model in Hugging Face's form samples: weights,
    configuration and tokenizer."""
    hasher = hashlib.sha256()
    found = {path for pattern in (*_WEIGHTS, *_SMALL) for path in directory.glob(pattern)}
    for path in sorted(path for path in found if path.is_file() and path.name not in _OF_TRAINING):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        hasher.update(f"{path.relative_to(directory)} {content}\n".encode())
    return hasher.hexdigest()[:32]


def _digest(value: Mapping[str, Any]) -> str:
    return _sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
