"""The run at each tracker: opened once a process, continued if the gymexp run is resumed.

The names of the metrics are those of metrics.jsonl, which transformers' own integrations would change. That a
call fails or takes long is the business of `tracker_feed`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from gymexp.config.redaction import redacted
from gymexp.config.schema import RunConfig
from gymexp.files import replace_file
from gymexp.training.rollout_sample import Chosen, as_text, facts, messages


class TrackerRun(Protocol):
    """The run at one tracker. Any method may raise whatever the tracker's package raises."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Sends the metrics of one entry of metrics.jsonl."""

    def log_rollouts(self, step: int, name: str, chosen: Sequence[Chosen]) -> None:
        """Sends some rollouts. name: of their file in rollouts/."""

    def finish(self, failed: bool) -> None:
        """Sends what is left, and ends the run at the tracker."""


@dataclass(frozen=True)
class Place:
    """Where a run stands, and how it is called at a tracker.

    group: the sweep that the run is a job of, None without one. step: of the checkpoint that a resumed run
    continues from, None for a new run.
    """

    path: Path
    name: str
    group: str | None
    step: int | None

    @classmethod
    def of(cls, path: Path, name: str, step: int | None) -> Place:
        """path: the run directory. name: the experiment's."""
        sweep = path.parent
        if (sweep / "sweep.json").exists():
            return cls(path, f"{name} {sweep.name}/{path.name}", f"{name} {sweep.name}", step)
        return cls(path, f"{name} {path.name}", None, step)

    def identity(self, tracker: str, new: str) -> tuple[str, bool]:
        """Returns the run's identity at the tracker, and whether it has begun there before. It stays in the
        file `<tracker>_run_id` of the run directory."""
        file = self.path / f"{tracker}_run_id"
        if known := file.exists():
            return file.read_text(), known
        replace_file(file, new)
        return new, known


def open_run(config: RunConfig, place: Place) -> TrackerRun | None:
    """Opens the run at the tracker of `tracker.kind`; None if it is none. Raises what its package raises."""
    match config.tracker.kind:
        case "wandb":
            return _Wandb(config, place)
        case "trackio":
            return _Trackio(config, place)
        case "mlflow":
            return _Mlflow(config, place)
        case "tensorboard":
            return _Tensorboard(place)
        case _:
            return None


class _Wandb:
    def __init__(self, config: RunConfig, place: Place) -> None:
        import wandb

        run_id, _ = place.identity("wandb", secrets.token_hex(4))
        mode: Any = config.tracker.mode
        self._run = wandb.init(
            project=config.tracker.project,
            name=place.name,
            group=place.group,
            id=run_id,
            resume="allow",
            mode=mode,
            dir=place.path,
            config=redacted(asdict(config)),
        )
        # wandb's own step may only grow, but a resumed run repeats the steps after its checkpoint.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "step": step})

    def log_rollouts(self, step: int, name: str, chosen: Sequence[Chosen]) -> None:
        import wandb

        if name.startswith("eval-"):  # wandb shows a table of each step badly, as one that is replaced
            columns = _columns(step, chosen)
            rows: Any = [list(row) for row in zip(*columns.values(), strict=True)]
            table = wandb.Table(columns=list(columns), data=rows)
            self._run.log({f"rollouts/{name}": table, "step": step})

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, config: RunConfig, place: Place) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        # A run of another directory may have the same name; trackio would continue that one.
        name, known = place.identity("trackio", f"{place.name} {secrets.token_hex(2)}")
        self._project = config.tracker.project
        self._space = config.trainer.get("trackio_space_id")
        self._static_space = config.trainer.get("trackio_static_space_id")
        self._run = trackio.init(
            project=self._project,
            name=name,
            group=place.group,
            resume="allow" if known else "never",
            space_id=self._space,
            bucket_id=config.trainer.get("trackio_bucket_id"),
            config=redacted(asdict(config)),
            embed=False,
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def log_rollouts(self, step: int, name: str, chosen: Sequence[Chosen]) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        held_out, traces = name.startswith("eval-"), []
        for one in chosen:
            metadata = facts(one) | ({} if held_out else {"advantage": one.advantage})
            metadata |= {"step": step, "file": name}
            traces.append(trackio.Trace(messages(one.outcome), metadata=metadata))
        self._run.log({"eval_rollouts" if held_out else "rollouts": traces}, step=step)

    def finish(self, failed: bool) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._run.finish()
        if self._space and self._static_space is not False:
            trackio.freeze(space_id=self._space, project=self._project, new_space_id=self._static_space)


class _Mlflow:
    """Uses MLflow's client, as its functions know a run only in the thread that began it. The variable
    MLFLOW_TRACKING_URI says where the runs are."""

    def __init__(self, config: RunConfig, place: Place) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH  # pyright: ignore[reportMissingImports]

        self._client = MlflowClient()
        file = place.path / "mlflow_run_id"
        if file.exists():
            self._run_id = file.read_text()
            self._client.update_run(self._run_id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(config.tracker.project)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(config.tracker.project)
        )
        tags = {"sweep": place.group} if place.group else {}
        run = self._client.create_run(experiment_id, run_name=place.name, tags=tags)
        self._run_id, _ = place.identity("mlflow", run.info.run_id)
        values = flatten(redacted(asdict(config)))
        params = [Param(key, value[:MAX_PARAM_VAL_LENGTH]) for key, value in values.items()]
        for start in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
            self._client.log_batch(self._run_id, params=params[start : start + MAX_PARAMS_TAGS_PER_BATCH])

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now_ms = round(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in numbers.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def log_rollouts(self, step: int, name: str, chosen: Sequence[Chosen]) -> None:
        if name.startswith("eval-"):
            self._client.log_table(self._run_id, _columns(step, chosen), f"rollouts/{name}.json")

    def finish(self, failed: bool) -> None:
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


class _Tensorboard:
    def __init__(self, place: Place) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # A resumed run repeats the steps after its checkpoint: TensorBoard forgets the first ones.
        purge_step = None if place.step is None else place.step + 1
        self._writer = SummaryWriter(str(place.path / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_rollouts(self, step: int, name: str, chosen: Sequence[Chosen]) -> None:
        """TensorBoard has nothing to show them with."""

    def finish(self, failed: bool) -> None:
        self._writer.close()


def _columns(step: int, chosen: Sequence[Chosen]) -> dict[str, list[Any]]:
    """Returns a table of held-out rollouts, by column."""
    rows = [{"step": step, **facts(one), "conversation": as_text(messages(one.outcome))} for one in chosen]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def flatten(value: Any, key: str = "") -> dict[str, str]:
    """Returns a configuration as MLflow's parameters, such as {"trainer.max_steps": "24"}."""
    if not isinstance(value, Mapping):
        return {key: str(value)}
    return {
        name: text
        for part, inner in value.items()
        for name, text in flatten(inner, f"{key}.{part}" if key else str(part)).items()
    }
