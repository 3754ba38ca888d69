"""Make and check the tasks of the selected environments, as a run would. Only the cache is written.

python -m gymexp.prepare 'env=[sudoku,workplace]'

The arguments are the overrides of gymexp.train.
"""

from __future__ import annotations

import sys
import time

from omegaconf import DictConfig

from gymexp.cli.entry import hydra_main
from gymexp.config.load import load
from gymexp.data.prepare import prepare
from gymexp.gym.definitions import ensure_environments
from gymexp.printable import say
from gymexp.record.places import cache_dir

# Hydra makes no run directory and no log file; an override on the command line comes later and wins.
_NO_HYDRA_OUTPUT = [
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
]


@hydra_main(config_name="train")
def main(cfg: DictConfig) -> None:
    start = time.perf_counter()
    config = load(cfg)
    cache = cache_dir()
    python = ensure_environments(config.gym, config.env, cache, say)
    prepared = prepare(config, python, cache, say)
    mix = prepared.summary
    for name, env in mix["envs"].items():
        say(f"{name} ({env['source']}, weight {env['weight']:g})")
        for split, rows in {"train": env["available"], "validation": env["validation_tasks"]}.items():
            sha256, file = env[f"{split}_sha256"][:12], env[f"{split}_file"]
            say(f"  {split:<10} {rows:>6} rows  sha256 {sha256}  {file}")
    parts = ", ".join(f"{name} {env['in_epoch']} ({env['share']:.0%})" for name, env in mix["envs"].items())
    say(f"training set: {mix['size']} tasks an epoch: {parts}")
    say(f"order: {mix['order']}, seed {mix['seed']}, sha256 {mix['sha256'][:12]}")
    say(f"prepared in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    if not {"-sc", "--shell-completion"} & set(sys.argv):
        sys.argv[1:1] = _NO_HYDRA_OUTPUT
    main()
