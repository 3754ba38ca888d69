"""Rows without padding: a micro-batch becomes one row of tokens, in which each rollout attends to its own
tokens alone (`model.packing`).

With `tree`, rollouts of the same prompt share its tokens. Only its last token is repeated for each of them,
because it predicts the first token of each completion.

The log-probabilities are put back at their places in (B, T), so the loss does not know of the packing.
Attention is the one computation in which tokens meet. It is exact: by FlashAttention's kernel for sequences
of different lengths on a GPU in 16 bits, otherwise with an explicit mask. transformers calls `_attend` by the
name of the attention implementation. It passes on the keyword argument that says where the segments are, also
when gradient checkpointing computes a layer again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gymexp.training.padding import regroup

_ATTENTION = "gymexp_packed"


@dataclass(frozen=True)
class Segments:
    """Which of N tokens attend to which: the tokens of a segment attend to its keys, causally, so that its
    last token attends to all of them.

    num_queries, num_keys: of each segment; the segments follow each other. keys: the place of each segment's
    keys among the N tokens; None if these are the segment's own tokens.
    """

    num_queries: tuple[int, ...]
    num_keys: tuple[int, ...]
    keys: torch.Tensor | None
    device: torch.device

    @cached_property
    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The cumulative numbers of queries and of keys, which begin with 0."""
        both = ([0, *self.num_queries], [0, *self.num_keys])
        of_queries, of_keys = (torch.tensor(n).cumsum(0).to(self.device, torch.int32) for n in both)
        return of_queries, of_keys

    @cached_property
    def mask(self) -> torch.Tensor:
        """(N, N): True where a token attends to another one."""
        total = sum(self.num_queries)
        mask = torch.zeros(total, total, dtype=torch.bool)
        keys = torch.arange(total) if self.keys is None else self.keys.cpu()
        query = key = 0
        for queries, of in zip(self.num_queries, self.num_keys, strict=True):
            causal = torch.ones(queries, of, dtype=torch.bool).tril(of - queries)
            mask[query : query + queries, keys[key : key + of]] = causal
            query, key = query + queries, key + of
        return mask.to(self.device)


