"""The schema of a run: dataclasses that carry types, defaults and meaning; `conf/` only says what differs.

`load(cfg)` turns Hydra's composed config into a checked `RunConfig`. Nothing here imports torch, transformers
or TRL, so that a mistake is answered in about a second. `trainer.*` is TRL's own and is checked against
`trl.GRPOConfig` by `gymexp.training.arguments`, before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class LoraConfig:
    """An adapter that is trained in place of the model's own weights. Names are those of peft.LoraConfig."""

    r: int | None = None  # rank; None: no adapter, all weights are trained
    lora_alpha: int = 32  # the adapter's output counts lora_alpha / r times
    lora_dropout: float = (
        0.0  # the engine samples without it: above 0 the ratios of trainer to engine are noisy
    )
    target_modules: Any = "all-linear"  # all but the output head; or names, e.g. [q_proj,v_proj]; or a regex


@dataclass
class ModelConfig:
    """The policy: any transformers causal language model whose tokenizer has a chat template."""

    name: str = MISSING  # how reports and run directories call it
    path: str = MISSING  # a hub id, or a directory; relative directories are seen from the project's root
    revision: str | None = None  # of a hub id: branch, tag or commit; None: main. A run keeps to its commit
    dtype: str = "bfloat16"  # of the arithmetic and of what the engine holds: float32, bfloat16 or float16
    # how transformers computes attention: any implementation that can train
    attn_implementation: str = "sdpa"
    max_model_len: int = 4096  # tokens of prompt and generation together, over all turns of a rollout
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # e.g. {enable_thinking: false}
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class DataConfig:
    """Where an environment's tasks come from. `train_size` and `validation_size` are upper limits but for
    `generate`."""

    source: str = MISSING  # generate, huggingface or jsonl
    generator: str | None = None  # reasoning_gym or workplace: what `source=generate` runs
    options: dict[str, Any] = field(default_factory=dict)  # the generator's own: task, difficulty
    repo_id: str | None = None  # the Hugging Face dataset that `source=huggingface` downloads
    revision: str = "main"  # of the dataset: branch, tag or commit
    train_file: str | None = None  # in the dataset, or the user's own file with `source=jsonl`
    validation_file: str | None = None  # the held-out tasks, as `train_file`
    train_size: int | None = None  # training tasks; None: all of the file
    train_seed: int = 42  # of the generator: reasoning_gym's training tasks, all tasks of workplace
    validation_size: int | None = None  # held-out tasks; None: all of the file
    validation_seed: int = 24  # of the generator: reasoning_gym's held-out tasks


@dataclass
class EnvConfig:
    """One environment: a NeMo Gym agent with its resources server, as one of NeMo Gym's own YAML files has
    them."""

    config_path: str = MISSING  # NeMo Gym's YAML, as its `config_paths` takes it
    agent: str = MISSING  # the agent's name in that file: what a row's agent_ref says
    max_steps: int | None = None  # model turns in one rollout; None leaves the agent's own
    weight: float = 1.0  # share of the training tasks, relative to the other environments
    replicas: int = 1  # instances of the resources server and of the agent; rollouts are spread over them
    # Rollouts in flight; None: 64, or fewer where the limit on open files has no room for them.
    max_concurrency: int | None = None
    timeout_s: float = 600.0  # of one rollout, before it counts as failed
    max_output_tokens: int = 1024  # of one model turn
    memory_budget_mb: float | None = None  # of a resources server of gym.runtime=managed; above it: restarted
    success_reward: float = 1.0  # a reward of at least this counts as success
    # gym.runtime=managed: of a rollout in which a server answers 400 or 422 to what the policy said
    refused_reward: float = 0.0
    data: DataConfig = field(default_factory=DataConfig)


@dataclass
class DatasetConfig:
    """How the selected environments' tasks become one training set; every epoch plays it in another order."""

    train_size: int | None = None  # of an epoch; None: as many as the weights allow without repeating one
    validation_size: int | None = None  # tasks an environment; None: all
    order: str = "interleave"  # interleave: every batch holds each environment in proportion; shuffle
    seed: int = 0  # of the order of the tasks, in every epoch


@dataclass
class EngineConfig:
    """What samples tokens for the policy."""

    kind: str = "auto"  # vllm: `vllm serve`; hf: in the trainer's process; auto: vllm where it and a GPU are
    max_batch_size: int = 64  # hf: rows decoded at once
    python: str | None = None  # vllm: an interpreter that has it; None: this one
    tensor_parallel_size: int = 1  # vllm: GPUs of one replica
    args: dict[str, Any] = field(default_factory=dict)  # vllm: more flags of `vllm serve`, as Python names
    urls: list[str] = field(default_factory=list)  # vllm: servers that already run, instead of starting any
    colocate: bool = False  # vllm: every GPU samples and trains, in turn; a single GPU always does
    weights: str = (
        "auto"  # vllm: how weights reach it: nccl, ipc, disk; auto: the fastest that the GPUs allow
    )
    start_timeout_s: float = 900.0  # vllm: from start to the first answered health check


@dataclass
class PlacementConfig:
    """What samples and what trains: of one node's GPUs, in the order of CUDA_VISIBLE_DEVICES, or of a Slurm
    job's nodes, each as a whole. Sampling comes first; the first node also has NeMo Gym's servers."""

    rollout_gpus: int | None = None  # None: half of them; a single one both samples and trains
    train_gpus: int | None = None  # None: the others
    rollout_nodes: int | None = None  # None: one node does everything
    train_nodes: int = 1  # beside the rollout nodes


