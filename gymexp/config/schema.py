"""The schema of a run: dataclasses with the type, default and meaning of each key.

`conf/` contains only values that differ from these defaults. `config.load.load(cfg)` turns Hydra's composed
config into a checked `RunConfig`. This module does not import torch, transformers or TRL, so that a mistake
is answered in about a second. `trainer.*` is TRL's own: `gymexp.training.arguments` checks it against
`trl.GRPOConfig` before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class LoraConfig:
    """An adapter that is trained in place of the model's own weights. The names are peft.LoraConfig's."""

    r: int | None = None  # rank of the adapter; None: no adapter, all weights are trained
    lora_alpha: int = 32  # the adapter's output is scaled by lora_alpha / r
    # dropout of the adapter; the engine samples without it, so a value above 0 makes the ratios of trainer to
    # engine noisy
    lora_dropout: float = 0.0
    # all-linear: all linear layers but the output head; or a list of names, e.g. [q_proj,v_proj]; or a regex
    target_modules: Any = "all-linear"
    # what a vLLM server gets of the adapter. merged: all weights, with the adapter merged into them in
    # model.dtype; adapter: the adapter alone, which vLLM adds to the model's own weights as it samples
    sync: str = "merged"


@dataclass
class ModelConfig:
    """The policy: any transformers causal language model whose tokenizer has a chat template."""

    name: str = MISSING  # the model's name in reports and run directories
    path: str = MISSING  # a hub id, or a directory; a relative directory starts at the project's root
    # branch, tag or commit of a hub id; None: main; a run stays on the commit that it began with
    revision: str | None = None
    # float32, bfloat16 or float16: the type of the trainer's arithmetic and of the engine's weights
    dtype: str = "bfloat16"
    # how transformers computes attention: any implementation that supports training
    attn_implementation: str = "sdpa"
    # how the trainer lays out the rollouts of a micro-batch. none: padded rows; varlen: one row without
    # padding; tree: one row without padding, in which rollouts of the same prompt share its tokens; auto:
    # tree on GPUs and for models that it was compared on, else none
    packing: str = "auto"
    max_model_len: int = 4096  # limit on the tokens of a rollout: prompt and generations of all turns
    # variables of the chat template, e.g. {enable_thinking: false}
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class DataConfig:
    """Where an environment's tasks come from. `train_size` and `validation_size` are exact numbers with
    `source=generate`, and upper limits with the other sources."""

    # generate, huggingface, jsonl, or nemo_gym: the data sets that the environment's NeMo Gym file names
    source: str = MISSING
    generator: str | None = None  # source=generate: the generator, reasoning_gym or workplace
    options: dict[str, Any] = field(default_factory=dict)  # options of the generator, e.g. task, difficulty
    repo_id: str | None = None  # source=huggingface: the dataset to download
    revision: str = "main"  # source=huggingface: branch, tag or commit of the dataset
    train_file: str | None = None  # file of training tasks: in the dataset, or on disk with `source=jsonl`
    validation_file: str | None = None  # file of held-out tasks: in the dataset, or on disk
    train_size: int | None = None  # number of training tasks; None: all tasks of the file
    train_seed: int = 42  # generator seed of reasoning_gym's training tasks, and of all tasks of workplace
    validation_size: int | None = None  # number of held-out tasks; None: all tasks of the file
    # generator seed of reasoning_gym's held-out tasks; with validation_share the seed of the split
    validation_seed: int = 24
    # share of the training tasks that are held out instead of a validation file, e.g. 0.1; not for
    # source=generate. Rows with the same prompt stay together
    validation_share: float | None = None
    # a template of NeMo Gym's (YAML with `user` and `system`) that makes the prompt of rows without one from
    # their fields, e.g. user: "{question}"; None: that of the data set, if NeMo Gym's file names one
    prompt_config: str | None = None


@dataclass
class JudgeConfig:
    """A model that judges the policy's replies, where the environment's servers ask for one. It has OpenAI's
    chat completions."""

    url: str | None = None  # its address up to and with /v1, e.g. https://api.openai.com/v1; None: no judge
    model: str | None = None  # the server's name of the model
    key_env: str | None = None  # name of the environment variable that has the server's key; None: no key


@dataclass
class EnvConfig:
    """One environment: a NeMo Gym agent with its resources server, defined by a YAML file of NeMo Gym's."""

    config_path: str = MISSING  # NeMo Gym's YAML file, in the form that NeMo Gym's `config_paths` accepts
    agent: str = MISSING  # the agent's name in the YAML file, which a row names in agent_ref
    max_steps: int | None = None  # limit on the model turns of a rollout; None: the agent's own limit
    weight: float = 1.0  # share of the training tasks, relative to the other environments
    # instances of the resources server and of the agent; rollouts are spread over them; auto: as many as the
    # slowest environment needs, measured while the run goes on, within the cores and the memory
    replicas: Any = 1
    # limit on the rollouts in flight; None: 64, or fewer if the limit on open files requires it
    max_concurrency: int | None = None
    timeout_s: float = 600.0  # a rollout that takes longer counts as failed
    max_output_tokens: int = 1024  # limit on the tokens of one model turn
    # gym.runtime=managed: a resources server that uses more memory is restarted
    memory_budget_mb: float | None = None
    success_reward: float = 1.0  # a reward of at least this value counts as success
    # gym.runtime=managed: the reward of a rollout in which a server answers 400 or 422 to the policy's output
    refused_reward: float = 0.0
    # the environment whose keys this one begins with: a file of env/ or one of NeMo Gym's. It needs no place
    # in env=[…], e.g. env.countdown.like=sudoku env.countdown.data.options.task=countdown
    like: str | None = None
    # the system message of every task, in place of the row's own; None: the row's
    system_prompt: str | None = None
    # gym.runtime=managed: the judge, in place of every model that the environment's resources servers ask
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    # gym.runtime=managed: keys of the environment's servers by their names in NeMo Gym's file, e.g.
    # {mcqa: {grading_mode: lenient_boxed}}; {key_env: NAME} as a value stands for that environment variable
    servers: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)


