"""The trainer's process: `python -m gymexp.training.process RUN_DIR`, started and watched by the controller.

It reads the run directory (config, data, services.json), builds policy, engine and trainer, trains, and
leaves result.json. SIGTERM asks it to end after a checkpoint of the last finished step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymexp import files
from gymexp.config.load import from_yaml
from gymexp.config.schema import RunConfig
from gymexp.errors import GymexpError
from gymexp.files import read_json, replace_file
from gymexp.printable import log_to_stderr
from gymexp.processes.direct import open_url
from gymexp.processes.keys import RUN, header_of
from gymexp.processes.lifeline import die_with_parent
from gymexp.record.directory import RunDirectory
from gymexp.record.services import Services

if TYPE_CHECKING:
    from gymexp.rollout.collect import Collector
    from gymexp.training.callbacks import Evaluation, Teller
    from gymexp.training.trainer import PolicyTrainer

log = logging.getLogger(__name__)
_ALIVE_S = 5.0
_OUT_OF_MEMORY = (
    "the trainer's GPU has too little memory for a micro-batch: halve trainer.per_device_train_batch_size "
    "and double trainer.gradient_accumulation_steps, leave trainer.gradient_checkpointing on, train "
    "an adapter (model.lora.r=16), or spread the policy over more GPUs (trainer.fsdp=true)"
)


def main() -> None:
    die_with_parent()
    run = RunDirectory(Path(sys.argv[1]))
    log_to_stderr("%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controller's to handle
    main_rank = _rank() == 0
    try:
        result = work(run, from_yaml(run.config), asked)
        if main_rank:
            run.write_result(result)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, and not imported yet
            said = f"{_OUT_OF_MEMORY}. torch says: {error}"
        elif isinstance(error, GymexpError):
            said = str(error)
        elif refused := files.refusal(error):
            said = files.in_words(refused)
        else:
            raise
        if not isinstance(error, GymexpError):
            log.exception("the error")
        log.error("%s", said)
        if main_rank:
            run.write_error(said)
        sys.exit(1)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to write, and no thread may keep an ended trainer alive


def _rank(name: str = "RANK") -> int:
    """This process's number among the trainer's, as torch's launchers give it."""
    return int(os.environ.get(name, "0"))


def work(run: RunDirectory, config: RunConfig, asked: threading.Event) -> dict[str, Any]:
    """Train; returns what result.json says. The first rank alone plays rollouts, talks to the controller and
    writes."""
    main_rank = _rank() == 0
    services = Services.read(run.path)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

    import torch

    from gymexp.data.prepare import load_prepared
    from gymexp.policy.model import load_model, load_tokenizer
    from gymexp.record.study import Judge
    from gymexp.training import arguments, checkpoints
    from gymexp.training.callbacks import EndWhenAsked, Evaluation, MetricsFile, Steps, Teller
    from gymexp.training.rollouts import Rollouts
    from gymexp.training.sampling import ServerSampling, join_servers, serve_hf
    from gymexp.training.trainer import PolicyTrainer

    threading.Thread(target=_say_alive, args=[services.control_url], name="alive", daemon=True).start()
    teller = Teller(services.control_url if main_rank else None)
    teller.tell(phase="load model")
    prepared = load_prepared(run.data)
    tokenizer = load_tokenizer(config.model)
    # Before the model: with ZeRO-3, transformers loads each rank's part alone.
    args = arguments.build(config, run.checkpoints, f"{config.name} {run.path.name}")
    model = load_model(config.model)
    device = torch.device("cuda", _rank("LOCAL_RANK")) if torch.cuda.is_available() else torch.device("cpu")
    collector = None
    with ExitStack() as stack:
        stack.callback(teller.close)
        if main_rank:
            _open_tracker(config, run, stack)
        if services.engine_fd is not None:
            torch.nn.Module.to(model, device)  # else the trainer moves it, or shards it from where it is
            engine = serve_hf(config, model, tokenizer, services.engine_fd, stack)
        else:
            teller.tell(phase="load engine")
            engine = join_servers(config, run, services, _rank(), device, asked, stack)
        if main_rank:
            vocab_size: int = model.get_input_embeddings().num_embeddings  # pyright: ignore
            collector = _open_collector(config, services, vocab_size, teller, asked, stack)
        tasks = {t.key: t for some in (prepared.train, *prepared.validation.values()) for t in some}
        rollouts = Rollouts(config, collector, tasks, run.rollouts, engine)
        trainer = PolicyTrainer(config, args, model, tokenizer, prepared, rollouts, run.checkpoints)
        if isinstance(engine, ServerSampling):
            # A server that gymexp did not start may hold any weights.
            trainer.sample_with_servers(engine, version=None if config.engine.urls else 0)
        resume = run.checkpoints / services.checkpoint if services.checkpoint else None
        first_step = checkpoints.step_of(resume) if resume else 0
        judge = Judge(config.search, run.path) if main_rank and config.search.trial is not None else None
        evaluation = Evaluation(config, prepared, rollouts, teller, judge)
        ending = EndWhenAsked(lambda: asked.is_set() or evaluation.pruned is not None)
        evaluation.trainer = ending.trainer = trainer
        if main_rank:
            trainer.add_callback(MetricsFile(run.metrics, first_step))
        for callback in (Steps(teller), evaluation, ending):
            trainer.add_callback(callback)

        held_out = _train(trainer, evaluation, config, run, resume)
        teller.tell(phase="save")
        trainer.save_now()
        if not trainer.stopped:
            trainer.save_policy(run.path)
        result = {"step": trainer.state.global_step, "stopped": trainer.stopped, "held_out": held_out}
        return result | ({"stopped": False, "pruned": evaluation.pruned} if evaluation.pruned else {})


