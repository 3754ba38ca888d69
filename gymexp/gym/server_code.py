"""The module of a NeMo Gym server, imported as NeMo Gym does it: in the server's own folder, which is on the
path.

A part of host.py, in NeMo Gym's venv; it imports nothing of gymexp.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from typing import Any


class Code:
    """A server's module, imported with its own folder on the path. If that fails, `error` says why."""

    def __init__(self, name: str) -> None:
        before, self.path, self.error, here = set(sys.modules), [], None, os.getcwd()
        try:
            spec = importlib.util.find_spec(name)
            self.path = [os.path.dirname(spec.origin)] if spec and spec.origin else []
            sys.path[:0] = self.path
            for folder in self.path:
                os.chdir(folder)
            self.cls = server_class(importlib.import_module(name))
        except (Exception, SystemExit) as error:
            self.error = error
        os.chdir(here)
        for folder in self.path:
            sys.path.remove(folder)
        # Another server may have modules of the same plain names in its own folder.
        new = {other for other in set(sys.modules) - before if not other.startswith(name.split(".")[0])}
        self.siblings = {other: sys.modules.pop(other) for other in new if self.has(sys.modules[other])}

    def has(self, module: Any) -> bool:
        """Returns whether a module is in the server's folder."""
        files = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", ())]
        return any(file.startswith(f"{folder}/") for file in files for folder in self.path)

    def enter(self) -> Any:
        """Returns the server's class, in the server's own process. From then on that process is in the
        server's folder, and so are the programs that it starts; all can import its modules. Raises the error
        of the import."""
        if self.error:
            raise self.error
        for folder in self.path:
            os.chdir(folder)
            others = os.environ.get("PYTHONPATH")
            os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{others}" if others else folder
        sys.path[:0] = self.path
        sys.modules.update(self.siblings)
        return self.cls


def add_newer(server: Any, app: Any) -> None:
    """Adds to a server's application what NeMo Gym 0.4 does not know: the server's tools over MCP, if its
    configuration says so, and the end of a request whose client has hung up."""
    if getattr(server.config, "expose_tools_over_mcp", False):
        from nemo_gym.mcp_auto_exposure import maybe_auto_expose  # pyright: ignore[reportMissingImports]

        maybe_auto_expose(server, app)
    if hasattr(server, "setup_cancellation_middleware"):
        server.setup_cancellation_middleware(app)


def server_class(module: Any) -> Any:
    """Returns the server's class in a module. Raises ImportError if there is none."""
    from nemo_gym.server_utils import SimpleServer  # pyright: ignore[reportMissingImports]

    types = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    classes = [value for value in types if issubclass(value, SimpleServer)]
    if not classes:
        raise ImportError(f"{module.__name__} defines no NeMo Gym server")
    return classes[-1]


def check_asked(config: Any, asked: list[list[str]]) -> None:
    """Raises ValueError for a key that the user sets and that a server's configuration does not have. NeMo
    Gym's models ignore such keys. config: the validated configuration. asked: the server's key in the
    user's configuration, and then the path of the key below it."""
    for at, *path in asked:
        node = config
        for number, part in enumerate(path):
            known = list(node) if isinstance(node, dict) else list(getattr(type(node), "model_fields", ()))
            if not known and not isinstance(node, dict):
                break  # a value of the server's own type, which it has read in its own way
            if part not in known and not hasattr(node, part):
                close = difflib.get_close_matches(part, known, n=1, cutoff=0.5)
                near = f"; did you mean {close[0]}?" if close else ""
                key = ".".join([at, *path[: number + 1]])
                raise ValueError(
                    f"{key} is no key of this server{near}. Its keys: {', '.join(map(str, known))}"
                )
            node = node[part] if isinstance(node, dict) else getattr(node, part)