@dataclass
class DatasetConfig:
    """How the selected environments' tasks become one training set. Each epoch plays it in another order.
    With `schedule`, or with `sampling=difficulty`, each environment has epochs of its own."""

    # tasks in an epoch; None: as many as the weights allow without repeating a task
    train_size: int | None = None
    validation_size: int | None = None  # held-out tasks of each environment; None: all
    # interleave: every batch contains the environments in proportion to their weights; or shuffle
    order: str = "interleave"
    seed: int = 0  # seed of the order of the tasks, in every epoch
    # weights of the environments by steps done, e.g. {0: {sudoku: 1, workplace: 0}, 100: {sudoku: 1,
    # workplace: 1}}: linear between two steps, as at the last one after it; {}: env.<name>.weight
    schedule: dict[Any, Any] = field(default_factory=dict)
    # uniform: every task once an epoch; difficulty: a task whose group had equal rewards, as it is always or
    # never solved, rests, each time for twice as many epochs, and comes back
    sampling: str = "uniform"


@dataclass
class EngineConfig:
    """The engine, which samples tokens from the policy."""

    # vllm: `vllm serve`; hf: transformers, in the trainer's process unless overlap or several nodes ask for
    # servers; auto: vllm if vLLM and a GPU are present
    kind: str = "auto"
    max_batch_size: int = 64  # hf: rows decoded at once
    python: str | None = None  # vllm: the Python interpreter that has vLLM; None: the running one
    tensor_parallel_size: int = 1  # vllm: GPUs of one replica
    args: dict[str, Any] = field(default_factory=dict)  # vllm: more flags of `vllm serve`, as Python names
    urls: list[str] = field(default_factory=list)  # vllm: addresses of running servers; none is started then
    # vllm: whether every GPU samples and trains, in turn; a single GPU always does. auto: two short runs
    # before the first step show whether that is faster than with GPUs apart
    colocate: Any = False
    # vllm: how weights reach the engine: nccl, ipc or disk; auto: the fastest way that the GPUs allow
    weights: str = "auto"
    start_timeout_s: float = 900.0  # vllm: limit on the time from start to the first answered health check


