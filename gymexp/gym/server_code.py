"""The module of a NeMo Gym server, imported as NeMo Gym does it: with the server's own folder on the path.

A part of host.py, in NeMo Gym's venv; it imports nothing of gymexp.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any


class Code:
    """A server's module, imported with its own folder on the path. If that fails, `error` says why."""

    def __init__(self, name: str) -> None:
        before, self.path, self.error = set(sys.modules), [], None
        try:
            spec = importlib.util.find_spec(name)
            self.path = [os.path.dirname(spec.origin)] if spec and spec.origin else []
            sys.path[:0] = self.path
            self.cls = server_class(importlib.import_module(name))
        except (Exception, SystemExit) as error:
            self.error = error
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
        """Returns the server's class, in the server's own process, where the modules of its folder can be
        imported from then on. Raises the error of the import."""
        if self.error:
            raise self.error
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
