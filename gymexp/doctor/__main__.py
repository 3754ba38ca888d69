"""Check this machine before a night is lost on it; exits with 1 when something fails.

python -m gymexp.doctor                                                the machine in general
python -m gymexp.doctor engine=vllm model=qwen3_4b tracker=wandb       what that run needs
python -m gymexp.doctor --init                                         write conf/machine/default.yaml
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter

from gymexp.cli.terminal import parser_of
from gymexp.doctor import disks, gpus, machine, machine_file, nemo_gym, network, slurm
from gymexp.doctor.configuration import composed
from gymexp.doctor.finding import Check, Finding, run_checks
from gymexp.errors import GymexpError
from gymexp.printable import say, say_error

CHECKS = (
    Check("python", machine.python, 15),
    Check("memory", machine.memory_and_cores, 15),
    Check("open files", machine.open_files, 15),
    Check("ports", machine.ports, 15),
    Check("hostname", machine.hostname, 15),
    Check("disk", disks.look, 30),
    Check("gpu", gpus.look, 100),
    Check("vllm", gpus.vllm_version, 70),
    Check("nemo gym", nemo_gym.look, 30),
    Check("hub", network.hub, 45),
    Check("tracker", network.tracker, 30),
    Check("slurm", slurm.look, 60),
)


def main() -> None:
    parser = parser_of("doctor", __doc__ or "")
    parser.add_argument("--init", action="store_true", help="write this machine's conf/machine/default.yaml")
    parser.add_argument("--force", action="store_true", help="with --init: replace the one that is there")
    parser.add_argument("overrides", nargs="*", help="a run's, as gymexp.train takes them")
    given = parser.parse_args()
    if (given.force and not given.init) or (given.init and given.overrides):
        parser.error("--init takes no overrides, and --force is for --init alone")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        failed = _init(given.force) if given.init else _check(given.overrides)
    except GymexpError as error:
        say_error(error)
        failed = True
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(failed))  # a check that hangs has a thread, and may have children that hang


def _init(force: bool) -> bool:
    print(f"{machine_file.write(force)}\nwritten to {machine_file.PATH}")
    if said := machine_file.remark():
        say(said)
    return False


def _check(overrides: list[str]) -> bool:
    subject, found = composed(overrides)
    found += run_checks(CHECKS, subject)
    for one in found:
        say(_line(one))
    count = Counter(one.level for one in found)
    print(f"\n{count['ok']} ok, {count['warn']} to look at, {count['fail']} failed")
    return count["fail"] > 0


def _line(one: Finding) -> str:
    text = f"{one.level:<5} {one.what:<16} {one.found}".replace("\n", "\n" + 23 * " ")
    return text + (f"\n{21 * ' '}→ {one.fix}" if one.fix else "")


if __name__ == "__main__":
    main()
