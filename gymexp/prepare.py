"""Make and check the tasks of the selected environments, as a run would; nothing is left but the cache.

python -m gymexp.prepare 'env=[sudoku,workplace]'

Words are the overrides of gymexp.train.
"""

from __future__ import annotations

import sys
import time

from omegaconf import DictConfig

from gymexp.cli.entry import hydra_main
from gymexp.config.load import load
from gymexp.data.prepare import prepare
from gymexp.gym.install import ensure_python
from gymexp.printable import say
from gymexp.record.places import cache_dir

# Hydra's own run directory and log file; a command line that says otherwise comes later and wins.
_NOTHING_LEFT = [
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
    python = ensure_python(config.gym, [env.config_path for env in config.env.values()], cache, say)
    prepared = prepare(config, python, cache, say)
    mix = prepared.summary
    for name, made in mix["envs"].items():
        say(f"{name} ({made['source']}, weight {made['weight']:g})")
        for split, rows in {"train": made["available"], "validation": made["validation_tasks"]}.items():
            sha256, file = made[f"{split}_sha256"][:12], made[f"{split}_file"]
            say(f"  {split:<10} {rows:>6} rows  sha256 {sha256}  {file}")
    parts = ", ".join(
        f"{name} {made['in_epoch']} ({made['share']:.0%})" for name, made in mix["envs"].items()
    )
    say(f"training set: {mix['size']} tasks an epoch: {parts}")
    say(f"order: {mix['order']}, seed {mix['seed']}, sha256 {mix['sha256'][:12]}")
    say(f"prepared in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    if not {"-sc", "--shell-completion"} & set(sys.argv):
        sys.argv[1:1] = _NOTHING_LEFT
    main()
