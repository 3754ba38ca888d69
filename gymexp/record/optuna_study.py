"""An Optuna study that a sweep's jobs share. A job gets its values when it starts, so none waits for another.

The study is in <sweep>/study.journal, which is locked by symbolic links, as NFS allows. Only this module uses
Optuna. A job's trial is in <job>/trial.json, so that a resumed run keeps its values.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from gymexp.cluster.slurm_states import slurm_states
from gymexp.config.load import resumed, with_values
from gymexp.config.schema import RunConfig, SearchConfig
from gymexp.config.search_space import flat
from gymexp.errors import Interrupted
from gymexp.files import read_json, replace_file
from gymexp.record.run_state import RunState, read_run

if TYPE_CHECKING:
    import optuna

TRIAL_KEY = "search.trial"
_NAME = "sweep"
_JOB = "job"  # a trial's attribute: the number of its job


@dataclass(frozen=True)
class TrialFile:
    """The contents of a job's trial.json: the trial's number in the study, and its values by key."""

    number: int
    values: dict[str, Any]


def read_trial(directory: Path) -> TrialFile | None:
    """Returns the trial in a job's directory; None if the job is no trial, or has not begun."""
    fields = read_json(directory / "trial.json")
    return TrialFile(**fields) if fields else None


def as_trial(train: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wraps `train(config, overrides, directory, …)` so that a run which is a trial takes part in the study.

    The run trains with the values that the study gives it, and its result is reported to the study.
    """

    @functools.wraps(train)
    def wrapped(config: RunConfig, overrides: Sequence[str], directory: Path, *more: Any) -> dict[str, Any]:
        if config.search.trial is None and read_trial(directory) is None:
            return train(config, overrides, directory, *more)
        if config.resume and config.search.trial is None:  # the command line has resume=… alone
            config = resumed(directory / "config.yaml", config.resume)
        trial = begin(config.search, directory)
        if not config.resume:
            overrides = [*overrides, *(f"{key}={value}" for key, value in trial.values.items())]
        config = with_values(config, trial.values)
        try:
            result = train(config, overrides, directory, *more)
        except Exception as error:
            if not isinstance(error, Interrupted):  # after a signal the trial goes on when the run is resumed
                end(config.search, directory, {})
            raise
        end(config.search, directory, result)
        return result

    return wrapped


def begin(search: SearchConfig, directory: Path) -> TrialFile:
    """Returns the trial of a job's directory: the one in its trial.json, or the next one of the study."""
    study = _open(directory.parent, search, sampler_seed=search.seed + (search.trial or 0))
    known = read_trial(directory)
    if known is not None:
        frozen = study.trials[known.number]
        if not frozen.state.is_finished():
            return known
        # Another job marked this trial as failed while its run was down. Optuna cannot reopen a finished
        # trial, so a new one with the same values takes its place.
        trial = _add_like(study, frozen)
    else:
        _give_up_lost(study, directory.parent)
        new = study.ask({key: _distribution(space) for key, space in flat(search.params).items()})
        new.set_user_attr(_JOB, directory.name)
        trial = TrialFile(new.number, new.params)
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / "trial.json", json.dumps({"number": trial.number, "values": trial.values}))
    return trial


def end(search: SearchConfig, directory: Path, result: Mapping[str, Any]) -> None:
    """Reports the end of a trial to the study. A trial without a value of the metric counts as failed."""
    from optuna.trial import TrialState

    trial = read_trial(directory)
    assert trial is not None, "the trial has begun"
    after = {
        env: {name: pair[1] for name, pair in metrics.items()}
        for env, metrics in result.get("held_out", {}).items()
    }
    value = score(search.metric, after)
    study = _open(directory.parent, search)
    if result.get("pruned"):
        study.tell(trial.number, state=TrialState.PRUNED)
    elif value is None:
        study.tell(trial.number, state=TrialState.FAIL)
    else:
        study.tell(trial.number, value)


class Judge:
    """Reports the held-out evaluations of a running trial to the study, and decides whether to prune it."""

    def __init__(self, search: SearchConfig, directory: Path) -> None:
        import optuna

        trial = read_trial(directory)
        assert trial is not None, "the controller has begun the trial"
        study = _open(directory.parent, search)
        self._search = search
        self._study = study
        self._trial = optuna.Trial(study, study.trials[trial.number]._trial_id)

    def report(self, step: int, held_out: Mapping[str, Mapping[str, float]]) -> str | None:
        """Reports an evaluation. Returns why the trial is to end, or None if it is to go on.

        held_out: `{env: {metric: value}}`.
        """
        value = score(self._search.metric, held_out)
        if value is None:
            return None
        self._trial.report(value, step)
        if not (self._search.prune and self._is_worse(value, step)):
            return None
        side = "below" if self._search.direction == "maximize" else "above"
        return (
            f"{self._search.metric} of {value:.3f} after step {step} is {side} the median of the other trials"
        )

    def _is_worse(self, value: float, step: int) -> bool:
        """Returns whether a value is worse than the median of the completed trials at the same step.

        Optuna's MedianPruner compares a trial's best value so far instead. For a policy that has collapsed,
        that is the value from before the collapse.
        """
        from optuna.trial import TrialState

        done = self._study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
        if step < self._search.warmup_steps or len(done) < self._search.startup_trials:
            return False
        others = [trial.intermediate_values[step] for trial in done if step in trial.intermediate_values]
        sign = 1 if self._search.direction == "maximize" else -1
        return bool(others) and sign * value < sign * median(others)


