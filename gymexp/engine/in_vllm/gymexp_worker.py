"""Runs in vLLM's workers on a CPU (`--worker-extension-cls`), with vLLM's interpreter: imports nothing of
gymexp.

vLLM packs the output head's weights for the CPU once, when it loads a model. A head that is tied to the
embedding gets the new weights when these are reloaded, and goes on with the packed copy of the old ones: a
layer for which nothing was loaded is not processed again (vLLM 0.31, `model_loader/reload/layerwise.py`).
"""

from __future__ import annotations

from typing import Any


class PacksTiedHead:
    """Methods that `/collective_rpc` can call on every worker."""

    model_runner: Any

    def pack_tied_head(self) -> None:
        head = getattr(self.model_runner.model, "lm_head", None)
        if head is not None and hasattr(head, "quant_method"):
            head.quant_method.process_weights_after_loading(head)
