"""Evaluate a policy in NeMo Gym's environments, or compare evaluations.

python -m gymexp.evaluate 'env=[sudoku,workplace]' model=qwen3_4b           a model
python -m gymexp.evaluate run=outputs/<name>/<date_time> checkpoints=all    what a run has trained
python -m gymexp.evaluate checkpoint=outputs/<name>/<date_time>/checkpoints/checkpoint-16
python -m gymexp.evaluate 'env=[sudoku]' endpoint.url=https://…/v1 endpoint.model=…
python -m gymexp.evaluate 'env=[sudoku]' policy=probe                       what a grader pays for nothing
python -m gymexp.evaluate resume=outputs/eval/<name>/<date_time>            one that ended early
python -m gymexp.evaluate 'compare=[outputs/eval/a/…,outputs/eval/b/…]'     plays nothing
python -m gymexp.evaluate launcher=slurm launcher.gpus=2 run=outputs/…      as a Slurm job
python -m gymexp.evaluate -m run=outputs/a/…,outputs/b/…                    one evaluation for each

The arguments are Hydra overrides: group=option selects a file of conf/, key=value sets a key.
docs/guides/evaluate.md explains them. An evaluation writes to outputs/eval/<name>/<date_time>/.
"""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gymexp.cli.entry import hydra_main
from gymexp.config.evaluate_load import load_evaluation, refuse_launcher_keys, register
from gymexp.config.evaluate_schema import EvaluateConfig
from gymexp.errors import ConfigError
from gymexp.sweep.launchers import EVALUATION_LAUNCHERS

register()


@hydra_main(config_name="evaluate", schema=EvaluateConfig, launchers=EVALUATION_LAUNCHERS)
def main(cfg: DictConfig) -> None:
    hydra = HydraConfig.get()
    if own := [override for override in hydra.overrides.hydra if "run.dir" in override]:
        raise ConfigError(f"{own[0]} must be left out: output_dir=… says where an evaluation is")
    overrides = list(hydra.overrides.task)
    config = load_evaluation(cfg, overrides)
    refuse_launcher_keys(overrides)
    # These imports come late, so that a mistake in the configuration is reported before they cost time.
    if config.compare:
        from gymexp.evaluation.compare import compare
        from gymexp.printable import say

        say(compare(config.compare))
        return
    from gymexp.run.evaluate import evaluate

    evaluate(config, cfg, overrides)


if __name__ == "__main__":
    main()
