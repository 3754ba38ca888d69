"""Which layers keep their activations, by the memory that is left. Memory is a count of what autograd saves;
test_kept_layers_gpu.py has a real one."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from small_trainer import MadeUp, build_trainer, gradient_of, save_policy
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from gymexp.training import kept_layers, recomputed_layers
from gymexp.training.kept_layers import KeptLayers

NUM_LAYERS = 6


@dataclass(eq=False)
class Held:
    tensor: torch.Tensor


class CountedMemory:
    """Counts the bytes of tensors that autograd keeps from outside of checkpointed layers, each one once; not
    those of parameters."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = self.most = 0
        self.parameters: set[int] = set()
        self._users: Counter[int] = Counter()  # of a tensor's storage

    def allocated(self) -> int:
        return self.used

    def room(self) -> int:
        return self.limit - self.used

    def begin_peak(self) -> None:
        self.most = self.used

    def peak(self) -> int:
        return self.most

    def counting(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._hold, lambda held: held.tensor)

    def _hold(self, tensor: torch.Tensor) -> Held:
        held = Held(tensor)
        place = tensor.untyped_storage().data_ptr()
        if place not in self.parameters:
            self._users[place] += 1
            if self._users[place] == 1:
                self.add(tensor.nbytes)
            weakref.finalize(held, self._drop, place, tensor.nbytes)
        return held

    def _drop(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            self.add(-size)

    def add(self, size: int) -> None:
        self.used += size
        self.most = max(self.most, self.used)


class Layer(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += torch.is_grad_enabled()
        return x + self.linear(x).tanh()


class Model(torch.nn.Module):
    """Layers with checkpointing as transformers switches it on."""

    def __init__(self, memory: CountedMemory) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(*(Layer() for _ in range(NUM_LAYERS)))
        self.memory = memory
        memory.parameters |= {p.data_ptr() for p in self.parameters()}

    def enable(self) -> KeptLayers:
        for layer in self.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = lambda function, *inputs: torch.utils.checkpoint.checkpoint(
                function, *inputs, use_reentrant=False
            )
        kept = KeptLayers(self, self.memory)
        kept.install()
        return kept

    def train_on(self, num_tokens: int, kept: KeptLayers | None = None) -> list[int]:
        """One micro-batch. Returns how often each layer was computed."""
        for layer in self.layers:
            layer.passes = 0
        x = torch.linspace(-1, 1, num_tokens * 8).view(1, num_tokens, 8).requires_grad_()
        with self.memory.counting():
            loss = self.layers(x).square().sum()
        loss.backward()
        if kept:
            kept.end()
        return [layer.passes for layer in self.layers]

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.parameters()])


def layer_bytes(num_tokens: int) -> int:
    """What a layer keeps beside its input: the result of tanh, 8 numbers of 4 bytes a token."""
    return 32 * num_tokens


def kept_of(passes: list[int]) -> list[int]:
    return [index for index, count in enumerate(passes) if count == 1]


def test_the_first_micro_batch_keeps_the_last_layer_and_the_next_one_all_that_fit():
    model = Model(CountedMemory(10**9))
    kept = model.enable()
    assert kept_of(model.train_on(16, kept)) == [NUM_LAYERS - 1]
    assert kept_of(model.train_on(16, kept)) == list(range(NUM_LAYERS))


@pytest.mark.parametrize("num_fitting", range(NUM_LAYERS + 1))
def test_as_many_layers_are_kept_as_the_memory_holds_beside_the_rest_and_one_layer_more(num_fitting):
    """The rest are the inputs of the layers and of what follows them. One layer more, since the backward pass
    computes the others one after the other."""
    model = Model(CountedMemory(10**9))
    kept = model.enable()
    model.train_on(16, kept)
    model.train_on(16, kept)
    model.memory.limit = (NUM_LAYERS + 1) * 32 * 16 + (num_fitting + 1) * layer_bytes(16) + 100
    for _ in range(3):
        assert kept_of(model.train_on(16, kept)) == list(range(num_fitting))


def test_longer_rows_keep_fewer_layers_and_shorter_ones_more_again():
    model = Model(CountedMemory(10**9))
    kept = model.enable()
    model.train_on(16, kept)
    model.memory.limit = 25 * layer_bytes(16)
    assert len(kept_of(model.train_on(16, kept))) == NUM_LAYERS
    assert [len(kept_of(model.train_on(tokens, kept))) for tokens in (32, 40, 200)] == [4, 2, 0]
    assert len(kept_of(model.train_on(4, kept))) == NUM_LAYERS
    assert len(kept_of(model.train_on(32, kept))) == 4


def test_a_layer_of_longer_rows_is_expected_to_need_more_before_it_is_measured():
    """Room for the rest and for two layers of 16 tokens beside it, but not for two of 32."""
    model = Model(CountedMemory(10**9))
    kept = model.enable()
    model.train_on(16, kept)
    model.train_on(16, kept)
    model.memory.limit = (NUM_LAYERS + 1) * 32 * 32 + 2 * layer_bytes(16) + 100
    assert kept_of(model.train_on(32, kept)) == []


