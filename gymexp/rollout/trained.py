"""What the trainer made of a rollout: its advantage, and the trainer's own numbers of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Trained:
    """What the loss gets of one rollout.

    advantage: None for a failed rollout, which has no reward. num_trained: the number of its tokens in the
    loss, so those of the policy; 0 if the rollout failed or is masked. max_ratio: the largest ratio of the
    trainer's probability of a trained token to the engine's; None without the trainer's log-probabilities.

    The others have a value for each completion token, in the order of `tokens.flatten`, as float32 rounded to
    4 decimals, with NaN where the token is not trained on. logprobs, ref_logprobs: of the policy that
    sampled, and of the reference model, both as the trainer computes them, in nats. weights: TRL's weights
    against the mismatch of engine and trainer; a single number if they are of whole sequences. Each is None
    if TRL did not compute it, if no token is trained on, or if the step has too many tokens to keep.
    """

    advantage: float | None
    num_trained: int
    max_ratio: float | None = None
    logprobs: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None
    weights: np.ndarray | float | None = None
