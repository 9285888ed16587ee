"""What a layer keeps between passes: when it is outdated, what it holds on to, who may drop it."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import bidora_kernels as bk
from bidora_kernels.ops import _workspace


def test_cached_norms_are_not_taken_for_those_of_a_storage_at_the_same_address() -> None:
    """The allocator hands an address that nobody holds out again: replaced twice, a storage may lie where the first one lay."""
    torch.manual_seed(0)
    layer = bk.FusedDoraLinear.from_linear(nn.Linear(64, 64), r=4).eval()
    x = torch.randn(64, 64)
    with torch.no_grad():
        layer.lora_B.normal_()
        for _ in range(40):
            layer(x)
            for _ in range(2):
                layer.lora_A.data = layer.lora_A.data * 1.01
            y = layer(x)
            layer.clear_cache()
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_a_fused_optimizer_in_eval_mode(optimizer: Any) -> None:
    """Its step does not show in the tensors' versions; the kept norms and a prepared decode must not outlive it."""
    torch.manual_seed(0)
    layer = bk.FusedDoraLinear.from_linear(nn.Linear(16, 16), r=2).eval()
    x = torch.randn(3, 16)
    trainer = optimizer([layer.lora_A, layer.lora_B, layer.magnitude], lr=1e-2, fused=True)
    for _ in range(5):
        with torch.no_grad():
            before = layer(x)
        layer(x).square().sum().backward()
        trainer.step()
        trainer.zero_grad()
        with torch.no_grad():
            kept = layer(x)
            layer.clear_cache()
            assert not torch.equal(kept, before)
            torch.testing.assert_close(kept, layer(x))


def test_a_kept_norm_does_not_keep_an_offloaded_weight() -> None:
    layer = bk.FusedDoraLinear.from_linear(nn.Linear(64, 64), r=2).eval()
    storage = StorageWeakRef(layer.weight.untyped_storage())
    layer._hf_hook = object()  # accelerate's, which moves the weight away after every call
    with torch.no_grad():
        y = layer(torch.ones(40, 64))
    assert layer._norm_cache is not None
    values = layer.weight.detach().clone()
    layer.weight = nn.Parameter(torch.empty(64, 64, device="meta"), requires_grad=False)
    assert storage.expired()
    layer.weight = nn.Parameter(values.flip(0), requires_grad=False)
    with torch.no_grad():
        got = layer(torch.ones(40, 64))
        layer.clear_cache()
        assert torch.equal(got, layer(torch.ones(40, 64)))
    assert not torch.equal(got, y)


def test_a_write_while_the_norms_are_found_outdates_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by another thread that trains the layer."""
    layer, x = bk.FusedDoraLinear.from_linear(nn.Linear(64, 40), r=4).eval(), torch.randn(3, 64)
    found = bk.functional.weight_norm

    def interrupted(*terms: Any) -> Tensor:
        norm = found(*terms)
        nn.init.normal_(layer.lora_B)
        return norm

    with torch.no_grad():
        monkeypatch.setattr(bk.functional, "weight_norm", interrupted)
        layer(x)
        monkeypatch.undo()
        assert layer._decode is None
        got = layer(x)
        layer.clear_cache()
        torch.testing.assert_close(got, layer(x))


def test_a_call_recorded_into_a_cuda_graph_neither_takes_nor_leaves_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be replayed with what the cache held then; and an eager call would find what no replay has computed yet."""
    layer, x = bk.FusedDoraLinear.from_linear(nn.Linear(64, 40), r=4).eval(), torch.randn(40, 64)
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        expected = layer(x)
        kept = layer._norm_cache
        monkeypatch.setattr(bk.functional, "is_captured", lambda tensor: True)
        layer._norm_cache = torch.full_like(kept[0], 2.0), kept[1]
        torch.testing.assert_close(layer(x), expected)
        layer.clear_cache()
        torch.testing.assert_close(layer(x), expected)
        assert layer._norm_cache is None
        layer.reuse = 4
        monkeypatch.setattr(layer, "plan", lambda *_: types.SimpleNamespace(kept=True))
        assert layer._kept_merged(x) == (None, None)
    assert layer._merged_cache is None


def test_threads_may_drop_what_others_use() -> None:
    layer, x = bk.FusedDoraLinear.from_linear(nn.Linear(64, 40), r=4).eval(), torch.randn(3, 64)
    stop, failures = time.monotonic() + 1.0, []

    def repeat(action: Callable[[], object]) -> None:
        try:
            while time.monotonic() < stop:
                action()
        except Exception as error:
            failures.append(error)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def another_workspace() -> None:
        thread = threading.Thread(target=layer, args=(torch.randn(400, 64),))  # so many tokens take the merged weight
        thread.start()
        thread.join()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        actions = [forward, forward, layer.clear_cache, another_workspace, _workspace.workspace_bytes]
        threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
