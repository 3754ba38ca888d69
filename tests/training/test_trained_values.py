"""Each rollout gets its own values of TRL's batch, for its trained tokens alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from gymexp.training.trained_values import Row, trained_of

# Three rollouts of 4, 2 and 1 tokens: the first has a turn of the environment's between, the second is masked
# as a whole, the third failed and is a placeholder.
BATCH: dict[str, Any] = {
    "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]),
    "tool_mask": torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]),
    "advantages": torch.tensor([0.12345678, -1.0, 0.0]),
}
OLD = torch.tensor([[-0.5, -7.0, -8.0, -2.00004], [-1.0, -1.0, 0.0, 0.0], [-3.0, 0.0, 0.0, 0.0]])
ROWS = [Row(4, True, True), Row(2, True, True), Row(1, False, False)]


def numbers(values: Any) -> list[float | None] | None:
    return None if values is None else [None if math.isnan(v) else round(float(v), 6) for v in values]


def test_without_log_probabilities_there_are_advantages_and_the_number_of_trained_tokens():
    first, masked, failed = trained_of(BATCH, ROWS)
    assert (first.advantage, first.num_trained) == (0.123457, 2)
    assert (masked.advantage, masked.num_trained) == (-1.0, 0)
    assert (failed.advantage, failed.num_trained) == (None, 0)
    for one in (first, masked, failed):
        assert (one.max_ratio, one.logprobs, one.ref_logprobs, one.weights) == (None, None, None, None)


def test_each_trained_token_has_its_values_and_the_others_none():
    sampling = OLD - torch.tensor([[math.log(2), 99.0, 99.0, math.log(3)]] * 3)
    more = {"old_per_token_logps": OLD, "sampling_per_token_logps": sampling, "ref_per_token_logps": OLD * 2}
    weights = torch.tensor([[1.5, 1.0, 1.0, 0.25], [1.0] * 4, [1.0] * 4])
    first, masked, failed = trained_of(BATCH | more | {"importance_sampling_ratio": weights}, ROWS)
    assert numbers(first.logprobs) == [-0.5, None, None, -2.0]
    assert numbers(first.ref_logprobs) == [-1.0, None, None, -4.0001]
    assert numbers(first.weights) == [1.5, None, None, 0.25]
    assert first.logprobs is not None and first.logprobs.dtype == np.float32
    assert first.max_ratio == 3.0, "the tokens of the environment have none"
    assert masked.logprobs is None and masked.weights is None and masked.max_ratio is None
    assert failed.logprobs is None and failed.advantage is None


def test_weights_of_whole_sequences_are_single_numbers_and_a_token_that_cannot_be_is_no_number():
    weights = torch.tensor([[1.25], [1.0], [1.0]])
    far = {"old_per_token_logps": OLD, "sampling_per_token_logps": OLD - 5_000}
    first, *_ = trained_of(BATCH | far | {"importance_sampling_ratio": weights}, ROWS)
    assert first.weights == 1.25 and first.max_ratio == pytest.approx(math.exp(700))
    one_token = {key: value[:, :1] if value.dim() == 2 else value for key, value in BATCH.items()}
    [single, *_] = trained_of(
        one_token | {"importance_sampling_ratio": weights}, [Row(1, True, True), *ROWS[1:]]
    )
    assert numbers(single.weights) == [1.25], "where a sequence has one token, the form is a token's"


def test_a_ratio_that_is_no_number_is_left_out():
    nothing = {"old_per_token_logps": torch.full_like(OLD, math.nan), "sampling_per_token_logps": OLD}
    assert trained_of(BATCH | nothing, ROWS)[0].max_ratio is None


def test_above_the_bound_only_the_numbers_of_the_rollout_are_kept():
    rows = [Row(4, True, False), *ROWS[1:]]
    first, *_ = trained_of(BATCH | {"old_per_token_logps": OLD, "sampling_per_token_logps": OLD}, rows)
    assert (first.num_trained, first.max_ratio, first.logprobs) == (2, 1.0, None)
