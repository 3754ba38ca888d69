"""Check this machine before a run starts on it; exits with 1 if a check fails.

python -m gymexp.doctor                                                this machine, for the default run
python -m gymexp.doctor engine=vllm model=qwen3_4b tracker=wandb       what this run needs
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
from gymexp.printable import log_to_stderr, say, say_error

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
    parser.add_argument("--force", action="store_true", help="with --init: replace an existing file")
    parser.add_argument("overrides", nargs="*", help="the overrides of a run, as gymexp.train takes them")
    arguments = parser.parse_args()
    if (arguments.force and not arguments.init) or (arguments.init and arguments.overrides):
        parser.error("--init takes no overrides, and --force is for --init alone")
    log_to_stderr("%(message)s", logging.WARNING)
    try:
        failed = _init(arguments.force) if arguments.init else _check(arguments.overrides)
    except GymexpError as error:
        say_error(error)
        failed = True
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(failed))  # the threads or children of a check that hangs must not delay the exit


def _init(force: bool) -> bool:
    """Write the machine file. Returns False, as nothing failed."""
    say(f"{machine_file.write(force)}\nwritten to {machine_file.PATH}")
    if remark := machine_file.remark():
        say(remark)
    return False


def _check(overrides: list[str]) -> bool:
    """Run all checks and print their findings. Returns whether any check failed."""
    subject, findings = composed(overrides)
    findings += run_checks(CHECKS, subject)
    for finding in findings:
        say(_line(finding))
    count = Counter(finding.level for finding in findings)
    say(f"\n{count['ok']} ok, {count['warn']} to look at, {count['fail']} failed")
    return count["fail"] > 0


def _line(finding: Finding) -> str:
    text = f"{finding.level:<5} {finding.name:<16} {finding.text}".replace("\n", "\n" + 23 * " ")
    return text + (f"\n{21 * ' '}→ {finding.fix}" if finding.fix else "")


if __name__ == "__main__":
    main()
