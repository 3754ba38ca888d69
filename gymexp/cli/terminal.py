"""What every command does around its work: UTF-8, signals, errors as text, exit codes."""

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
from gymexp.cli import hydra_keys
from gymexp.config.explain import explain_key
from gymexp.config.names import nearest
from gymexp.config.options import options
from gymexp.config.schema import RunConfig
from gymexp.errors import GymexpError, Interrupted
from gymexp.printable import log_to_stderr, say_error
from gymexp.training import fields

T = TypeVar("T")


def guarded(main: Callable[..., Any], schema: type) -> Callable[..., Any]:
    """Print a GymexpError as its text, without a traceback, and exit with 1."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            _speak_utf8()
            _look_around()
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.default_int_handler)  # in place of gymexp/__init__.py's
            return main(*args, **kwargs)
        except GymexpError as error:
            end_with(error)
        except (HydraException, OmegaConfBaseException) as error:
            say_error(explain(error, schema))
            sys.exit(1)
        except KeyboardInterrupt:  # before a run's controller takes signals over, or in what is no run
            end_with(Interrupted(signal.SIGINT, "ended by SIGINT before it began"))
        except BrokenPipeError:  # `| head` has seen enough; what is still buffered is for nobody
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            if files.refusal(error) is None:
                raise
            end_with(GymexpError(files.in_words(error)))

    return wrapped


def _speak_utf8() -> None:
    """Read and write UTF-8 whatever the locale says, here, in libraries and in every process of a run, which
    takes a start of Python in that mode; and print what the output's own encoding lacks as its number."""
    is_utf8 = sys.flags.utf8_mode or os.environ.get("PYTHONUTF8") == "1"
    if not is_utf8 and locale.getencoding().lower() not in ("utf-8", "utf8"):
        environ = os.environ | {"PYTHONUTF8": "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # one that a caller has put there
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]


def _look_around() -> None:
    """Raises GymexpError where nothing that is made would be of use."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise GymexpError("the working directory was deleted: change to one that is there") from None
    umask = os.umask(0o077)
    os.umask(umask)
    if umask & 0o700:
        raise GymexpError(
            f"umask must leave a file's owner all rights, but {umask:04o} takes some: the run could not use "
            "the files that it makes. Say `umask 022` or `umask 077`"
        )


def end_with(error: GymexpError) -> NoReturn:
    """Print the error's text and exit: 128 plus its number after a signal, else 1."""
    say_error(error)
    if not isinstance(error, Interrupted):
        sys.exit(1)
    # Python's shutdown gives signals their default effect back, and one more would change the exit code.
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + error.number)


class _Lasting:
    """A standard stream that goes on, into nothing, once whoever read it is gone: a run does not end for
    that."""

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
                return instead  # what is buffered is written once there is room
            if error.errno != errno.EIO:  # a terminal that was closed
                raise
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())  # for what is buffered, and for processes that inherit it
        os.close(nothing)
        return instead


def outlive_readers() -> None:
    """From now on nobody has to read standard output and standard error to their end."""
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)


def parser_of(command: str, about: str) -> argparse.ArgumentParser:
    """Of a command that Hydra does not configure. about: its module's docstring, with examples."""
    return argparse.ArgumentParser(
        prog=f"python -m gymexp.{command}",
        description=inspect.cleandoc(about),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def log_to_terminal() -> None:
    """From now on log lines go to standard error, as their text alone."""
    log_to_stderr("%(message)s")
    logging.getLogger("filelock").setLevel(logging.WARNING)


def explain(error: HydraException | OmegaConfBaseException, schema: type) -> str:
    """Hydra's own complaint, with the nearest option or key of the schema where one is unknown."""
    text = str(error)
    if found := re.search(r"[Cc]ould not (?:find|load) '([\w/]+)/([^'/]+)'", text):
        group, name = found.groups()
        if group.startswith("hydra/"):
            return hydra_keys.explain_option(group, name)
        known = options(group)
        return f"{group}={name} is not known{nearest(name, known, f'{group}=')}. Known: {', '.join(known)}"
    cause = error.__cause__ or error.__context__
    if found := re.search(r"[Cc]ould not override '([\w.@/]+)'", text):
        key = found.group(1)
        if key.startswith("hydra"):
            return hydra_keys.explain_key(key)
        trainers = [f"trainer.{name}" for name in sorted(fields.CARRIED)] if schema is RunConfig else []
        return explain_key(key, schema, getattr(cause, "full_key", None), trainers) or text
    if found := re.search(r"does not support sweep type : (\w+)_SWEEP", text):
        return hydra_keys.explain_sweep(found.group(1).lower())
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {text.splitlines()[0]}" if error.full_key else text.splitlines()[0]
    return f"{text}: {str(cause).splitlines()[0]}" if cause else text
