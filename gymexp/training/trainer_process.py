"""The trainer's process: `python -m gymexp.training.trainer_process RUN_DIR`, started by the controller.

The process reads the run directory (config, data, services.json), builds policy, engine and trainer, trains,
and writes result.json. On SIGTERM it saves a checkpoint of the last finished step and ends.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymexp.config.load import from_yaml
from gymexp.config.schema import RunConfig
from gymexp.errors import GymexpError
from gymexp.files import read_json, replace_file
from gymexp.record.directory import RunDirectory
from gymexp.record.services_file import Services
from gymexp.training import controlled_process

if TYPE_CHECKING:
    from gymexp.training.callbacks import Evaluation, ProgressReporter
    from gymexp.training.tracker_feed import TrackerFeed
    from gymexp.training.trainer import PolicyTrainer

log = logging.getLogger(__name__)
_OUT_OF_MEMORY = (
    "the trainer's GPU has too little memory for a micro-batch: halve trainer.per_device_train_batch_size "
    "and double trainer.gradient_accumulation_steps, compute all layers again in the backward pass "
    "('trainer.gradient_checkpointing_kwargs={every_n_layers: 1}'), train an adapter (model.lora.r=16), or "
    "spread the policy over more GPUs (trainer.fsdp=true)"
)


def main() -> None:
    stop_requested = controlled_process.begin()
    run = RunDirectory(Path(sys.argv[1]))
    logging.getLogger("httpx").setLevel(logging.WARNING)
    main_rank = _rank() == 0
    try:
        result = work(run, from_yaml(run.config), stop_requested)
        if main_rank:
            run.write_result(result)
    except Exception as error:
        # The class is torch's, and torch may not be imported yet.
        if type(error).__name__ == "OutOfMemoryError":
            message = f"{_OUT_OF_MEMORY}. torch says: {error}"
        elif not (message := controlled_process.message_of(error)):
            raise
        if not isinstance(error, GymexpError):
            log.exception("the trainer failed")
        log.error("%s", message)
        if main_rank:
            run.write_error(message)
        sys.exit(1)
    controlled_process.end()


def _rank(name: str = "RANK") -> int:
    """Returns this process's rank from the environment variable that torch's launchers set; 0 without one."""
    return int(os.environ.get(name, "0"))


def work(run: RunDirectory, config: RunConfig, stop_requested: threading.Event) -> dict[str, Any]:
    """Trains, and returns the contents of result.json. Only the first rank plays rollouts, reports progress
    and writes the run's records."""
    main_rank = _rank() == 0
    services = Services.read(run.path)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

    import torch

    from gymexp.data.prepare import load_prepared
    from gymexp.policy.model import load_model, load_tokenizer
    from gymexp.record.optuna_study import Judge
    from gymexp.rollout.rollout_files import RolloutWriter
    from gymexp.training import arguments, checkpoints, queued_tasks
    from gymexp.training.callbacks import Evaluation, MetricsFile, ProgressReporter, Steps, StopOnRequest
    from gymexp.training.engine_client import ServerSampling, join_servers, serve_hf
    from gymexp.training.rollout_func import Rollouts
    from gymexp.training.trainer import PolicyTrainer

    controlled_process.send_heartbeats(services.control_url, "trainer" if main_rank else f"trainer-{_rank()}")
    reporter = ProgressReporter(services.control_url if main_rank else None)
    reporter.report(phase="load model")
    prepared = load_prepared(run.data)
    tokenizer = load_tokenizer(config.model)
    # Built before the model: with ZeRO-3, transformers then loads only each rank's part of the model.
    args = arguments.build(config, run.checkpoints)
    model = load_model(config.model)
    device = torch.device("cuda", _rank("LOCAL_RANK")) if torch.cuda.is_available() else torch.device("cpu")
    collector = None
    with ExitStack() as stack:
        stack.callback(reporter.close)
        resume = run.checkpoints / services.checkpoint if services.checkpoint else None
        first_step = checkpoints.step_of(resume) if resume else 0
        tracker = (
            _open_tracker(config, run, first_step if resume else None, reporter, stack) if main_rank else None
        )
        if services.engine_fd is not None:
            # The hf engine samples from this model. Otherwise the trainer moves the model, or shards it from
            # where it is.
            torch.nn.Module.to(model, device)
            engine = serve_hf(config, model, tokenizer, services.engine_fd, stack)
        else:
            reporter.report(phase="load engine")
            engine = join_servers(config, run, services, _rank(), device, stop_requested, stack)
        if main_rank:
            vocab_size: int = model.get_input_embeddings().num_embeddings  # pyright: ignore
            collector = controlled_process.open_collector(
                config, services, vocab_size, reporter, stop_requested, stack
            )
        tasks = {t.key: t for part in (prepared.train, *prepared.validation.values()) for t in part}
        writer = (
            RolloutWriter(run.rollouts, config.env, first_step if resume else None) if main_rank else None
        )
        send = tracker.add_rollouts if tracker else None
        rollouts = Rollouts(config, collector, tasks, writer, engine, send)
        trainer = PolicyTrainer(config, args, model, tokenizer, prepared, rollouts, run.checkpoints)
        if isinstance(engine, ServerSampling):
            trainer.sample_with_servers(engine, engine.first_version)
        judge = Judge(config.search, run.path) if main_rank and config.search.trial is not None else None
        evaluation = Evaluation(config, prepared, rollouts, reporter, judge)
        stop = StopOnRequest(lambda: stop_requested.is_set() or evaluation.pruned is not None)
        evaluation.trainer = stop.trainer = trainer
        if main_rank:
            trainer.spans.report = reporter.report_span
            trainer.add_callback(MetricsFile(run.metrics, first_step))
        if tracker:
            trainer.add_callback(tracker)
        for callback in queued_tasks.around((Steps(reporter), evaluation, stop), trainer):
            trainer.add_callback(callback)

        held_out = _train(trainer, evaluation, config, run, resume)
        reporter.report(phase="save")
        trainer.save_now()
        if not trainer.stopped:
            trainer.save_policy(run.path)
        result = {"step": trainer.state.global_step, "stopped": trainer.stopped, "held_out": held_out}
        return result | ({"stopped": False, "pruned": evaluation.pruned} if evaluation.pruned else {})


