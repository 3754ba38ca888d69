"""Gradient checkpointing by free memory: the backward pass computes only those layers again whose activations
the GPU's memory does not hold.

Otherwise all layers are computed again, which is about a quarter of an update's work, also when most of the
memory is free. Here each micro-batch keeps the activations of as many layers as there is room for, counted
from the first layer, so that all of them are there when the rest of the pass needs the most. What this rest
needs is known from earlier micro-batches: their peak, without the activations that they kept. The values of
the update do not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

# Of the GPU's memory, for the gaps that torch's allocator cannot use. One whose segments do not grow had 16 %
# of an H200 in gaps after rows of very different lengths.
_UNUSED_SHARE = 0.25
_UNUSED_SHARE_EXPANDABLE = 0.1
_SIZES_PER_DOUBLING = 4


class Memory(Protocol):
    """The memory of the device that trains, in bytes."""

    def allocated(self) -> int:
        """Returns what this process's tensors take."""
        ...

    def room(self) -> int:
        """Returns what tensors may take in addition."""
        ...

    def begin_peak(self) -> None: ...

    def peak(self) -> int:
        """Returns the most that tensors took since `begin_peak`."""
        ...


class GpuMemory:
    """The memory of this process's GPU. What the allocator holds unused counts as free."""

    @cached_property
    def _unused_share(self) -> float:
        expands = any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
        return _UNUSED_SHARE_EXPANDABLE if expands else _UNUSED_SHARE

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def room(self) -> int:
        free, total = torch.cuda.mem_get_info()
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return free + unused - int(total * self._unused_share)

    def begin_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


@dataclass(frozen=True)
class _Need:
    """What a micro-batch of this size needed: `rest` without the activations that it kept, and `layer` for
    those of one layer; in bytes."""

    size: int
    rest: int
    layer: int

    def at(self, size: int) -> tuple[int, int]:
        """Returns at most what a micro-batch of another size needs: a part grows with it, and a part is
        constant."""
        scale = max(1.0, size / self.size)
        return int(self.rest * scale), int(self.layer * scale)


class _Needs:
    """The largest needs of micro-batches of about the same size, for each such size."""

    def __init__(self) -> None:
        self._by_size: dict[int, _Need] = {}

    def add(self, size: int, rest: int, layer: int) -> None:
        place = round(_SIZES_PER_DOUBLING * math.log2(size))
        old = self._by_size.get(place, _Need(size, 0, 0))
        self._by_size[place] = _Need(min(old.size, size), max(old.rest, rest), max(old.layer, layer))

    def at(self, size: int) -> tuple[int, int] | None:
        """Returns at most what a micro-batch needs, by the seen one that promises the least; None if none was
        seen."""
        return min((need.at(size) for need in self._by_size.values()), default=None)


class KeptLayers:
    """Chooses the layers of each micro-batch that keep their activations.

    `gradient_checkpointing_enable` must have been called before `install`. `end` follows each backward pass.
    """

    def __init__(self, model: Any, memory: Memory) -> None:
        self._model = model
        self._memory = memory
        self._layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        # The first backward pass of a step, if it allocates the gradients, and the others.
        self._needs = {False: _Needs(), True: _Needs()}
        self._size = 0  # of the micro-batch: the elements of a layer's input; 0 between micro-batches

    def install(self) -> None:
        """Puts the choice between the layers and checkpointing, which has been switched on."""
        layer: Any
        for index, layer in enumerate(self._layers):
            layer._gradient_checkpointing_func = partial(self._run, index, layer._gradient_checkpointing_func)

    def _run(
        self, index: int, checkpoint: Callable[..., Any], function: Callable[..., Any], *inputs: Any
    ) -> Any:
        if not torch.is_grad_enabled() or not inputs:
            return checkpoint(function, *inputs)
        if not self._size:
            self._begin(inputs[0].numel())
        self._num_called += 1
        if not self._keeps(index):
            return checkpoint(function, *inputs)
        before = self._memory.allocated()
        output = function(*inputs)
        # The output is the next layer's input, which checkpointing keeps as well.
        passed_on = output[0] if isinstance(output, tuple) else output
        # Not below 0, though FSDP frees a layer's gathered weights after it.
        activations = max(0, self._memory.allocated() - before - passed_on.nbytes)
        self._num_kept += 1
        self._layer = max(self._layer, activations)
        if self._needed:
            self._kept += activations
        return output

    def _begin(self, size: int) -> None:
        has_gradients = all(p.grad is not None for p in self._model.parameters() if p.requires_grad)
        self._size = size
        self._learns = self._needs[has_gradients]
        self._needed = self._learns.at(size) or self._needs[False].at(size)
        self._start = self._memory.allocated()
        self._room = self._memory.room()
        self._num_called = self._num_kept = self._kept = self._layer = 0
        self._is_full = False
        self._memory.begin_peak()

    def _keeps(self, index: int) -> bool:
        """Decides on the next layer of the pass. index: its place among all layers."""
        if self._needed is None:
            # Nothing is known yet. The backward pass begins with the last layer, so keeping its activations
            # takes hardly more memory than to compute them again, and shows what a layer needs.
            return index == len(self._layers) - 1
        rest, layer = self._needed
        layer = self._layer or layer
        computed_again = layer  # by the backward pass; it is no part of `rest` if all layers were kept
        # After a layer without room no other one is kept: those that are kept come first.
        self._is_full |= self._kept + layer + computed_again + rest > self._room
        return not self._is_full

    def end(self) -> float | None:
        """Learns from the micro-batch, whose backward pass is over. Returns the share of layers that were
        computed again; None if there was no pass."""
        if not self._size:
            return None
        rest = self._memory.peak() - self._start - self._kept
        layer = self._layer or (self._needed or (0, 0))[1]
        self._learns.add(self._size, rest, layer)
        self._size = 0
        return 1 - self._num_kept / self._num_called
