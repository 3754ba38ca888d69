"""The tokens of a rollout with their text, log-probabilities and mask. Runs no code of others.

The text comes from tokenizer.json by the library `tokenizers`: of the run directory, of gymexp's own models,
of Hugging Face's cache, or of a directory that the user names. A path in a stranger's config.yaml is not
followed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymexp
from gymexp.view.run_files import RunFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MOST_JOINED = 8  # tokens that one character may need
_MAX_TOKENIZER = 64 << 20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Upper limits of -log-probability in nats, one class of colour each; the last class has no limit.
NLL_LIMITS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0)
# Of the ratio trainer/engine, on both sides of 1.
RATIO_LIMITS = (1.001, 1.01, 1.05, 1.2)


@dataclass(frozen=True)
class Token:
    """A token of a rollout, or several that one character needs.

    ids: one or more. trained: False for the prompt, the environment's tokens and a masked rollout's. logprob:
    the engine's, and trainer: the trainer's, in nats, None without one. turn: from 0.
    """

    ids: list[int]
    piece: str
    is_special: bool
    trained: bool
    logprob: float | None
    trainer: float | None
    weight: float | None
    turn: int

    @property
    def ratio(self) -> float | None:
        """The trainer's probability divided by the engine's."""
        if self.logprob is None or self.trainer is None:
            return None
        return math.exp(max(-50.0, min(50.0, self.trainer - self.logprob)))

    @property
    def heat(self) -> str:
        """The class of its log-probability: n0 (certain) to n9, or "" without one."""
        if self.logprob is None:
            return ""
        return f"n{sum(-self.logprob > limit for limit in NLL_LIMITS)}"

    @property
    def ratio_heat(self) -> str:
        """The class of its ratio: q4 near 1, q0 far below and q8 far above; "" without one."""
        if self.ratio is None:
            return ""
        away = sum(max(self.ratio, 1 / self.ratio) > limit for limit in RATIO_LIMITS)
        return f"q{4 + away if self.ratio >= 1 else 4 - away}"


@dataclass(frozen=True)
class Flat:
    """The turns of a rollout as one sequence. prompt_ids: of the first turn. The other lists are as long as
    the rest: ids, the turn of each, whether it was sampled, and its log-probability."""

    prompt_ids: list[int]
    ids: list[int]
    turns: list[int]
    is_sampled: list[bool]
    logprobs: list[float | None]


def flat(record: Mapping[str, Any]) -> Flat | None:
    """Returns the tokens of an outcome; None if it has none, or not in the form that gymexp writes."""
    rollout = record.get("rollout")
    turns = rollout.get("turns") if isinstance(rollout, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return None
    lists = [[turn.get(n) for n in ("prompt_ids", "completion_ids", "logprobs")] for turn in turns]
    for prompt, sampled, logprobs in lists:
        if not (_are_ids(prompt) and _are_ids(sampled) and isinstance(logprobs, list)):
            return None
    found = Flat(list(lists[0][0]), [], [], [], [])
    for number, (prompt, sampled, logprobs) in enumerate(lists):
        between = prompt[len(found.prompt_ids) + len(found.ids) :]
        found.ids.extend(between + sampled)
        found.turns.extend([number] * (len(between) + len(sampled)))
        found.is_sampled.extend([False] * len(between) + [True] * len(sampled))
        padded = [*logprobs, *[None] * len(sampled)][: len(sampled)]
        found.logprobs.extend([None] * len(between) + [_number(value) for value in padded])
    return found


def tokens_of(
    found: Flat, trained: Mapping[str, Any] | None, tokenizer: Tokenizer | None, begin: int, end: int
) -> list[Token]:
    """Returns the tokens from `begin` to `end` of the sequence after the prompt. trained: what the trainer
    wrote of the rollout. Without a tokenizer the pieces are ids."""
    is_masked = trained is not None and trained.get("trained") == 0
    trainer, weights = (_column(trained, name, len(found.ids)) for name in ("logprobs", "weights"))
    tokens = []
    for first, last, piece, is_special in pieces(tokenizer, found.ids[begin:end]):
        first, last = first + begin, last + begin
        sampled = found.is_sampled[first]
        tokens.append(
            Token(
                ids=found.ids[first:last],
                piece=piece,
                is_special=is_special,
                trained=sampled and not is_masked,
                logprob=_sum(found.logprobs[first:last]),
                trainer=_sum(trainer[first:last]) if sampled else None,
                weight=weights[first] if sampled else None,
                turn=found.turns[first],
            )
        )
    return tokens


def pieces(tokenizer: Tokenizer | None, ids: Sequence[int]) -> list[tuple[int, int, str, bool]]:
    """Returns (first, end, text, whether it is a special token) of each piece. Ids whose bytes are no whole
    character are joined with the next until they are, at most eight."""
    if tokenizer is None:
        return [(i, i + 1, f"{id_} ", False) for i, id_ in enumerate(ids)]
    special = tokenizer.get_added_tokens_decoder()
    found: list[tuple[int, int, str, bool]] = []
    before, first = 0, 0
    for i, id_ in enumerate(ids):
        if id_ in special and first == i:
            found.append((i, i + 1, special[id_].content, special[id_].special))
            before = first = i + 1
            continue
        text = _decode(tokenizer, ids[before : i + 1])
        next_special = i + 1 < len(ids) and ids[i + 1] in special
        if text.endswith("\ufffd") and i + 1 - first < _MOST_JOINED and i + 1 < len(ids) and not next_special:
            continue
        shown = text[len(_decode(tokenizer, ids[before:first])) :]
        found.append((first, i + 1, shown, False))
        before, first = first, i + 1
    return found


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False) if ids else ""


def find_tokenizer(
    files: RunFiles, config: Mapping[str, Any], own: Path | None
) -> tuple[Tokenizer | None, str]:
    """Returns the run's tokenizer, or None and why there is none. own: a directory that the user named."""
    model = config.get("model")
    path = model.get("path") if isinstance(model, dict) else None
    revision = model.get("revision") if isinstance(model, dict) else None
    shown = path if isinstance(path, str) else "?"
    sources: list[Callable[[], bytes | None]] = [lambda: _read(own)] if own else []
    sources.append(lambda: files.read("model/tokenizer.json", _MAX_TOKENIZER))
    for name in reversed(files.folders("checkpoints")):
        sources.append(lambda name=name: files.read(f"checkpoints/{name}/tokenizer.json", _MAX_TOKENIZER))
    sources.append(lambda: _read_known(shown, revision))
    for source in sources:
        if (content := source()) is not None:
            return _built(content)
    return None, (
        f"the tokenizer of {shown} is not in the run directory: name its directory with --tokenizer, and "
        "the page shows text instead of ids"
    )


