"""Gradients by a CUDA graph: what a careful user of a peer could do against the host's launches, so that it is measured too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

GRAPHS = ", CUDA graphs"  # the end of a provider's name
Batch = dict[str, Tensor]


class GraphedGradients:
    """torch.autograd.grad of a loss, recorded on first use for each list of parameters and shapes of a batch."""

    def __init__(self, loss: Callable[[Batch], Tensor]) -> None:
        self._loss, self._pool = loss, torch.cuda.graph_pool_handle()
        self._recorded: dict[Any, tuple[Batch, list[Tensor], torch.cuda.CUDAGraph]] = {}

    def __call__(self, batch: Batch, of: Sequence[Tensor]) -> list[Tensor]:
        """New tensors, one per parameter."""
        key = tuple(map(id, of)), tuple((name, value.shape) for name, value in batch.items())
        if key not in self._recorded:
            self._recorded[key] = self._record(batch, of)
        static, gradients, graph = self._recorded[key]
        torch._foreach_copy_(list(static.values()), list(batch.values()))
        graph.replay()
        return list(torch._foreach_mul(gradients, 1.0))

    def _record(self, batch: Batch, of: Sequence[Tensor]) -> tuple[Batch, list[Tensor], torch.cuda.CUDAGraph]:
        static = {name: value.clone() for name, value in batch.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.autograd.grad(self._loss(static), of)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            gradients = list(torch.autograd.grad(self._loss(static), of))
        return static, gradients, graph
