"""gymexp: RL post-training experiments in NeMo Gym environments, from one command."""

import os
import signal
import sys

__version__ = "0.1.0"


def _interrupted(number: int, _: object) -> None:
    """Nothing is there yet that would have to be saved or ended."""
    os.write(2, b"error: ended by SIGINT before it began\n")
    os._exit(128 + number)


# A command imports for a second; then `cli.terminal` takes over. Not where SIGINT is ignored.
_is_command = sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0] if sys.argv else "") == "gymexp"
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)
