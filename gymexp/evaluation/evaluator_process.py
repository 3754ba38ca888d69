"""The evaluator's process: `python -m gymexp.evaluation.evaluator_process DIR NUMBERS`, started by the
controller. NUMBERS: which of the plan's policies to play, e.g. 0,1,2.

It plays the tasks of the evaluation in DIR with each policy, keeps the outcomes as they land, and writes
result.json. With the hf engine, the engine is in this process. On SIGTERM it keeps what has landed, and ends.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from gymexp.config.load import from_yaml
from gymexp.config.schema import RunConfig
from gymexp.errors import ConfigError
from gymexp.evaluation.kept import KeptOutcomes, Place
from gymexp.evaluation.plan import Plan, Policy, tasks_of
from gymexp.processes.access_keys import RUN, header_of
from gymexp.processes.http_client import fetch_json
from gymexp.record.directory import RunDirectory
from gymexp.record.services_file import Services
from gymexp.rollout.outcome import Failed, Outcome
from gymexp.training import controlled_process

log = logging.getLogger(__name__)
_GATEWAY_TIMEOUT_S = 900.0  # of the check of an endpoint, which has a deadline of its own
_ROLLOUTS_IN_A_FRAME = 8  # at least, of the final files


def main() -> None:
    stop_requested = controlled_process.begin()
    directory, numbers = RunDirectory(Path(sys.argv[1])), [int(n) for n in sys.argv[2].split(",")]
    try:
        config = from_yaml(directory.config)
        directory.write_result(Evaluator(directory, config, stop_requested).run(numbers))
    except Exception as error:
        if not (message := controlled_process.message_of(error)):
            raise
        log.error("%s", message)
        directory.write_error(message)
        sys.exit(1)
    controlled_process.end()


class Evaluator:
    """Plays the plan of an evaluation."""

    def __init__(self, directory: RunDirectory, config: RunConfig, stop_requested: threading.Event) -> None:
        self._directory = directory
        self._config = config
        self._stop_requested = stop_requested
        self._plan = Plan.read(directory.path)
        self._services = Services.read(directory.path)

    def run(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Plays the policies with these numbers. Returns result.json, in the form of a run's."""
        from gymexp.data.prepare import load_prepared
        from gymexp.rollout.collect import Stopped
        from gymexp.training.callbacks import ProgressReporter

        controlled_process.send_heartbeats(self._services.control_url, "evaluator")
        policies = [self._plan.policies[number] for number in numbers]
        self._tasks = {task.key: task for task in tasks_of(load_prepared(self._directory.data))}
        self._places: list[Place] = [(key, n) for key in self._tasks for n in range(self._plan.samples)]
        with ExitStack() as stack:
            self._reporter = ProgressReporter(self._services.control_url)
            stack.callback(self._reporter.close)
            sampling_of = self._prepare(policies[0], stack)
            scored = 0
            try:
                for policy in policies:
                    scored += self._play(policy, sampling_of(policy))
            except Stopped:
                return {"step": policies[0].step, "stopped": True, "held_out": {}}
        return {"step": policies[-1].step, "stopped": False, "held_out": {}}

    def _prepare(self, first: Policy, stack: ExitStack) -> Callable[[Policy], AbstractContextManager[None]]:
        """Gets the policies ready, and opens the collector. Returns what lets a policy sample in a block."""
        vocab_size = None
        if first.is_text:
            problem = self._ask_gateway("/check")["problem"] if first.kind == "endpoint" else ""
            if problem:
                raise ConfigError(problem)
            sampling_of = self._choose_reply
        elif self._services.engine_fd is not None:
            from gymexp.evaluation.hf_policies import HFPolicies

            self._reporter.report(phase="load model")
            hf_policies = HFPolicies(self._config, self._services.engine_fd, stack)
            vocab_size, sampling_of = hf_policies.vocab_size, hf_policies.sampling
        else:
            from gymexp.engine.replicas import Replicas

            self._reporter.report(phase="load engine")
            replicas = Replicas(self._services.engine_urls)
            replicas.wait_healthy(self._config.engine.start_timeout_s, self._stop_requested)
            vocab_size, sampling_of = read_vocab_size(Path(first.directory or "")), lambda _: nullcontext()
        self._collector = controlled_process.open_collector(
            self._config, self._services, vocab_size, self._reporter, self._stop_requested, stack
        )
        return sampling_of

    def _play(self, policy: Policy, sampling: AbstractContextManager[None]) -> int:
        """Plays what is missing of a policy's rollouts, and writes its files. Returns how many it has scored.

        A rollout gets the seed that a run's held-out evaluation gives it, so the two play the same.
        """
        from gymexp.rollout.failed_share import check_failed_share
        from gymexp.rollout.play import Sampling
        from gymexp.rollout.rollout_files import RolloutWriter
        from gymexp.training.callbacks import held_out_distribution
        from gymexp.training.rollout_func import seed_of

        config = self._config
        assert config.evaluation.temperature is not None
        distribution = held_out_distribution(config.evaluation, config.evaluation.temperature)
        kept = KeptOutcomes(self._directory.path, policy.file, self._tasks)
        missing = kept.missing(self._places)
        if len(missing) < len(self._places):
            log.info("%s: %d rollouts are scored already", policy.label, len(self._places) - len(missing))
        samplings = [
            Sampling(
                **dataclasses.asdict(distribution),
                max_output_tokens=config.env[self._tasks[key].env].max_output_tokens,
                seed=seed_of(config.seed, None, key, sample),
            )
            for key, sample in missing
        ]

        now_landed: list[Outcome] = []

        def keep(landed: Sequence[tuple[int, Outcome]]) -> None:
            kept.add([(missing[index], outcome) for index, outcome in landed])
            now_landed.extend(outcome for _, outcome in landed)

        def check() -> None:
            # Where the policy is gone, each rollout that is left would wait for it in vain.
            check_failed_share(list(now_landed), config.rollout.max_failed_share, len(self._places))

        self._reporter.report(phase="evaluate", step=policy.step)
        tasks = [self._tasks[key] for key, _ in missing]
        began = time.time()
        with sampling:
            self._collector.collect(tasks, samplings, check, keep)
        self._note(policy, began)
        outcomes = [kept.by_place[place] for place in self._places]
        check_failed_share(outcomes, config.rollout.max_failed_share)
        group_size = self._plan.samples if self._plan.samples > 1 else _ROLLOUTS_IN_A_FRAME
        writer = RolloutWriter(self._directory.rollouts, config.env, last_step=sys.maxsize)
        writer.write(policy.file, outcomes, group_size)
        kept.remove()
        return sum(not isinstance(outcome, Failed) for outcome in outcomes)

    def _note(self, policy: Policy, began: float) -> None:
        span = {"time": round(began, 3), "seconds": round(time.time() - began, 3)}
        self._directory.note(span | {"span": "evaluation", "step": policy.step, "policy": policy.label})

    def _choose_reply(self, policy: Policy) -> AbstractContextManager[None]:
        if policy.reply is not None:
            self._ask_gateway("/probe", {"reply": policy.reply})
        return nullcontext()

    def _ask_gateway(self, path: str, body: dict[str, Any] | None = None) -> Any:
        self._reporter.report(phase="load engine")
        [gateway_url] = self._services.gateway_urls  # a policy that gives text alone has one
        url = f"{gateway_url}{path}"
        return fetch_json(url, json.dumps(body or {}).encode(), _GATEWAY_TIMEOUT_S, header_of(RUN))


def read_vocab_size(directory: Path) -> int:
    """Returns the number of a model's token ids, from its config.json."""
    config = json.loads((directory / "config.json").read_text())
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])


if __name__ == "__main__":
    main()
