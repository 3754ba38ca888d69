"""Each sampling call has a seed of its own, and what is drawn with it is independent of every other call."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from conversing import TOKENIZER, build_model, converse
from hypothesis import given
from hypothesis import strategies as st
from repeats import Repeats, repeats_beyond_chance
from scripted_engine import FakeEngine, chat, gateway

from gymexp.engine.hf.engine import HFEngine
from gymexp.engine.hf.server import serve
from gymexp.rollout.draws import CallSeeds, attempt_seed, call_seed

END = "<|im_end|>"
IDS = st.lists(st.integers(0, 300_000), max_size=40)


@given(st.integers(), IDS, st.integers(0, 9))
def test_a_calls_seed_repeats_and_fits_every_engine(rollout_seed, prompt_ids, repeat):
    seed = call_seed(rollout_seed, prompt_ids, repeat)
    assert seed == call_seed(rollout_seed, list(prompt_ids), repeat)
    assert 0 <= seed < 2**31


@given(st.integers(0, 2**31), IDS)
def test_seeds_differ_by_rollout_prompt_and_repetition(rollout_seed, ids):
    others = [
        (rollout_seed + 1, ids, 0),
        (rollout_seed, [*ids, 1], 0),
        (rollout_seed, [1, *ids, 1], 0),
        (rollout_seed, ids, 1),
    ]
    assert len({call_seed(*facts) for facts in [(rollout_seed, ids, 0), *others]}) == 5


def test_seeds_are_the_same_in_every_process_and_version():
    # Pinned: a run that is resumed with another version of gymexp draws as before.
    assert call_seed(7, [1, 2, 300_000]) == 1436222052
    assert attempt_seed(7, 1) == 256014334


def test_an_attempt_after_a_failure_draws_anew_and_the_first_is_the_rollouts_own():
    assert attempt_seed(5, 0) == 5
    assert len({attempt_seed(seed, failures) for seed in range(50) for failures in range(4)}) == 200


def test_calls_of_one_rollout_with_the_same_prompt_have_seeds_of_their_own():
    seeds = CallSeeds()
    with seeds.take("a", 5, [1, 2]) as first, seeds.take("a", 5, [1, 2]) as at_once:
        pass
    with seeds.take("a", 5, [1, 2]) as later, seeds.take("a", 5, [1, 2, 3]) as longer:
        pass
    assert len({first, at_once, later, longer}) == 4
    with seeds.take("b", 5, [1, 2]) as again, seeds.take("b", 5, [1, 2]) as again_at_once:
        pass
    assert (again, again_at_once) == (first, at_once), "the same rollout, played once more"


def test_a_call_that_failed_draws_the_same_when_it_is_made_again():
    seeds = CallSeeds()
    with pytest.raises(OSError), seeds.take("a", 5, [1]) as failed:
        raise OSError
    with seeds.take("a", 5, [1]) as again:
        pass
    assert again == failed == call_seed(5, [1])


def test_a_client_that_names_no_rollout_gets_the_same_seed_for_the_same_request():
    seeds = CallSeeds()
    with seeds.take(None, 5, [1]) as first, seeds.take(None, 5, [1]) as second:
        assert first == second


def test_what_is_remembered_of_prompts_is_bounded():
    seeds = CallSeeds(capacity=3)
    for number in range(10):
        with seeds.take("a", 5, [number]):
            pass
    assert len(seeds._taken) == 3


def sent_seeds(num_turns: int, seed: int, play: str | None = "p") -> list[int]:
    """What a new gateway gives the engine for the turns of one conversation."""

    async def converse() -> list[int]:
        engine = FakeEngine(*(["Grid" + END] * num_turns))
        async with engine.serve() as url, gateway(url) as http:
            messages = [{"role": "user", "content": "Look."}]
            for _ in range(num_turns):
                status, answer = await chat(http, messages, seed=seed, play=play)
                assert status == 200, answer
                messages = [*messages, answer["choices"][0]["message"], {"role": "user", "content": "On."}]
        return [request["sampling_params"]["seed"] for request in engine.requests]

    return asyncio.run(converse())


def test_every_turn_of_a_rollout_is_sampled_with_a_seed_of_its_own_and_the_same_after_a_restart():
    seeds = sent_seeds(6, seed=11)
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sent_seeds(6, seed=11, play="played again") == seeds
    assert not set(sent_seeds(6, seed=12)) & set(seeds)


@pytest.fixture(scope="module")
def model():
    return build_model()


def sample(model, seeds: dict[str, int]) -> dict[str, list[dict]]:
    """name -> the sampled turns of a rollout with that seed, through the gateway and the hf engine."""
    engine = HFEngine(model, eos_token_ids=[], pad_token_id=0, tokenizer=TOKENIZER)
    server = serve(engine)

    async def run() -> list[list[dict]]:
        async with gateway(server.url) as http:
            plays = [converse(http, i, seed, name) for i, (name, seed) in enumerate(seeds.items())]
            return await asyncio.gather(*plays)

    try:
        return dict(zip(seeds, asyncio.run(run()), strict=True))
    finally:
        server.close()
        engine.close()


def test_turns_group_members_attempts_and_steps_draw_independently_of_each_other(model):
    # Seven prompts, as many groups; twenty members each. Attempts and steps differ by their rollout's seed.
    from gymexp.training.rollout_func import seed_of

    seeds: dict[str, int] = {}
    for number in range(140):
        key, index = f"e/train/{number % 7}", number // 7
        seed = seed_of(3, 1, key, index)
        if index == 19:
            seed = seed_of(3, 2, key, 18)  # the same place of the group, a step later
        elif index == 17:
            seed = attempt_seed(seed_of(3, 1, key, 16), 1)  # another attempt at the member before
        seeds[f"{number}"] = seed
    played = list(sample(model, seeds).values())
    turns = Repeats()
    for rollout in played:
        for before, after in pairwise(rollout):
            turns += repeats_beyond_chance(model, after, before["generation_token_ids"])
    members = Repeats()
    for i, rollout in enumerate(played[7:]):
        members += repeats_beyond_chance(model, rollout[0], played[i][0]["generation_token_ids"])
    assert turns.positions > 1500 and members.positions > 900
    for repeats in (turns, members):
        assert repeats.variance > 25, "enough that a shared seed would show"
        assert abs(repeats.z) < 4, repeats


def test_a_seed_shared_by_turns_or_members_would_show(model, monkeypatch):
    monkeypatch.setattr("gymexp.rollout.draws.call_seed", lambda seed, *_: seed)
    played = list(sample(model, {str(number): number % 28 // 7 for number in range(56)}).values())
    turns, members = Repeats(), Repeats()
    for rollout in played:
        turns += repeats_beyond_chance(model, rollout[1], rollout[0]["generation_token_ids"])
    for i, rollout in enumerate(played[28:]):
        members += repeats_beyond_chance(model, rollout[0], played[i][0]["generation_token_ids"])
    assert turns.z > 10 and members.z > 10, (turns, members)


def test_the_same_rollout_played_again_draws_the_same_tokens(model):
    seeds = {"first": 5, "second": 9}
    again = {f"{name} again": seed for name, seed in seeds.items()}
    ids = [
        [message["generation_token_ids"] for message in rollout]
        for played in (sample(model, seeds), sample(model, again))
        for rollout in played.values()
    ]
    assert ids[:2] == ids[2:] and ids[0] != ids[1]
    assert max(Counter(map(tuple, ids[0])).values()) == 1, "no turn repeats another"


def test_the_count_of_repeats_is_that_of_independent_draws():
    """Repeats.z of draws that are independent by construction is standard normal."""
    generator = torch.Generator().manual_seed(1)
    zs = []
    for _ in range(200):
        repeats = Repeats()
        probabilities = torch.rand(60, 12, generator=generator).pow(4)
        probabilities /= probabilities.sum(1, keepdim=True)
        first = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        second = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        chance = probabilities.gather(1, first[:, None])[:, 0]
        seen, variance = int((first == second).sum()), (chance * (1 - chance)).sum().item()
        repeats += Repeats(60, seen, chance.sum().item(), variance)
        zs.append(repeats.z)
    assert abs(sum(zs) / 200) < 3 / math.sqrt(200)
    assert 0.8 < sum(z * z for z in zs) / 200 < 1.25
