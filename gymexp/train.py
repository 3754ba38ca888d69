"""Train a policy in NeMo Gym's environments.

python -m gymexp.train 'env=[sudoku,workplace]' model=qwen3_4b
python -m gymexp.train -m trainer.learning_rate=1e-6,1e-5        a sweep
python -m gymexp.train resume=outputs/<name>/<date_time>         a run that ended early
python -m gymexp.train launcher=slurm launcher.gpus=8            as a Slurm job

The arguments are Hydra overrides: group=option selects a file of conf/, key=value sets a key. --cfg job
prints the whole configuration. docs/reference.md says what each key means. A run writes to
outputs/<name>/<date_time>/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gymexp.cli.entry import hydra_main
from gymexp.config.load import load
from gymexp.record.directory import latest_run
from gymexp.sweep.launchers import LAUNCHERS


@hydra_main(config_name="train", launchers=LAUNCHERS)
def main(cfg: DictConfig) -> Any:
    config = load(cfg)
    # These imports come late, so that a mistake in the configuration is reported before they cost time.
    from gymexp.run.train import train
    from gymexp.sweep.kinds import refuse_dry_run

    refuse_dry_run(config)
    resume = latest_run(Path("outputs")) if config.resume == "latest" else config.resume
    directory = Path(resume or config.output_dir or HydraConfig.get().runtime.output_dir)
    return train(config, list(HydraConfig.get().overrides.task), directory.resolve())


if __name__ == "__main__":
    main()