@dataclass(frozen=True)
class Pack:
    """A micro-batch as one row of N tokens.

    labels (N): the token that each one predicts, -100 where no log-probability is needed. rows, columns: the
    place in (B, T) of each prediction, in the order of the labels that are not -100.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    segments: Segments
    rows: torch.Tensor
    columns: torch.Tensor


def prepare(model: Any) -> None:
    """Lets a transformers model attend in packs. Rows with padding are computed as before."""
    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.config.get_text_config()._attn_implementation = _ATTENTION


def score(
    forward: Callable[..., Any],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_completion: int,
    shares_prompts: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns log-probabilities and entropies (B, T) of the completions; 0 for padding.

    forward: a model with TRL's fused head. input_ids, attention_mask: (B, P + T), with T = num_completion;
    prompts are left-padded, completions right-padded.
    """
    pack = build_pack(input_ids, attention_mask, num_completion, shares_prompts)
    output = forward(
        input_ids=pack.ids[None],
        position_ids=pack.positions[None],
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),  # replaces no mask
        shift_labels=pack.labels[None],
        fused_lm_head=True,
        packed_segments=pack.segments,
    )
    predicts = pack.labels != -100

    def place(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        empty = values.new_zeros(input_ids.size(0), num_completion)
        return empty.index_put((pack.rows, pack.columns), values[0][predicts])

    logprobs = place(output.log_probs)
    assert logprobs is not None
    return logprobs, place(output.entropy)


def build_pack(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, num_completion: int, shares_prompts: bool
) -> Pack:
    """Returns a micro-batch as one row. The arguments are those of `score`."""
    device, width = input_ids.device, input_ids.size(1)
    num_prompt = width - num_completion
    mask = attention_mask.bool().cpu()
    begins = (num_prompt - mask[:, :num_prompt].sum(1)).tolist()
    ends = (num_prompt + mask[:, num_prompt:].sum(1)).tolist()
    labels = torch.full_like(input_ids, -100)
    for row, end in enumerate(ends):
        labels[row, num_prompt - 1 : end - 1] = input_ids[row, num_prompt:end]
    pieces, num_queries, num_keys, keys = [], [], [], []
    where: list[tuple[int, int, int]] = []  # row, and number of predictions, of each piece that predicts
    total = 0
    groups = _groups(input_ids, begins, num_prompt) if shares_prompts else [[row] for row in range(len(ends))]
    for group in groups:
        first = group[0]
        shared = num_prompt - 1 - begins[first] if len(group) > 1 else 0
        prompt = torch.arange(total, total + shared)
        if shared:
            pieces.append((first, begins[first], num_prompt - 1, 0))
            num_queries.append(shared)
            num_keys.append(shared)
            keys.append(prompt)
            total += shared
        for row in group:
            begin = begins[row] + shared
            size = ends[row] - begin
            pieces.append((row, begin, ends[row], shared))
            num_queries.append(size)
            num_keys.append(shared + size)
            keys += [prompt, torch.arange(total, total + size)]
            where.append((row, num_prompt, ends[row]))
            total += size
    is_tree = num_keys != num_queries
    shown = [
        labels[row, a:b] if b > num_prompt - 1 else torch.full_like(labels[row, a:b], -100)
        for row, a, b, _ in pieces
    ]
    return Pack(
        ids=torch.cat([input_ids[row, a:b] for row, a, b, _ in pieces]),
        positions=torch.cat([torch.arange(at, at + b - a, device=device) for _, a, b, at in pieces]),
        labels=torch.cat(shown),
        segments=Segments(
            tuple(num_queries), tuple(num_keys), torch.cat(keys).to(device) if is_tree else None, device
        ),
        rows=torch.cat([torch.full((b - a,), row) for row, a, b in where]).to(device),
        columns=torch.cat([torch.arange(b - a) for _, a, b in where]).to(device),
    )


def _groups(input_ids: torch.Tensor, begins: Sequence[int], num_prompt: int) -> list[list[int]]:
    """Returns the rows that have the same prompt, in the order of the first one of each."""
    found: dict[bytes, list[int]] = defaultdict(list)
    prompts = input_ids[:, :num_prompt].cpu().numpy()
    for row, begin in enumerate(begins):
        found[prompts[row, begin:].tobytes()].append(row)
    return list(found.values())


def order_by_prompt(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns an order (B) of rows in which those of the same prompt follow each other.

    ids, mask: (B, P) of the prompts, left-padded.
    """
    prompts = [row[own].cpu().numpy().tobytes() for row, own in zip(ids, mask.bool(), strict=True)]
    return torch.tensor(sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), prompts[row])))


def group_by_prompt(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the same rows in as many micro-batches of the same sizes, in which rows of the same prompt
    follow each other."""
    ids, mask = (torch.cat([batch[name] for batch in batches]) for name in ("prompt_ids", "prompt_mask"))
    return regroup(batches, order_by_prompt(ids, mask))


@torch.compiler.disable(reason="the segments, a Python object, differ from pack to pack")
def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_segments: Segments | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: (1, heads, N, D) to (1, N, heads, D)."""
    if packed_segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    arithmetic = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    if query.is_cuda and arithmetic != torch.float32:
        return _flash(query, key, value, packed_segments, scaling, arithmetic), None
    repeats = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    mask = packed_segments.mask[None, None]
    output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """FlashAttention for sequences of different lengths. Its causal mask lets the last query of a sequence
    see all of its keys, and so aligns a completion with the end of its prompt and itself."""
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.size(1) // key.size(1)
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    if segments.keys is not None:
        key, value = key[segments.keys], value[segments.keys]
    if repeats > 1:  # torch 2.10 and 2.11 have no grouped heads here
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    of_queries, of_keys = segments.ends
    output = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        of_queries,
        of_keys,
        max(segments.num_queries),
        max(segments.num_keys),
        scale=scaling,
        window_size=(-1, 0),
    )
    assert isinstance(output, torch.Tensor)
    return output[None]
