"""What happens beside the steps: metrics written, progress told, held-out tasks played, an asked-for end
obeyed."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from gymexp.config.schema import EvaluationConfig, RunConfig
from gymexp.data.prepare import Prepared
from gymexp.files import append_line, read_lines, replace_file
from gymexp.processes.direct import open_url
from gymexp.processes.keys import RUN, header_of
from gymexp.record.metric_names import as_held_out, by_env
from gymexp.rollout.collect import Progress
from gymexp.rollout.play import Distribution
from gymexp.training.metrics import rollout_metrics
from gymexp.training.ranks import on_main_rank
from gymexp.training.rollouts import Rollouts

if TYPE_CHECKING:
    from gymexp.record.study import Judge
    from gymexp.training.trainer import PolicyTrainer

_UNTOLD_ENTRIES = 1000


class MetricsFile(TrainerCallback):
    """`metrics.jsonl`: one object a log entry, with `step` and the wall clock. Main process only."""

    def __init__(self, path: Path, from_step: int) -> None:
        self._path = path
        if path.exists():  # a resumed run takes back what it said after the checkpoint it goes on from
            kept = [entry for entry in read_lines(path) if entry["step"] <= from_step]
            replace_file(path, "".join(f"{json.dumps(entry)}\n" for entry in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            numbers = {k: _plain(v) for k, v in logs.items() if v is None or isinstance(v, int | float)}
            append_line(self._path, {"step": state.global_step, "time": round(time.time(), 3)} | numbers)


class Teller:
    """Tells the controller what is going on: of facts the newest, of log entries each one. A controller that
    does not answer is not waited for."""

    def __init__(self, control_url: str | None) -> None:
        self._url = control_url
        self._latest: dict[str, Any] = {}
        self._entries: deque[dict[str, Any]] = deque(maxlen=_UNTOLD_ENTRIES)
        self._numbers = itertools.count(1)
        self._news = threading.Event()
        if control_url:
            threading.Thread(target=self._send, name="teller", daemon=True).start()

    def tell(self, **facts: Any) -> None:
        self._latest |= facts
        self._news.set()

    def log(self, step: int, logs: Mapping[str, Any]) -> None:
        self._entries.append({"number": next(self._numbers), "step": step, "logs": dict(logs)})
        self._news.set()

    def close(self, timeout_s: float = 5.0) -> None:
        """Wait until all log entries are told."""
        until = time.monotonic() + timeout_s
        while self._url and self._entries and time.monotonic() < until:
            time.sleep(0.02)

    def progress(self, progress: Progress) -> None:
        seconds = time.monotonic() - progress.began
        self.tell(
            total=progress.total,
            done=progress.done,
            in_flight=progress.in_flight,
            failed=progress.failed,
            retried=progress.retried,
            tokens_per_s=round(progress.tokens / seconds, 1) if seconds > 0 else 0.0,
        )

    def _send(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            entries = list(self._entries)
            body = json.dumps(self._latest | {"entries": entries}).encode()
            try:
                request = urllib.request.Request(f"{self._url}/progress", body, header_of(RUN))
                open_url(request, timeout_s=5).close()
                while entries and self._entries and self._entries[0]["number"] <= entries[-1]["number"]:
                    self._entries.popleft()
            except OSError:
                time.sleep(1.0)
                self._news.set()
            time.sleep(0.2)


class Steps(TrainerCallback):
    """Tells where training is."""

    def __init__(self, teller: Teller) -> None:
        self._teller = teller

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._teller.tell(phase="train", step=state.global_step, max_steps=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        shown = {k: _plain(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        self._teller.tell(step=state.global_step, max_steps=state.max_steps)
        if shown:
            self._teller.log(state.global_step, shown)


class Evaluation(TrainerCallback):
    """Plays the held-out tasks with the policy as it is; `eval_<env>/reward` and so on."""

    def __init__(
        self,
        config: RunConfig,
        prepared: Prepared,
        rollouts: Rollouts,
        teller: Teller,
        judge: Judge | None = None,
    ) -> None:
        """judge: the study's, of a run that is a trial; on the first rank alone."""
        self._config = config
        self._judge = judge
        limit = config.evaluation.num_tasks
        self._keys = [task.key for tasks in prepared.validation.values() for task in tasks[:limit]]
        self._rollouts = rollouts
        self._teller = teller
        self.trainer: PolicyTrainer  # set when there is one: it is built with its callbacks
        self.newest: dict[str, float] = {}  # what was measured last
        self.pruned: str | None = None  # why the study has no more use for this trial

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self._config.evaluation.every_steps
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            asked_to_log = control.should_log
            metrics = self.run(state.global_step)
            control.should_log = asked_to_log  # its own log entry has taken this back, and the step's is due
            if self._judge:
                self.pruned = self._judge.report(state.global_step, by_env(metrics, held_out=True))

    def run(self, step: int) -> dict[str, float]:
        """The metrics, on every rank; the first one plays."""
        trainer = self.trainer
        trainer.sync_weights()

        def play() -> dict[str, float]:
            self._teller.tell(phase="evaluate", step=step)
            began = time.monotonic()
            distribution = held_out_distribution(self._config.evaluation, trainer.grpo.temperature)
            outcomes = self._rollouts.play(self._keys, step, distribution, held_out=True)
            metrics = as_held_out(rollout_metrics(outcomes, self._config.env))
            self._rollouts.write(f"eval-{step:06d}", outcomes)
            return metrics | {"eval_seconds": time.monotonic() - began}

        metrics = on_main_rank(trainer.accelerator, play)
        trainer.log_evaluation(dict(metrics), metrics["eval_seconds"])
        self.newest = metrics
        return metrics


def held_out_distribution(evaluation: EvaluationConfig, temperature: float) -> Distribution:
    """What an evaluation samples from. temperature: of training, where the evaluation names none."""
    return Distribution(
        temperature=temperature if evaluation.temperature is None else evaluation.temperature,
        top_p=evaluation.top_p,
        top_k=evaluation.top_k,
        min_p=evaluation.min_p,
        repetition_penalty=evaluation.repetition_penalty,
    )


class EndWhenAsked(TrainerCallback):
    """Ends training after the step in progress once `asked` says so on any rank: all end after the same
    step."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked
        self.trainer: PolicyTrainer  # as in Evaluation

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        accelerator = self.trainer.accelerator
        asked = torch.tensor(float(self._asked()), device=accelerator.device)
        if accelerator.num_processes > 1:
            asked = accelerator.reduce(asked, reduction="sum")
        if asked.item() > 0:  # pyright: ignore[reportAttributeAccessIssue]
            self.trainer.stopped = control.should_training_stop = True


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
