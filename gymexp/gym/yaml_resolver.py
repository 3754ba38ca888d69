"""Resolves YAML files of servers as NeMo Gym does. A script for NeMo Gym's venv; imports nothing of gymexp.

NeMo Gym's own parser merges the files of `config_paths`, at any depth, and carries out `_inherit_from`,
`_copy` and `_delete_key`. References to other keys (`${…}`) get their values; those to keys that no file has,
and those to variables of the environment, stay as they are.

Line protocol, JSON. In: one path of a file per line. Out, for each: {"servers": {name: definition}}, or
{"error": text} if NeMo Gym refuses the file.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

PROTOCOL = os.dup(1)  # NeMo Gym prints while it is imported: stdout becomes stderr
os.dup2(2, 1)


def resolve(path: str) -> dict[str, Any]:
    """Returns the top-level keys of a file that define servers."""
    from nemo_gym.global_config import GlobalConfigDictParser  # pyright: ignore[reportMissingImports]
    from omegaconf import OmegaConf

    parser = GlobalConfigDictParser()
    _, configs = parser.load_extra_config_paths([path])
    merged = OmegaConf.merge(*configs)
    parser._recursively_swap_keys(merged)
    servers = plain(merged)
    return {str(name): value for name, value in servers.items() if isinstance(value, dict)}


def plain(node: Any) -> Any:
    """Returns a node of OmegaConf's as plain values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if OmegaConf.is_dict(node):
        return {key: plain(node._get_node(key)) for key in node}
    if OmegaConf.is_list(node):
        return [plain(node._get_node(index)) for index in range(len(node))]
    raw = node._value()
    if not isinstance(raw, str) or "${" not in raw or "${oc." in raw:
        return raw
    try:
        value = node._dereference_node()
    except OmegaConfBaseException:
        return raw
    return plain(value)


def main() -> None:
    with os.fdopen(PROTOCOL, "w") as out:
        for line in sys.stdin.buffer:
            try:
                result: dict[str, Any] = {"servers": resolve(json.loads(line))}
            except Exception as error:  # whatever NeMo Gym raises is the file's error
                result = {"error": f"{type(error).__name__}: {error}"}
            out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
