"""The policies of an evaluation in the hf engine: one engine, whose model gets each policy's weights in
turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from gymexp.config.schema import RunConfig
from gymexp.evaluation.plan import Policy
from gymexp.policy.model import load_model, load_tokenizer
from gymexp.training.engine_client import serve_hf


class HFPolicies:
    """Serves the hf engine on the controller's socket `fd`; `stack` closes it. The weights are those of
    `config.model` at first, as a run loads them: float32, whatever `model.dtype` of the arithmetic.
    """

    def __init__(self, config: RunConfig, fd: int, stack: ExitStack) -> None:
        self._config = config
        self._loaded = config.model.path
        self._model = load_model(config.model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.nn.Module.to(self._model, device)
        self._engine = serve_hf(config, self._model, load_tokenizer(config.model), fd, stack)
        self.vocab_size: int = self._model.get_input_embeddings().num_embeddings  # pyright: ignore

    @contextmanager
    def sampling(self, policy: Policy) -> Iterator[None]:
        """Loads the policy's weights, and lets the engine sample with them within the block. Outside of such
        a block the engine is paused."""
        if policy.directory and policy.directory != self._loaded:
            other = load_model(dataclasses.replace(self._config.model, path=policy.directory))
            self._model.load_state_dict(other.state_dict())
            self._loaded = policy.directory
        with self._engine.sampling(policy.step):
            yield
