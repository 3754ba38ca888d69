"""An engine that is sent new weights while it samples: what it sampled, and with which weights."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import torch
from repeats import Repeats, repeats_beyond_chance
from scripted_engine import TOKENIZER, chat, serve

from gymexp.engine.admission import Admission
from gymexp.engine.replicas import Replicas
from gymexp.engine.weight_sync import WeightSync
from gymexp.engine.weight_transfer import DiskTransfer
from gymexp.gateway.server import GatewayConfig, build_app
from gymexp.rollout.attempts import turn_key

MAX_MODEL_LEN = 512
NUM = 24


@dataclass
class Sampled:
    """A turn, and its pieces, each with the version of its weights."""

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    pieces: list[tuple[int, list[int]]]


def versions_of(model: Any, count: int) -> list[Any]:
    """The policy at each version: its own, then such that its log-probabilities differ."""
    models = [model]
    for _ in range(count - 1):
        models.append(copy.deepcopy(models[-1]))
        with torch.no_grad():
            for parameter in models[-1].parameters():
                parameter *= 1.05
    return models


def sample_over_updates(
    url: str,
    models: Sequence[Any],
    directory: Path,
    count_tokens: Callable[[], int],
    num_tokens: int,
    on_cpu: bool = False,
) -> list[Sampled]:
    """NUM turns, while the engine at `url` is sent the weights of one model after the other, and in the end
    of the first one again. count_tokens: of all that the engine has sampled. num_tokens: of each turn.
    on_cpu: whether the engine is vLLM.
    """

    async def run() -> list[Sampled]:
        config = GatewayConfig((url,), max_model_len=MAX_MODEL_LEN, engine_timeout_s=300.0, hold=True)
        async with serve(build_app(config, TOKENIZER)) as at, aiohttp.ClientSession(at) as http:
            replicas, transfer = Replicas([url], on_cpu=on_cpu), DiskTransfer(directory / "weights")
            sync = await asyncio.to_thread(
                WeightSync, replicas, transfer, Admission([at], None, 60.0), directory / "again"
            )
            asked = [
                asyncio.create_task(
                    chat(
                        http,
                        [{"role": "user", "content": f"Puzzle {i}."}],
                        seed=i,
                        play=f"{i}",
                        max_tokens=num_tokens,
                    )
                )
                for i in range(NUM)
            ]
            for version, model in enumerate(models[1:], start=1):
                begun = await asyncio.to_thread(count_tokens)
                while await asyncio.to_thread(count_tokens) < begun + 15 * NUM:
                    assert not all(one.done() for one in asked), "too few tokens for an update within them"
                    await asyncio.sleep(0.005)
                await asyncio.to_thread(sync.update, version, [], iter(model.named_parameters()))
            answers = await asyncio.gather(*asked)
            async with http.post("/attempts", json={"plays": [f"{i}" for i in range(NUM)]}) as response:
                attempts = (await response.json())["attempts"]
            await asyncio.to_thread(sync.update, 99, [], iter(models[0].named_parameters()))
            return [read(*pair) for pair in zip(answers, attempts, strict=True)]

    return asyncio.run(run())


def task(number: int) -> list[dict]:
    return [{"role": "user", "content": f"Puzzle {number}."}]


def read(answer: tuple[int, dict], attempt: dict) -> Sampled:
    assert answer[0] == 200, answer
    message = answer[1]["choices"][0]["message"]
    prompt, ids = message["prompt_token_ids"], message["generation_token_ids"]
    pieces, start = [], 0
    for version, count in attempt["versions"][turn_key(prompt, ids)]:
        pieces.append((version, ids[start : start + count]))
        start += count
    assert start == len(ids)
    return Sampled(prompt, ids, message["generation_log_probs"], pieces)


def repeats_of_pieces(models: Sequence[Any], turns: Sequence[Sampled]) -> Repeats:
    """How often pieces repeat the draws of the piece before."""
    total = Repeats()
    for turn in turns:
        start = 0
        for (_, before), (version, ids) in pairwise(turn.pieces):
            start += len(before)
            piece = {"prompt_token_ids": turn.prompt_ids + turn.ids[:start], "generation_token_ids": ids}
            total += repeats_beyond_chance(models[version], piece, before)
    return total


def check(models: Sequence[Any], turns: Sequence[Sampled], tolerance: float) -> None:
    """Asserts that every token has the log-probability that the weights of its version give it, and no other
    weights do; and that several turns were cut."""
    assert sum(len(turn.pieces) > 1 for turn in turns) > NUM / 2
    errors, others = [], []
    for turn in turns:
        versions = [version for version, ids in turn.pieces for _ in ids]
        ids = torch.tensor([turn.prompt_ids + turn.ids])
        sampled = ids[0, len(turn.prompt_ids) :, None]
        with torch.no_grad():
            logits = [model(input_ids=ids).logits[0, len(turn.prompt_ids) - 1 : -1] for model in models]
        chosen = torch.stack([one.float().log_softmax(-1).gather(1, sampled)[:, 0] for one in logits])
        off = (chosen - torch.tensor(turn.logprobs)).abs()
        for position, version in enumerate(versions):
            errors.append(off[version, position].item())
            others += [off[v, position].item() for v in range(len(models)) if v != version]
    assert max(errors) < tolerance, max(errors)
    assert sum(others) / len(others) > 20 * tolerance, "else any weights would do"
