"""The schema of an evaluation. The groups that a run has as well are the run's own (`config/schema.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gymexp.config.schema import (
    DatasetConfig,
    EngineConfig,
    EvaluationConfig,
    GymConfig,
    LauncherConfig,
    ModelConfig,
    RolloutConfig,
)


@dataclass
class EndpointConfig:
    """A server with OpenAI's chat completions, whose model is evaluated as a baseline."""

    url: str | None = None  # its address up to and with /v1, e.g. https://api.openai.com/v1
    model: str | None = None  # the server's name of the model
    key_env: str | None = None  # name of the environment variable that has the server's key; None: no key
    timeout_s: float = 300.0  # limit on the time of one reply, with its retries


@dataclass
class PlayConfig(EvaluationConfig):
    """Which tasks are played how often, and from which distribution the tokens are drawn."""

    samples: int = 1  # rollouts of each task; 4 or more show how far one policy's rollouts differ
    # keys of the tasks to play, e.g. [sudoku/validation/000003]; []: all, or the first num_tasks
    tasks: list[str] = field(default_factory=list)


@dataclass
class EvaluateConfig:
    """One evaluation: tasks, and exactly one of model, checkpoint, run, endpoint.url and policy."""

    name: str | None = None  # part of outputs/eval/<name>/<date_time>; None: the model's or the run's name
    seed: int | None = None  # seed of the draws; None: 0, or with run= and checkpoint= the run's
    resume: str | None = None  # the directory of an evaluation that ended early
    output_dir: str | None = None  # directory of the evaluation; None: outputs/eval/<name>/<date_time>
    # a checkpoint or the model/ of a run, or any directory in Hugging Face's form
    checkpoint: str | None = None
    run: str | None = None  # the directory of a run whose policy is evaluated
    checkpoints: Any = "final"  # with run=: final, last, best, all, or a list of steps, e.g. [16,32]
    policy: str | None = None  # probe: canned replies in place of a model
    # directories of evaluations and runs whose results are compared with the first one's; nothing is played
    compare: list[str] = field(default_factory=list)
    split: str = "validation"  # validation or train
    model: ModelConfig = field(default_factory=ModelConfig)
    # the environments, as in a run; with run= also single keys of the run's own, e.g. env.sudoku.timeout_s=60
    env: dict[str, Any] = field(default_factory=dict)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    evaluation: PlayConfig = field(default_factory=PlayConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    gym: GymConfig = field(default_factory=GymConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    trainer: dict[str, Any] = field(default_factory=dict)  # of a model's file; not used
