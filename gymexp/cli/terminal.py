"""The frame of every command: UTF-8, signals, errors as text, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import inspect
import locale
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from gymexp import files
from gymexp.cli import catalogue_source, hydra_keys
from gymexp.config.explain import explain_key
from gymexp.config.group_options import options
from gymexp.config.schema import RunConfig
from gymexp.config.suggestions import nearest
from gymexp.errors import GymexpError, Interrupted
from gymexp.printable import log_to_stderr, say_error
from gymexp.training import argument_rules

T = TypeVar("T")


def guarded(main: Callable[..., Any], schema: type) -> Callable[..., Any]:
    """Wraps a command so that an error of the user's is printed as text, without a traceback.

    The exit code is 1, or 128 + the signal's number for Interrupted. schema: the configuration's dataclass,
    whose keys the text of Hydra's errors suggests.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            _ensure_utf8()
            _check_surroundings()
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.default_int_handler)  # replaces gymexp/__init__.py's
            return main(*args, **kwargs)
        except GymexpError as error:
            end_with(error)
        except (HydraException, OmegaConfBaseException) as error:
            say_error(explain(error, schema))
            sys.exit(1)
        except KeyboardInterrupt:  # before a run's controller handles signals, or in another command
            end_with(Interrupted(signal.SIGINT, "ended by SIGINT before it began"))
        except BrokenPipeError:  # `| head` closed the pipe: discard what is still buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            if files.refusal(error) is None:
                raise
            end_with(GymexpError(files.in_words(error)))

    return wrapped


def _ensure_utf8() -> None:
    """Makes this process, its libraries and every process of a run read and write UTF-8, whatever the locale.

    Python must be started in UTF-8 mode for that, so the process may replace itself. Characters that the
    encoding of standard output or error lacks are printed as escapes.
    """
    is_utf8 = sys.flags.utf8_mode or os.environ.get("PYTHONUTF8") == "1"
    if not is_utf8 and locale.getencoding().lower() not in ("utf-8", "utf8"):
        environ = os.environ | {"PYTHONUTF8": "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream that a caller has replaced
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]


def _check_surroundings() -> None:
    """Raises GymexpError if the working directory is deleted, or if the umask makes new files unusable."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise GymexpError("the working directory was deleted: change to one that exists") from None
    umask = os.umask(0o077)
    os.umask(umask)
    if umask & 0o700:
        raise GymexpError(
            f"umask must leave a file's owner all rights, but {umask:04o} takes some: the run could not use "
            "the files that it makes. Say `umask 022` or `umask 077`"
        )


def end_with(error: GymexpError) -> NoReturn:
    """Prints the error's text and exits: with 128 + the signal's number for Interrupted, else with 1."""
    say_error(error)
    if not isinstance(error, Interrupted):
        sys.exit(1)
    # Python's shutdown restores the default handlers, and one more signal would then change the exit code.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # If a KeyboardInterrupt leaves an `exec` of text, as every dataclass has one, `python -m` ends itself by
    # SIGINT in place of this code, unless another `exec` follows.
    exec("")
    sys.exit(128 + error.number)


class _Lasting:
    """A standard stream that discards its text once its reader is gone, so that the run goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text), len(text))

    def flush(self) -> None:
        self._try(self._stream.flush, None)

    def _try(self, write: Callable[[], T], instead: T) -> T:
        try:
            return write()
        except (BrokenPipeError, ConnectionResetError):
            pass
        except OSError as error:
            if error.errno in files.FULL:
                return instead  # the stream writes its buffer once the disk has room
            if error.errno != errno.EIO:  # EIO: the terminal was closed
                raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())  # also takes buffered text, and output of child processes
        os.close(null)
        return instead


def outlive_readers() -> None:
    """Replaces standard output and standard error by streams that survive the end of their reader."""
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)


def parser_of(command: str, about: str) -> argparse.ArgumentParser:
    """Returns the argument parser of a command that Hydra does not configure.

    about: the docstring of the command's module, with examples.
    """
    return argparse.ArgumentParser(
        prog=f"python -m gymexp.{command}",
        description=inspect.cleandoc(about),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


_TYPES = {"Integer": "int", "Float": "float", "bool": "bool"}  # OmegaConf's names and Python's


def log_to_terminal() -> None:
    """Sends log lines to standard error, without level or time."""
    log_to_stderr("%(message)s")
    logging.getLogger("filelock").setLevel(logging.WARNING)


def explain(error: HydraException | OmegaConfBaseException, schema: type) -> str:
    """Returns the text of Hydra's error, with the nearest option or key of the schema if one is unknown."""
    text = str(error)
    if match := re.search(r"[Cc]ould not (?:find|load) '([\w/]+)/([^'/]+)'", text):
        group, name = match.groups()
        if group.startswith("hydra/"):
            return hydra_keys.explain_option(group, name)
        if group == "env":
            return catalogue_source.explain_unknown(name)
        known = options(group)
        return f"{group}={name} is not known{nearest(name, known, f'{group}=')}. Known: {', '.join(known)}"
    cause = error.__cause__ or error.__context__
    if match := re.search(r"[Cc]ould not override '([\w.@/]+)'", text):
        key = match.group(1)
        if key.startswith("hydra"):
            return hydra_keys.explain_key(key)
        trainers = (
            [f"trainer.{name}" for name in sorted(argument_rules.CARRIED)] if schema is RunConfig else []
        )
        return explain_key(key, schema, getattr(cause, "full_key", None), trainers) or text
    wrong_type = re.search(r"(?:could not be converted to|is not a valid) (Integer|Float|bool)\b", str(cause))
    if wrong_type and (match := re.search(r"merging override \+*([^=]+)=(.*)", text)):
        return f"{match[1]} must be of type {_TYPES[wrong_type[1]]}, got {match[2]!r}"
    if match := re.search(r"does not support sweep type : (\w+)_SWEEP", text):
        return hydra_keys.explain_sweep(match.group(1).lower())
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {text.splitlines()[0]}" if error.full_key else text.splitlines()[0]
    return f"{text}: {str(cause).splitlines()[0]}" if cause else text
