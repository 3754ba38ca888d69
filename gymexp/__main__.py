"""The command `gymexp`: `gymexp train …` does what `python -m gymexp.train …` does."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import gymexp
from gymexp.cli.completion import COMMANDS
from gymexp.config.suggestions import nearest
from gymexp.printable import say, say_error


def main() -> None:
    """Run the command that the first word names, or list the commands."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        say(listing())
    elif command == "--version":
        say(f"gymexp {gymexp.__version__}")
    elif command in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"gymexp.{command}", run_name="__main__", alter_sys=True)
    else:
        say_error(f"{command} is not a command of gymexp{nearest(command, COMMANDS)}\n{listing()}")
        sys.exit(1)


def listing() -> str:
    """Returns the list of commands, each with the first line of its module's docstring."""
    lines = [f"  {command:<10} {_about(command)}" for command in COMMANDS]
    return "\n".join(
        ["gymexp COMMAND …, or python -m gymexp.COMMAND …", *lines, "COMMAND --help explains a command."]
    )


def _about(command: str) -> str:
    """Returns the first line of the command's docstring. It parses the source: an import takes a second."""
    package = Path(gymexp.__file__).parent
    module = package / f"{command}.py"
    path = module if module.exists() else package / command / "__main__.py"
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


if __name__ == "__main__":
    main()