def score(metric: str, held_out: Mapping[str, Mapping[str, float | None]]) -> float | None:
    """Returns the value of `search.metric` in an evaluation; None if no environment has it.

    metric: of one environment (`sudoku/success`), or the mean over all that have it (`reward`).
    """
    env, _, name = metric.rpartition("/")
    chosen = [held_out.get(env, {})] if env else held_out.values()
    values = [value for metrics in chosen if (value := metrics.get(name)) is not None]
    return fmean(values) if values else None


def summary(sweep: Path) -> list[str]:
    """Returns lines on the study: counts, the best trial, each key's importance. Empty without a study."""
    if not _journal(sweep).exists():
        return []
    try:
        import optuna
        from optuna.trial import TrialState
    except ImportError:
        return ["study: to show its best trial, install Optuna: pip install 'gymexp[optuna]'"]
    with _quiet():
        study = optuna.load_study(study_name=_NAME, storage=_storage(sweep))
    done = study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
    pruned = study.get_trials(states=(TrialState.PRUNED,), deepcopy=False)
    lines = [f"study: {len(done)} trials finished, {len(pruned)} pruned"]
    if done:
        best = study.best_trial
        values = "  ".join(f"{key}={_shown(value)}" for key, value in best.params.items())
        lines.append(f"best trial: job {best.user_attrs.get(_JOB, '?')} with {best.value:.3f}  ({values})")
    if len({trial.value for trial in done}) > 1 and len(done) > 3:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        lines.append("importance: " + "  ".join(f"{key} {share:.2f}" for key, share in shares.items()))
    return lines


def _give_up_lost(study: optuna.Study, sweep: Path) -> None:
    """Marks as failed each running trial whose run is over, e.g. because it was killed."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,), deepcopy=False):
        run = _run_of(sweep, trial.user_attrs.get(_JOB))
        if run and run.ended:
            with contextlib.suppress(ValueError, RuntimeError):  # another job has marked it
                study.tell(trial.number, state=TrialState.FAIL)


def _run_of(sweep: Path, job: str | None) -> RunState | None:
    if job is None:
        return None
    job_id = read_run(sweep / job).status.get("job_id")
    return read_run(sweep / job, slurm_states([job_id]) if job_id else None, job_id)


def _add_like(study: optuna.Study, frozen: optuna.trial.FrozenTrial) -> TrialFile:
    from optuna.trial import TrialState, create_trial

    marked = {**frozen.user_attrs, "after": frozen.number}
    study.add_trial(
        create_trial(
            state=TrialState.RUNNING,
            params=frozen.params,
            distributions=frozen.distributions,
            intermediate_values=frozen.intermediate_values,
            user_attrs=marked,
        )
    )
    added = [t.number for t in study.get_trials(deepcopy=False) if t.user_attrs == marked]
    return TrialFile(added[-1], frozen.params)


def _distribution(space: Any) -> optuna.distributions.BaseDistribution:
    from optuna import distributions

    if isinstance(space, list):
        return distributions.CategoricalDistribution(space)
    low, high, log, step = (space.get(key) for key in ("low", "high", "log", "step"))
    if isinstance(low, int) and isinstance(high, int):
        return distributions.IntDistribution(low, high, log=bool(log), step=step or 1)
    return distributions.FloatDistribution(low, high, log=bool(log), step=step)


def _open(sweep: Path, search: SearchConfig, sampler_seed: int | None = None) -> optuna.Study:
    import optuna

    sweep.mkdir(parents=True, exist_ok=True)
    with _quiet():
        return optuna.create_study(
            study_name=_NAME,
            storage=_storage(sweep),
            direction=search.direction,  # pyright: ignore[reportArgumentType]  (rules.py has checked it)
            load_if_exists=True,
            # A running trial counts as a bad one, so that two jobs do not try the same values.
            sampler=optuna.samplers.TPESampler(seed=sampler_seed, constant_liar=True),
        )


def _storage(sweep: Path) -> optuna.storages.JournalStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(_journal(sweep))))


def _journal(sweep: Path) -> Path:
    return sweep / "study.journal"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides Optuna's log line about an opened study."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