def _built(content: bytes) -> tuple[Tokenizer | None, str]:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content.decode("utf-8")), ""
    except Exception as error:  # the library raises Exception itself
        return None, f"the run's tokenizer.json cannot be read: {error}"


def _read_known(path: str, revision: Any) -> bytes | None:
    """Returns the tokenizer.json of a model of gymexp's own, or of a hub id that is in the cache."""
    assets = Path(gymexp.__file__).parent / "assets"
    name = Path(path).name
    if path in (f"gymexp/assets/{name}", str(assets / name)) and (assets / name).is_dir():
        return _read(assets / name)
    if not _HUB_ID.fullmatch(path) or ".." in path:
        return None
    from huggingface_hub import try_to_load_from_cache

    commit = revision if isinstance(revision, str) and re.fullmatch(r"[\w.-]+", revision) else None
    found = try_to_load_from_cache(path, "tokenizer.json", revision=commit)
    return _read(Path(found).parent) if isinstance(found, str) else None


def _read(directory: Path | None) -> bytes | None:
    path = directory / "tokenizer.json" if directory else None
    return path.read_bytes() if path and path.is_file() else None


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < 1 << 31 for i in value)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) and known else None


def _column(trained: Mapping[str, Any] | None, name: str, size: int) -> list[float | None]:
    """Returns a value of each token; None where there is none. One number counts for all tokens."""
    value = trained.get(name) if trained else None
    if isinstance(value, list) and len(value) == size:
        return [_number(one) for one in value]
    return [_number(value)] * size
