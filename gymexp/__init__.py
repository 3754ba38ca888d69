"""gymexp: RL post-training experiments in NeMo Gym environments, from one command."""

import os
import signal
import sys

__version__ = "0.1.0"


def _interrupted(number: int, _: object) -> None:
    """Exit at once on SIGINT: a command that is still importing has nothing to save and no process to end."""
    os.write(2, b"error: ended by SIGINT before it began\n")
    os._exit(128 + number)


# The imports of a command take about a second; then `cli.terminal` installs its own SIGINT handler. Where
# SIGINT is ignored, it stays ignored.
_is_command = sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0] if sys.argv else "") == "gymexp"
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)
