"""Cold start a policy by supervised training on demonstrations of the selected environments.

python -m gymexp.coldstart 'env=[workplace]' env.workplace.data.source=generate output=outputs/cold
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import orjson
from omegaconf import DictConfig

from gymexp.cli.entry import hydra_main
from gymexp.coldstart import sft
from gymexp.policy import hub_snapshot
from gymexp.processes.launcher_variables import forget_launchers, remarks

log = logging.getLogger(__name__)

sft.register()


@hydra_main(config_name="coldstart", schema=sft.ColdstartConfig)
def main(cfg: DictConfig) -> None:
    config = sft.load(cfg)
    for remark in remarks():
        log.info("%s", remark)
    forget_launchers()  # this process trains alone, whatever a launcher's variables say
    start = time.perf_counter()
    conversations = gather(config)
    sha256 = hashlib.sha256(b"\n".join(orjson.dumps(c) for c in conversations)).hexdigest()
    log.info("%d demonstrations, sha256 %s", len(conversations), sha256)

    if config.from_scratch:
        from gymexp.coldstart.tiny import build_model, build_tokenizer, render

        tokenizer = build_tokenizer([render(c["messages"], c["tools"]) for c in conversations[:2000]])
        model = build_model(tokenizer, config.sft.seed, config.shape)
    else:
        from gymexp.policy.model import load_model, load_tokenizer

        pinned = hub_snapshot.pin(config.model, log.info)
        tokenizer, model = load_tokenizer(pinned), load_model(pinned)
    examples = sft.tokenize(conversations, tokenizer, config.sft.max_length)
    losses = sft.train(model, tokenizer, examples, config.sft, Path(config.output))
    if losses:  # empty if the training has fewer steps than sft.logging_steps
        log.info("loss %.3f -> %.3f", losses[0]["loss"], losses[-1]["loss"])
    log.info("%s written in %.0f s", config.output, time.perf_counter() - start)


def gather(config: sft.ColdstartConfig) -> list[Any]:
    """Returns the demonstrations of all environments, mixed by `env.<name>.weight`."""
    from gymexp.coldstart.demonstrations import demonstrations
    from gymexp.data.mix import mix
    from gymexp.data.prepare import needs_gym_python
    from gymexp.data.sources import fetch
    from gymexp.gym.definitions import ensure_environments
    from gymexp.record.places import cache_dir

    python = None
    if needs_gym_python(config.env):
        python = ensure_environments(config.gym, config.env, cache_dir(), log.info)
    available: dict[str, list[Any]] = {
        name: list(demonstrations(name, env, fetch(name, env, python, cache_dir(), log.info)))
        for name, env in config.env.items()
    }
    weights = {name: env.weight for name, env in config.env.items()}
    return mix(available, weights, config.num_demonstrations, "interleave", config.sft.seed)


if __name__ == "__main__":
    main()
