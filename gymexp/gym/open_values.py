"""Values of a server that NeMo Gym's file leaves to the user, and models that nobody serves.

NeMo Gym's files say so in several ways: `???`, `${key}`, `${oc.env:VARIABLE,MISSING}`, a null where the
server's configuration demands a value. NeMo Gym itself starts the server with it, which then fails at its
start or at each request.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

MODELS = "responses_api_models"
# Keys of a model server that it cannot do without, by its implementation.
_NEEDED = {
    "vllm_model": ("base_url", "api_key", "model"),
    "inference_provider": ("base_url", "api_key", "model"),
    **dict.fromkeys(
        ("openai_model", "azure_openai_model", "litellm_model"),
        ("openai_base_url", "openai_api_key", "openai_model"),
    ),
}
# Implementations that start a vLLM of their own, or lead to one.
_LOCAL = ("local_vllm_model", "local_vllm_model_proxy", "genrm_model")
_NO_VALUE = ("??", "missing", "placeholder", "unset", "http://unset", "your_")  # as a value begins
_MISSING = ("???", "MISSING")  # as a whole value
_NULL = "\0"  # the value of a `${…,null}`, which no text has
_NO_KEY = "dummy"
_OPEN = re.compile(r"\$\{(\w+)\}")
_RESOLVED = re.compile(r"\$\{oc\.(env|select):\s*([^,}]+?)\s*(?:,\s*([^${}]*?)\s*)?\}")  # the innermost


def open_values(
    kind: str,
    implementation: str,
    values: Mapping[str, Any],
    given: set[str],
    environ: Mapping[str, str],
    no_null: Collection[str] = (),
) -> Iterator[tuple[str, str]]:
    """Yields the path and the text of each value of a server that is still to be given.

    given: names in `${…}` and of environment variables that get a value otherwise. environ: the environment
    variables of the servers. no_null: the paths of the keys that may not be null, by the server's class.
    """
    needed = _NEEDED.get(implementation, ()) if kind == MODELS else ()
    for key in needed:
        if not values.get(key):
            yield key, "null"
    yield from ((at, "null") for at in no_null if at not in needed and _at(values, at) is None)
    hosted = kind == MODELS and _is_hosted(values, environ)
    for at, text in _texts(values):
        value = _resolve(text, given, environ)
        names_endpoint = at in needed or (value != text and at.endswith(("url", "key")))
        is_made_up = hosted and value != text and value == _NO_KEY
        if (
            value is None
            or text == "???"
            or (value in _MISSING and (value != text or at in no_null))
            or (value in ("", _NULL) and at in needed)  # another server may do without
            or (value == _NULL and at in no_null)
            or (names_endpoint and value.lower().startswith(_NO_VALUE))
            or is_made_up
        ):
            yield at, text


def _at(values: Any, path: str) -> Any:
    """Returns the value at a path of a configuration, or None."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def is_local(kind: str, implementation: str) -> bool:
    """Returns whether a model server starts a vLLM of its own, which needs Ray and GPUs."""
    return kind == MODELS and implementation in _LOCAL


def instead_of(implementation: str) -> str:
    """Returns the model server that takes the place of one that starts its own vLLM."""
    if implementation == "genrm_model":
        return "a model server of your own, a class of NeMo Gym's GenRMModelMixin and VLLMModel"
    return "a vllm_model with its base_url, api_key and model"


def _texts(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Yields the path and the text of each string of a configuration. An empty text is a value as any."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, at)
    elif isinstance(value, str) and value:
        yield at, value


def _resolve(text: str, given: set[str], environ: Mapping[str, str]) -> str | None:
    """Returns a text with the values of its `${…}`, those of `given` unchanged; None if one has no value;
    _NULL if it is null. gymexp gives NeMo Gym no keys that `oc.select` might find."""
    if any(name not in given for name in _OPEN.findall(text)):
        return None
    lacks = False

    def value(match: re.Match[str]) -> str:
        nonlocal lacks
        how, name, default = match.groups()
        if how == "env" and (name in environ or name in given):
            return environ.get(name, match[0])
        lacks |= default is None
        return _NULL if default == "null" else (default or "").strip("'\"")

    before = ""
    while text != before and not lacks:  # the default of one may be another
        before, text = text, _RESOLVED.sub(value, text)
    if lacks or text == _NULL:
        return None if lacks else text
    return text.replace(_NULL, "")


def _is_hosted(values: Mapping[str, Any], environ: Mapping[str, str]) -> bool:
    """Returns whether a model server's address is one of the internet, where a made-up key opens nothing."""
    urls = (text for at, text in _texts(values) if at.endswith("base_url"))
    return any((_resolve(url, set(), environ) or "").startswith("https://") for url in urls)