def _train(
    trainer: PolicyTrainer, evaluation: Evaluation, config: RunConfig, run: RunDirectory, resume: Path | None
) -> dict[str, Any]:
    """Trains, and plays held-out tasks before and after if configured. Returns `held_out` of result.json."""
    from gymexp.record.metric_names import before_and_after
    from gymexp.rollout.collect import ControllerGone, Stopped

    before: dict[str, float] = _read_before(run)
    after: dict[str, float] = {}
    try:
        if config.evaluation.before and not resume:
            before = evaluation.run(0)
            if _rank() == 0:
                replace_file(run.path / "before.json", json.dumps(before))
        trainer.train_from(resume)
        if not trainer.stopped and config.evaluation.after:
            after = evaluation.run(trainer.state.global_step)
    except Stopped:
        trainer.stopped = True
    except ControllerGone:
        trainer.save_now()
        raise
    if evaluation.pruned:
        log.info("pruned after step %d: %s", trainer.state.global_step, evaluation.pruned)
        return before_and_after(before, evaluation.newest)
    if trainer.stopped:
        log.info("ended on request after step %d", trainer.state.global_step)
    return before_and_after(before, after)


def _read_before(run: RunDirectory) -> dict[str, float]:
    """Returns the metrics of the evaluation before training; empty if there was none."""
    return read_json(run.path / "before.json")


def _open_tracker(
    config: RunConfig, run: RunDirectory, step: int | None, reporter: ProgressReporter, stack: ExitStack
) -> TrackerFeed | None:
    """Opens the run's tracker, which `stack` closes; None without one. step: of the checkpoint that a resumed
    run continues from. reporter: tells the user if the tracker fails."""
    from gymexp.training.tracker_feed import open_feed
    from gymexp.training.tracker_runs import Place

    feed = open_feed(config, Place.of(run.path, config.name, step), reporter.report_remark)
    if feed:
        stack.push(lambda kind, *_: feed.close(failed=kind is not None))
    return feed


if __name__ == "__main__":
    main()
