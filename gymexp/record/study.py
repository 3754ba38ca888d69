"""A study that a sweep's jobs share: a job's values come from it when the job starts, so that none waits for
another.

The study is Optuna's, kept in <sweep>/study.journal (locked by symbolic links, as NFS allows), and only this
module knows Optuna. A job's trial is in <job>/trial.json: a run that goes on keeps its values.
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

from gymexp.cluster.slurm import slurm_states
from gymexp.config.load import resumed, with_values
from gymexp.config.schema import RunConfig, SearchConfig
from gymexp.config.space import flat
from gymexp.errors import Interrupted
from gymexp.files import read_json, replace_file
from gymexp.record.state import RunState, read_run

if TYPE_CHECKING:
    import optuna

TRIAL_KEY = "search.trial"
_NAME = "sweep"
_JOB = "job"  # a trial's attribute: the number of its job


@dataclass(frozen=True)
class TrialFile:
    """A job's trial.json: the trial's number in the study, and its values by key."""

    number: int
    values: dict[str, Any]


def read_trial(directory: Path) -> TrialFile | None:
    """The trial of a job's directory; None of a job that has none, or has not begun."""
    said = read_json(directory / "trial.json")
    return TrialFile(**said) if said else None


def as_trial(train: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`train(config, overrides, directory, …)` as one trial, where the run is one: with the values that the
    study gives it, and its end told to the study."""

    @functools.wraps(train)
    def wrapped(config: RunConfig, overrides: Sequence[str], directory: Path, *more: Any) -> dict[str, Any]:
        if config.search.trial is None and read_trial(directory) is None:
            return train(config, overrides, directory, *more)
        if config.resume and config.search.trial is None:  # resume=… on a command line that says no more
            config = resumed(directory / "config.yaml", config.resume)
        trial = begin(config.search, directory)
        if not config.resume:
            overrides = [*overrides, *(f"{key}={value}" for key, value in trial.values.items())]
        config = with_values(config, trial.values)
        try:
            result = train(config, overrides, directory, *more)
        except Exception as error:
            if not isinstance(error, Interrupted):  # a signal's: the trial goes on with the run
                end(config.search, directory, {})
            raise
        end(config.search, directory, result)
        return result

    return wrapped


def begin(search: SearchConfig, directory: Path) -> TrialFile:
    """The trial of a job's directory: the one it has, or the study's next."""
    study = _open(directory.parent, search, sampler_seed=search.seed + (search.trial or 0))
    known = read_trial(directory)
    if known is not None:
        frozen = study.trials[known.number]
        if not frozen.state.is_finished():
            return known
        # Another job gave this trial up while its run was away. The study takes no finished trial back, but
        # it takes a new one with the same values.
        trial = _add_like(study, frozen)
    else:
        _give_up_lost(study, directory.parent)
        asked = study.ask({key: _distribution(space) for key, space in flat(search.params).items()})
        asked.set_user_attr(_JOB, directory.name)
        trial = TrialFile(asked.number, asked.params)
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / "trial.json", json.dumps({"number": trial.number, "values": trial.values}))
    return trial


def end(search: SearchConfig, directory: Path, result: Mapping[str, Any]) -> None:
    """Tell the study how the trial ended. A run without the metric has failed."""
    from optuna.trial import TrialState

    trial = read_trial(directory)
    assert trial is not None, "it has begun"
    after = {
        env: {name: pair[1] for name, pair in some.items()}
        for env, some in result.get("held_out", {}).items()
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
    """Of a running trial: takes what each held-out evaluation measured, and says when to end."""

    def __init__(self, search: SearchConfig, directory: Path) -> None:
        import optuna

        trial = read_trial(directory)
        assert trial is not None, "the controller has begun it"
        study = _open(directory.parent, search)
        self._search = search
        self._study = study
        self._trial = optuna.Trial(study, study.trials[trial.number]._trial_id)

    def report(self, step: int, held_out: Mapping[str, Mapping[str, float]]) -> str | None:
        """held_out: `{env: {metric: value}}`. Returns why the trial is to end, if it is."""
        value = score(self._search.metric, held_out)
        if value is None:
            return None
        self._trial.report(value, step)
        if not (self._search.prune and self._is_worse(value, step)):
            return None
        than = "below" if self._search.direction == "maximize" else "above"
        return (
            f"{self._search.metric} of {value:.3f} after step {step} is {than} the median of the other trials"
        )

    def _is_worse(self, value: float, step: int) -> bool:
        """Than the median, at this step, of the trials that came to their end. Optuna's MedianPruner takes a
        trial's best value so far, which is the one from before its policy collapsed."""
        from optuna.trial import TrialState

        done = self._study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
        if step < self._search.warmup_steps or len(done) < self._search.startup_trials:
            return False
        others = [trial.intermediate_values[step] for trial in done if step in trial.intermediate_values]
        sign = 1 if self._search.direction == "maximize" else -1
        return bool(others) and sign * value < sign * median(others)


def score(metric: str, held_out: Mapping[str, Mapping[str, float | None]]) -> float | None:
    """metric: of one environment (`sudoku/success`), or the mean over all that have it (`reward`)."""
    env, _, name = metric.rpartition("/")
    chosen = [held_out.get(env, {})] if env else held_out.values()
    values = [v for some in chosen if (v := some.get(name)) is not None]
    return fmean(values) if values else None


def summary(sweep: Path) -> list[str]:
    """The best trial, and how much each key mattered; nothing for a sweep without a study."""
    if not _journal(sweep).exists():
        return []
    try:
        import optuna
        from optuna.trial import TrialState
    except ImportError:
        return ["study: its best trial is shown where Optuna is: pip install 'gymexp[optuna]'"]
    with _quiet():
        study = optuna.load_study(study_name=_NAME, storage=_storage(sweep))
    done = study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
    pruned = study.get_trials(states=(TrialState.PRUNED,), deepcopy=False)
    told = [f"study: {len(done)} trials finished, {len(pruned)} pruned"]
    if done:
        best = study.best_trial
        values = "  ".join(f"{key}={_said(value)}" for key, value in best.params.items())
        told.append(f"best trial: job {best.user_attrs.get(_JOB, '?')} with {best.value:.3f}  ({values})")
    if len({trial.value for trial in done}) > 1 and len(done) > 3:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        told.append("importance: " + "  ".join(f"{key} {share:.2f}" for key, share in shares.items()))
    return told


def _give_up_lost(study: optuna.Study, sweep: Path) -> None:
    """Trials whose run is over without the study having heard of it do not count as going on."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,), deepcopy=False):
        run = _run_of(sweep, trial.user_attrs.get(_JOB))
        if run and run.ended:
            with contextlib.suppress(ValueError, RuntimeError):  # another job was faster
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
            # What runs elsewhere counts as bad meanwhile, so that two jobs do not try the same.
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
    """Optuna says that it opened a study."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _said(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
