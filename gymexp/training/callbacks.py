"""The trainer's callbacks: they write metrics, report progress to the controller, play held-out tasks, and
end training when a stop is requested."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from gymexp.config.schema import EvaluationConfig, RunConfig
from gymexp.data.prepare import Prepared
from gymexp.files import append_line, read_lines, replace_file
from gymexp.processes.access_keys import RUN, header_of
from gymexp.processes.http_client import open_url
from gymexp.record.metric_names import as_held_out, by_env
from gymexp.rollout.outcome import Outcome
from gymexp.rollout.play import Distribution
from gymexp.rollout.progress import Progress
from gymexp.training.metrics import rollout_metrics
from gymexp.training.ranks import on_main_rank
from gymexp.training.rollout_func import Rollouts

if TYPE_CHECKING:
    from gymexp.record.optuna_study import Judge
    from gymexp.training.trainer import PolicyTrainer

_MAX_UNSENT_ENTRIES = 5_000
_ENTRIES_A_MESSAGE = 100  # a message that is too large would be refused again and again
_TASKS_IN_A_FRAME = 8  # of a file of held-out rollouts, each of another task


class MetricsFile(TrainerCallback):
    """Writes `metrics.jsonl`: one object a log entry, with `step` and the wall-clock `time` in seconds. Only
    the main process has this callback."""

    def __init__(self, path: Path, from_step: int) -> None:
        """from_step: the step of the checkpoint that the run resumes from, 0 without a checkpoint."""
        self._path = path
        if path.exists():
            # A resumed run repeats the steps after its checkpoint, so their entries are dropped.
            kept = [entry for entry in read_lines(path) if entry["step"] <= from_step]
            replace_file(path, "".join(f"{json.dumps(entry)}\n" for entry in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            numbers = {k: _plain(v) for k, v in logs.items() if v is None or isinstance(v, int | float)}
            append_line(self._path, {"step": state.global_step, "time": round(time.time(), 3)} | numbers)


class ProgressReporter:
    """Sends the run's progress to the controller from a thread of its own: the newest value of each fact, and
    every entry, which is a log entry, a span or a remark. Training never waits for a controller that is
    silent."""

    def __init__(self, control_url: str | None) -> None:
        """control_url: None on the other ranks, which report nothing."""
        self._url = control_url
        self._latest: dict[str, Any] = {}
        self._entries: deque[dict[str, Any]] = deque(maxlen=_MAX_UNSENT_ENTRIES)
        self._numbers = itertools.count(1)
        self._has_news = threading.Event()
        if control_url:
            threading.Thread(target=self._send, name="progress", daemon=True).start()

    def report(self, **facts: Any) -> None:
        """Reports facts (`phase`, `step`, …), each of which replaces the earlier value of its name."""
        self._latest |= facts
        self._has_news.set()

    def report_log(self, step: int, logs: Mapping[str, Any]) -> None:
        """Reports one log entry of a step."""
        self._add({"step": step, "logs": dict(logs)})

    def report_span(self, span: Mapping[str, Any]) -> None:
        """Reports one span of a step (`gymexp.training.spans`)."""
        self._add({"span": dict(span)})

    def report_remark(self, text: str) -> None:
        """Reports a line for the user."""
        self._add({"remark": text})

    def _add(self, entry: dict[str, Any]) -> None:
        self._entries.append({"number": next(self._numbers)} | entry)
        self._has_news.set()

    def close(self, timeout_s: float = 5.0) -> None:
        """Waits until the controller has all entries, or for `timeout_s`."""
        until = time.monotonic() + timeout_s
        while self._url and self._entries and time.monotonic() < until:
            time.sleep(0.02)

    def report_collection(self, progress: Progress) -> None:
        """Reports how far a collection of rollouts is."""
        seconds = time.monotonic() - progress.began
        self.report(
            total=progress.total,
            done=progress.done,
            in_flight=progress.in_flight,
            failed=progress.failed,
            retried=progress.retried,
            tokens_per_s=round(progress.tokens / seconds, 1) if seconds > 0 else 0.0,
        )

    def _send(self) -> None:
        while True:
            self._has_news.wait()
            self._has_news.clear()
            entries = list(itertools.islice(self._entries, _ENTRIES_A_MESSAGE))
            body = json.dumps(self._latest | {"entries": entries}).encode()
            try:
                request = urllib.request.Request(f"{self._url}/progress", body, header_of(RUN))
                open_url(request, timeout_s=5).close()
                while entries and self._entries and self._entries[0]["number"] <= entries[-1]["number"]:
                    self._entries.popleft()
            except OSError:
                time.sleep(1.0)
                self._has_news.set()
            if self._entries:
                self._has_news.set()
            time.sleep(0.2)


class Steps(TrainerCallback):
    """Reports each step of training and its log entries."""

    def __init__(self, reporter: ProgressReporter) -> None:
        self._reporter = reporter

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._reporter.report(phase="train", step=state.global_step, max_steps=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        numbers = {k: _plain(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        self._reporter.report(step=state.global_step, max_steps=state.max_steps)
        if numbers:
            self._reporter.report_log(state.global_step, numbers)


class Evaluation(TrainerCallback):
    """Plays the held-out tasks with the current policy; its metrics are `eval_<env>/reward` and so on."""

    def __init__(
        self,
        config: RunConfig,
        prepared: Prepared,
        rollouts: Rollouts,
        reporter: ProgressReporter,
        judge: Judge | None = None,
    ) -> None:
        """judge: decides whether the study prunes this run; given on the first rank of a trial only."""
        self._config = config
        self._judge = judge
        limit = config.evaluation.num_tasks
        self._keys = [task.key for tasks in prepared.validation.values() for task in tasks[:limit]]
        self._rollouts = rollouts
        self._reporter = reporter
        self.trainer: PolicyTrainer  # Must be set before training starts.
        self.newest: dict[str, float] = {}  # metrics of the last evaluation
        self.pruned: str | None = None  # the reason why the study prunes this trial

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self._config.evaluation.every_steps
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            should_log = control.should_log
            metrics = self.run(state.global_step)
            # The evaluation's log entry reset the flag, but the step's own entry is still due.
            control.should_log = should_log
            if self._judge:
                self.pruned = self._judge.report(state.global_step, by_env(metrics, held_out=True))

    def run(self, step: int) -> dict[str, float]:
        """Plays the held-out tasks on the first rank, logs the metrics, and returns them on every rank."""
        trainer = self.trainer

        def play() -> dict[str, float]:
            self._reporter.report(phase="evaluate", step=step)
            began = time.monotonic()
            distribution = held_out_distribution(self._config.evaluation, trainer.grpo.temperature)

            def keep(outcomes: Sequence[Outcome]) -> None:
                self._rollouts.write(f"eval-{step:06d}", outcomes, group_size=_TASKS_IN_A_FRAME)

            outcomes = self._rollouts.play(self._keys, step, distribution, held_out=True, keep=keep)
            metrics = as_held_out(rollout_metrics(outcomes, self._config.env))
            return metrics | {"eval_seconds": time.monotonic() - began}

        with trainer.spans.phase("evaluation", step):
            trainer.sync_weights()
            with trainer.batch_tasks.holding():
                metrics = on_main_rank(trainer.accelerator, play)
        trainer.log_evaluation(dict(metrics), metrics["eval_seconds"])
        self.newest = metrics
        return metrics


def held_out_distribution(evaluation: EvaluationConfig, temperature: float) -> Distribution:
    """Returns the sampling distribution of an evaluation. temperature: training's temperature, which is used
    if `evaluation.temperature` is not set."""
    return Distribution(
        temperature=temperature if evaluation.temperature is None else evaluation.temperature,
        top_p=evaluation.top_p,
        top_k=evaluation.top_k,
        min_p=evaluation.min_p,
        repetition_penalty=evaluation.repetition_penalty,
    )


class StopOnRequest(TrainerCallback):
    """Ends training after the step in progress if `stop_requested` returns True on any rank. All ranks end
    after the same step."""

    def __init__(self, stop_requested: Callable[[], bool]) -> None:
        self._stop_requested = stop_requested
        self.trainer: PolicyTrainer  # Must be set before training starts.

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        accelerator = self.trainer.accelerator
        requests = torch.tensor(float(self._stop_requested()), device=accelerator.device)
        if accelerator.num_processes > 1:
            requests = accelerator.reduce(requests, reduction="sum")
        if requests.item() > 0:  # pyright: ignore[reportAttributeAccessIssue]
            self.trainer.stopped = control.should_training_stop = True


def _plain(value: Any) -> Any:
    """Returns None for NaN and infinities, which JSON does not have, and any other value unchanged."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