@dataclass
class PlacementConfig:
    """Which hardware samples and which trains: GPUs of one node, in the order of CUDA_VISIBLE_DEVICES, or
    whole nodes of a Slurm job. Those that sample come first; the first node also runs NeMo Gym's servers."""

    rollout_gpus: int | None = None  # GPUs that sample; None: half of them; a single GPU samples and trains
    train_gpus: int | None = None  # GPUs that train; None: all others
    rollout_nodes: int | None = None  # nodes that sample; None: one node does everything
    train_nodes: int = 1  # nodes that train, in addition to the rollout nodes


@dataclass
class GymConfig:
    """NeMo Gym's servers."""

    # managed: gymexp starts the servers; cli: `gym env start` starts them; attach: they already run
    runtime: str = "managed"
    version: str = "0.4.0"  # version of the nemo-gym package in gymexp's own venv
    # a Python interpreter that already has nemo_gym; None: gymexp makes and keeps a venv
    python: str | None = None
    checkout: str | None = None  # runtime=cli: the user's own NeMo Gym checkout (with its .venv)
    head_host: str = "127.0.0.1"  # runtime=attach: the host of the running head server
    head_port: int = 11000  # runtime=attach: the port of the running head server
    policy_port: int | None = None  # runtime=attach: the port at which the servers expect the policy endpoint
    # gym.runtime=managed: instances of NeMo Gym's model server, each with a gateway of its own, which are the
    # processes that every request passes; an environment's replicas are spread over them
    model_servers: int = 1
    # limit on the time from the start of a server to its first answered health check
    start_timeout_s: float = 180.0
    health_interval_s: float = 5.0  # time between two health checks of a server
    # a server that answers no health check for this time is killed and restarted
    health_timeout_s: float = 60.0
    max_restarts: int = 5  # restarts of one server; one more failure ends the run


@dataclass
class RolloutConfig:
    """From tasks to outcomes."""

    max_retries: int = 2  # retries of a rollout that failed
    max_failed_share: float = 0.2  # the run ends if a larger share of a batch's rollouts fails
    # leave out groups whose rewards are all equal, which teach nothing, and play further tasks instead
    dynamic_sampling: bool = False
    # dynamic_sampling: the run ends if more groups than in this number of batches are left out in a row
    max_resampled: int = 10
    # scored: truncated rollouts train with the environment's reward; masked: they give no gradient
    truncated: str = "scored"
    # how the loss treats the difference between engine and trainer. behavior: PPO's ratio is the trainer's
    # probability over the engine's, so its clip bounds the distance from what sampled; decoupled: TRL's
    # importance weights, which need one more pass; none: neither. auto: behavior, but decoupled for ratios of
    # whole rollouts in 16 bits (trainer=gspo), and where trainer.vllm_importance_sampling_* is set
    correction: str = "auto"
    drift_every: int = 20  # optimizer steps between two checks of draws (with dropout: also of drift)
    # bound on the mean absolute difference of the trainer's and the engine's log-probabilities (nats); the
    # run ends if any environment exceeds it; None: 0.001 in float32, 0.02 in bfloat16 and float16
    max_drift: float | None = None


@dataclass
class OverlapConfig:
    """Rollouts of later steps are played while the trainer trains. A rollout's tokens are then sampled with
    older weights than those that it trains."""

    # optimizer steps between the weights that sampled a rollout's oldest token and those that train it, at
    # most; 0: the engine samples and the trainer trains in turn
    max_staleness: int = 0
    # batches that are played ahead as a rule; rollouts that take longer may take up to max_staleness steps
    lead: int = 1
    # finished: a batch has the oldest groups that have ended; exact: the tasks in order, with
    # lead=max_staleness
    order: str = "finished"
    # what happens to requests in flight when the engine gets new weights: abort: they are cut, and go on with
    # the new weights; wait: they end first
    update: str = "abort"


@dataclass
class EvaluationConfig:
    """Evaluation: the current policy plays the held-out tasks. Tokens may be drawn from another distribution
    than in training; the names of these keys are vLLM's."""

    every_steps: int = 0  # optimizer steps between two evaluations; 0: only before and after training
    before: bool = True  # play the held-out tasks before training
    after: bool = True  # play the held-out tasks after training
    temperature: float | None = None  # None: as in training; 0: always the likeliest token
    top_p: float = 1.0  # draw from the likeliest tokens that together have this share of the probability
    top_k: int = 0  # draw from this number of the likeliest tokens; 0: from all
    min_p: float = 0.0  # draw from tokens at least this fraction as probable as the likeliest token
    # a value above 1 makes tokens less likely that the prompt or the generation already contains
    repetition_penalty: float = 1.0
    num_tasks: int | None = None  # held-out tasks played of each environment; None: all