def _say_alive(control_url: str) -> None:
    name = f"trainer-{_rank()}" if _rank() else "trainer"
    request = urllib.request.Request(f"{control_url}/alive/{name}", b"", header_of(RUN))
    while True:
        with contextlib.suppress(OSError):
            open_url(request, timeout_s=_ALIVE_S).close()
        time.sleep(_ALIVE_S)


def _open_collector(
    config: RunConfig,
    services: Services,
    vocab_size: int,
    teller: Teller,
    asked: threading.Event,
    stack: ExitStack,
) -> Collector:
    """It stops once the run is asked to end."""
    from gymexp.rollout.collect import Collector

    collector = Collector(
        services.replicas,
        config.env,
        config.rollout,
        vocab_size,
        services.control_url,
        services.gateway_url,
        teller.progress,
    )
    stack.callback(collector.close)
    threading.Thread(target=lambda: (asked.wait(), collector.stop()), daemon=True).start()
    return collector


def _train(
    trainer: PolicyTrainer, evaluation: Evaluation, config: RunConfig, run: RunDirectory, resume: Path | None
) -> dict[str, Any]:
    """Train, held-out tasks before and after; returns what result.json says of these."""
    from gymexp.record.metric_names import before_and_after
    from gymexp.rollout.collect import ControllerGone, Stopped

    before: dict[str, float] = _remembered(run)
    after: dict[str, float] = {}
    try:
        if config.evaluation.before and not resume:
            before = evaluation.run(0)
            if _rank() == 0:
                replace_file(run.path / "before.json", json.dumps(before))
        trainer.go_on_from(resume)
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
        log.info("asked to end after step %d", trainer.state.global_step)
    return before_and_after(before, after)


def _remembered(run: RunDirectory) -> dict[str, float]:
    return read_json(run.path / "before.json")


def _open_tracker(config: RunConfig, run: RunDirectory, stack: ExitStack) -> None:
    """transformers' callbacks write to the trackers; this says where. A resumed run goes on in its own."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.path / "tensorboard")
    if config.tracker.kind != "wandb":
        return
    import wandb

    known = run.path / "wandb_run_id"
    if not known.exists():
        replace_file(known, secrets.token_hex(4))
    mode: Any = config.tracker.mode
    try:
        wandb.init(
            project=config.tracker.project,
            name=f"{config.name} {run.path.name}",
            id=known.read_text(),
            resume="allow",
            mode=mode,
            dir=run.path,
            config=dataclasses.asdict(config),
        )
    except wandb.Error as error:
        raise GymexpError(
            f"tracker=wandb: {error}. Log in with `wandb login`, or say tracker.mode=offline"
        ) from error
    stack.push(lambda kind, *_: wandb.finish(exit_code=0 if kind is None else 1))


if __name__ == "__main__":
    main()