def test_what_a_layer_hands_on_is_no_part_of_what_it_keeps(monkeypatch):
    """Also if it hands on a tuple, of which the first is the next layer's input."""
    memory = CountedMemory(10**9)
    model = Model(memory)
    model.layers = torch.nn.ModuleList([Layer()])
    kept = model.enable()
    before = iter([0, 0, 500, 500])  # at the start, before the layer and after it
    monkeypatch.setattr(memory, "allocated", lambda: next(before))
    output = (torch.zeros(1, 5, 8), torch.zeros(1, 2))
    result = kept._run(0, lambda *_: None, lambda x: output, torch.zeros(1, 5, 8))
    assert result is output and kept._layer == 500 - 160


@pytest.mark.parametrize(("expands", "unused"), [(False, 250), (True, 100)])
def test_a_gpu_has_room_for_what_is_free_but_for_a_share_of_all(monkeypatch, expands, unused):
    """400 of 1000 bytes are free, and the allocator holds 300, of which 200 are in use."""
    figures = {"mem_get_info": (400, 1000), "memory_reserved": 300, "memory_allocated": 200}
    figures |= {"max_memory_allocated": 280, "memory_snapshot": [{"is_expandable": expands}]}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    begun = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: begun.append(True))
    memory = kept_layers.GpuMemory()
    memory.begin_peak()
    assert (memory.allocated(), memory.room(), memory.peak()) == (200, 400 + 100 - unused, 280)
    assert begun == [True]


def test_memory_that_others_take_meanwhile_is_not_counted_on():
    model = Model(CountedMemory(10**9))
    kept = model.enable()
    model.train_on(16, kept)
    assert len(kept_of(model.train_on(16, kept))) == NUM_LAYERS
    model.memory.limit = 0
    assert kept_of(model.train_on(16, kept)) == []


def test_the_gradient_does_not_depend_on_the_choice():
    plain = Model(CountedMemory(0))
    for tokens in (16, 16, 24):
        plain.train_on(tokens)
    model = Model(CountedMemory(10**9))
    kept = model.enable()
    model.train_on(16, kept)
    model.memory.limit = model.memory.most + 4 * layer_bytes(16)
    assert 0 < len(kept_of(model.train_on(16, kept))) < NUM_LAYERS
    model.train_on(24, kept)
    assert torch.equal(model.gradient(), plain.gradient())


def test_a_step_s_first_pass_has_room_for_gradients_though_later_passes_need_none():
    model = Model(CountedMemory(10**9))
    kept = model.enable()
    rest = 10 * sum(p.nbytes for p in model.parameters())  # as much as if gradients were that large
    new = [
        p.register_hook(lambda grad, p=p: model.memory.add(10 * p.nbytes * (p.grad is None)) or grad)
        for p in model.parameters()
    ]
    assert new

    def drop_gradients() -> None:
        model.zero_grad()
        model.memory.add(-rest)

    model.train_on(16, kept)
    model.train_on(16, kept)
    drop_gradients()
    model.memory.limit = model.memory.used + rest
    assert kept_of(model.train_on(16, kept)) == []
    model.memory.limit = model.memory.used + rest
    assert kept_of(model.train_on(16, kept)) == list(range(NUM_LAYERS))


def test_layers_that_a_pass_does_not_use_do_not_count():
    """As those of images in a model that reads text."""
    model = Model(CountedMemory(10**9))
    kept = model.enable()
    model.layers = model.layers[2:5]
    model.train_on(16)
    assert kept.end() == 1.0
    assert kept_of(model.train_on(16)) == [0, 1, 2]
    assert kept.end() == 0.0


def test_passes_without_a_gradient_decide_nothing():
    model = Model(CountedMemory(10**9))
    kept = model.enable()
    with torch.no_grad():
        model.layers(torch.zeros(1, 1000, 8))
    assert kept.end() is None
    assert kept_of(model.train_on(16, kept)) == [NUM_LAYERS - 1]


@pytest.mark.parametrize("packing", ["none", "tree"])
def test_the_trainer_keeps_what_fits_at_every_step_and_logs_the_share(tmp_path, monkeypatch, packing):
    policy = save_policy(tmp_path / "policy", num_layers=4)
    expected = gradient_of(build_trainer(policy, tmp_path, MadeUp(), max_steps=3, packing=packing))
    monkeypatch.setattr(recomputed_layers, "is_by_memory", lambda args, has_gpu: args.gradient_checkpointing)
    monkeypatch.setattr(kept_layers, "GpuMemory", lambda: CountedMemory(10**9))
    trainer = build_trainer(
        policy, tmp_path, MadeUp(), max_steps=3, gradient_checkpointing=True, packing=packing
    )
    shares = []
    trainer.add_metrics = lambda metrics, add=trainer.add_metrics: (shares.append(metrics), add(metrics))
    torch.testing.assert_close(gradient_of(trainer), expected, rtol=0, atol=1e-6)
    of_layers = [m["update/recomputed_layers"] for m in shares if "update/recomputed_layers" in m]
    assert of_layers == [0.75] + [0.0] * 11  # three steps of four micro-batches
    logged = [e["update/recomputed_layers"] for e in trainer.state.log_history if "loss" in e]
    assert logged == pytest.approx([0.1875, 0.0, 0.0])