@dataclass
class GymConfig:
    """NeMo Gym's servers."""

    runtime: str = "managed"  # managed: gymexp hosts them; cli: `gym env start`; attach: they already run
    version: str = "0.4.0"  # of the nemo-gym package that gymexp's own venv has
    python: str | None = (
        None  # an interpreter that has nemo_gym already; None: a venv made and kept by gymexp
    )
    checkout: str | None = None  # runtime=cli: the user's own NeMo Gym checkout (with its .venv)
    head_host: str = "127.0.0.1"  # runtime=attach: where the running head server is
    head_port: int = 11000  # runtime=attach: the port of the running head server
    policy_port: int | None = None  # runtime=attach: the port those servers expect the policy endpoint on
    model_servers: int = 1  # instances of NeMo Gym's model server
    start_timeout_s: float = 180.0  # from start to the first answered health check, of each server
    health_interval_s: float = 5.0  # between two health checks of a server
    health_timeout_s: float = (
        60.0  # a server that answers no health check for so long is killed and restarted
    )
    max_restarts: int = 5  # of one server; beyond it the run ends


@dataclass
class RolloutConfig:
    """From tasks to outcomes."""

    max_retries: int = 2  # of one rollout that failed
    max_failed_share: float = 0.2  # of one batch; above it the run ends
    truncated: str = "scored"  # scored: trained on with the environment's reward; masked: no gradient
    drift_every: int = 20  # optimizer steps between two checks of log-probabilities and draws
    # mean absolute difference of the trainer's and the engine's log-probabilities (nats), in any environment,
    # that ends the run; None: 0.001 in float32, 0.02 in bfloat16 and float16
    max_drift: float | None = None


@dataclass
class EvaluationConfig:
    """Held-out tasks played with the policy as it is. Tokens may be drawn from another distribution than in
    training; the words are vLLM's."""

    every_steps: int = 0  # 0: only before and after training
    before: bool = True  # play the held-out tasks before training
    after: bool = True  # play the held-out tasks after training
    temperature: float | None = None  # None: as in training; 0: the likeliest token, every time
    top_p: float = 1.0  # of the likeliest tokens, those that hold this share of the probability
    top_k: int = 0  # the likeliest tokens, this many; 0: all
    min_p: float = 0.0  # tokens at least this times as probable as the likeliest one
    repetition_penalty: float = 1.0  # above 1, tokens of the prompt and of what was sampled are less likely
    num_tasks: int | None = None  # an environment; None: all


@dataclass
class CheckpointConfig:
    """Which checkpoints stay. `trainer.save_steps` says when one is written; once it is whole, those that
    none of these keys keeps are deleted. The newest always stays: a run goes on from it."""

    keep_last: int | None = None  # the newest so many; None: all
    keep_best: int = 0  # and so many with the highest held-out reward, the mean over environments
    keep_every: int | None = None  # and those of every so many steps


@dataclass
class TrackerConfig:
    """Where metrics go besides `metrics.jsonl`."""

    kind: str = "none"  # none, wandb, trackio or tensorboard
    project: str = "gymexp"  # the project's name at the tracker
    mode: str | None = None  # wandb: online, offline or disabled; None: wandb's own default


@dataclass
class LauncherConfig:
    """The Slurm job of a run (launcher=slurm); the words are sbatch's. Further flags of sbatch:
    `hydra.launcher.additional_parameters.<flag>=…`."""

    partition: str | None = None  # None: Slurm's default
    account: str | None = None  # whom the hours are booked to; None: Slurm's default
    qos: str | None = None  # quality of service; None: Slurm's default
    time: str = "1-00:00:00"  # minutes, or as sbatch takes it; at its end the run saves, waits, and goes on
    signal_s: int = 120  # before the end of `time` the run is told to save
    gpus: int | None = None  # of each node
    cpus: int | None = None  # of each node
    mem: str | None = None  # of each node, e.g. 200G
    array_parallelism: int = 256  # jobs of a sweep that run at once
    container: str | None = None  # an image, for Slurm with pyxis (srun --container-image)
    container_mounts: list[str] = field(default_factory=list)  # besides what the run itself needs
    mail: str | None = None  # an address that is told of each job's end
    setup: list[str] = field(default_factory=list)  # shell commands before the run, e.g. module load cuda
    dry_run: bool = False  # print what would be submitted, submit nothing


@dataclass
class SearchConfig:
    """A study (Optuna) that a sweep's jobs share: each is a trial, whose values the study gives it at its
    start. See sweeps/search_lr.yaml."""

    num_trials: int = 0  # jobs of the sweep
    trial: int | None = None  # which of them a job is: swept by `search.trial: range(${search.num_trials})`
    params: dict[str, Any] = field(
        default_factory=dict
    )  # the keys to search, as in the configuration: each a list of choices, or {low, high, log, step}
    metric: str = "reward"  # held-out: of one environment (sudoku/success), or the mean over all that have it
    direction: str = "maximize"  # or minimize
    seed: int = 0  # of the sampler
    prune: bool = False  # end a trial that is worse than the finished trials' median at its step
    startup_trials: int = 4  # prune: so many trials come to their end first
    warmup_steps: int = 0  # prune: steps of a trial before it is judged


@dataclass
class RunConfig:
    """One run. `trainer` is passed to `trl.GRPOConfig`, whose constructor is its schema."""

    name: str = "${model.name}"  # the experiment: outputs/<name>/<date_time>
    seed: int = 0  # of the rollouts' draws and of the trainer
    resume: str | None = None  # a run directory to go on with
    output_dir: str | None = None  # the run directory; None: outputs/<name>/<date_time>
    model: ModelConfig = field(default_factory=ModelConfig)
    env: dict[str, EnvConfig] = field(default_factory=dict)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    engine: EngineConfig = field(default_factory=EngineConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    gym: GymConfig = field(default_factory=GymConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