@dataclass
class CheckpointConfig:
    """Which checkpoints are kept. `trainer.save_steps` sets when a checkpoint is written. Once it is
    complete, gymexp deletes the checkpoints that none of these keys keeps. The newest is always kept, as a
    resumed run starts from it."""

    keep_last: int | None = None  # number of newest checkpoints to keep; None: all
    # number of checkpoints to keep in addition, by the highest held-out reward (the mean over environments)
    keep_best: int = 0
    keep_every: int | None = None  # keep in addition each checkpoint whose step is a multiple of this number


@dataclass
class TrackerConfig:
    """Where metrics are logged in addition to `metrics.jsonl`."""

    kind: str = "none"  # none, wandb, trackio, mlflow or tensorboard
    project: str = "gymexp"  # the project's name at the tracker; mlflow: the experiment's
    mode: str | None = None  # wandb: online, offline or disabled; None: wandb's own default
    # rollouts sent at each evaluation, and to trackio also at each step; 0: none; tensorboard gets none
    rollouts: int = 16


@dataclass
class LauncherConfig:
    """The Slurm job of a run (launcher=slurm). The names are sbatch's. Further flags of sbatch are set by
    `hydra.launcher.additional_parameters.<flag>=…`."""

    partition: str | None = None  # partition of the job; None: Slurm's default
    account: str | None = None  # account that the job is charged to; None: Slurm's default
    qos: str | None = None  # quality of service; None: Slurm's default
    # time limit, in minutes or in a format of sbatch's; at the limit the run saves a checkpoint, its job
    # waits in the queue again, and the run goes on
    time: str = "1-00:00:00"
    signal_s: int = 120  # seconds before the time limit at which Slurm signals the run to save
    gpus: int | None = None  # GPUs on each node
    cpus: int | None = None  # CPU cores on each node
    mem: str | None = None  # memory on each node, e.g. 200G
    array_parallelism: int = 256  # jobs of a sweep that run at once
    container: str | None = None  # container image, for Slurm with pyxis (srun --container-image)
    container_mounts: list[str] = field(default_factory=list)  # mounts beside those that the run needs
    mail: str | None = None  # an address that gets a mail when a job ends
    setup: list[str] = field(default_factory=list)  # shell commands before the run, e.g. module load cuda
    dry_run: bool = False  # print what would be submitted, and submit nothing


@dataclass
class SearchConfig:
    """An Optuna study that the jobs of a sweep share. Each job is a trial and gets its values from the study
    when it starts. Example: sweeps/search_lr.yaml."""

    num_trials: int = 0  # number of trials, which is the number of the sweep's jobs
    # number of a job's trial; a sweep file sets it by `search.trial: range(${search.num_trials})`
    trial: int | None = None
    # the keys to search, nested as in the configuration; each is a list of choices or {low, high, log, step}
    params: dict[str, Any] = field(default_factory=dict)
    # held-out metric to optimize: of one environment (sudoku/success), or the mean over all that have it
    metric: str = "reward"
    direction: str = "maximize"  # maximize or minimize
    seed: int = 0  # seed of Optuna's sampler
    prune: bool = False  # end a trial that is worse than the median of the finished trials at the same step
    startup_trials: int = 4  # prune: number of trials that must finish before any is pruned
    warmup_steps: int = 0  # prune: steps before a trial can be pruned


@dataclass
class RunConfig:
    """One run. `trainer` is passed to `trl.GRPOConfig`, whose constructor is its schema."""

    name: str = "${model.name}"  # the experiment's name, a part of outputs/<name>/<date_time>
    seed: int = 0  # seed of the rollouts' draws and of the trainer
    resume: str | None = None  # the directory of a run to resume, or latest
    output_dir: str | None = None  # the run directory; None: outputs/<name>/<date_time>
    model: ModelConfig = field(default_factory=ModelConfig)
    env: dict[str, EnvConfig] = field(default_factory=dict)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    engine: EngineConfig = field(default_factory=EngineConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    gym: GymConfig = field(default_factory=GymConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
