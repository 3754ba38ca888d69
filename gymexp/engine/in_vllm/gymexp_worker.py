"""Extension of vLLM's workers on a CPU (`--worker-extension-cls`). It runs in vLLM's interpreter, so it
imports nothing of gymexp.

vLLM packs the weights of the output head for the CPU once, when it loads a model. If the head is tied to the
embedding, a reload gives it the new weights, but the head goes on with the packed copy of the old weights:
vLLM does not process a layer again for which the checkpoint has no tensor (0.31,
`model_loader/reload/layerwise.py`).
"""

from __future__ import annotations

from typing import Any


class PacksTiedHead:
    """Methods that `/collective_rpc` can call on every worker."""

    model_runner: Any

    def pack_tied_head(self) -> None:
        """Packs the output head's weights again, after a reload."""
        head = getattr(self.model_runner.model, "lm_head", None)
        if head is not None and hasattr(head, "quant_method"):
            head.quant_method.process_weights_after_loading(head)
