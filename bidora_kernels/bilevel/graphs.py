"""Passes as CUDA graphs: one launch by the host where a pass takes thousands, once batches of the same shapes come again."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._context import current_mode
from .batches import map_leaves
from .flat import FlatParameters, Vector, copy_all

LIMIT = 64  # of recorded passes, and of kinds of passes that have come once

# (batch, weight) -> (the detached loss, the dtypes that its products ran in); leaves the gradients in `.grad`
Pass = Callable[[Any, Any], tuple[Tensor, set[torch.dtype]]]


@dataclasses.dataclass
class _Recorded:
    """A pass between fixed addresses: copies of the batch's tensors, the weight, the loss in fp64.

    had: by group, which parameters got a gradient.
    """

    inputs: list[Tensor]
    weight: Tensor
    loss: Tensor
    loss_dtype: torch.dtype
    dtypes: set[torch.dtype]
    had: dict[str, list[bool]]
    replay: Callable[[], None]


class PassGraphs:
    """Runs a pass as it is the first time that its kind comes, records it the second time, and replays it from then on.

    A kind is a loss function, the shapes, dtypes and plain values of a batch, and the settings of the pass. A graph repeats its
    kernels at the addresses that they had: where a parameter or buffer of the model has moved, was frozen or changed its mode,
    every graph is dropped. All share one memory pool and the tensors that gradients are read from.
    """

    def __init__(self, model: nn.Module, lower: FlatParameters, upper: FlatParameters) -> None:
        """Record nothing yet."""
        self._model, self._flat = model, {"direction": lower, "magnitude": upper}
        self._device = lower.buffers[0].device
        self._told = False
        self._seen: list[Any] = []
        self._drop()

    def _drop(self) -> None:
        self._recorded: dict[Hashable, _Recorded] = {}
        self._once: dict[Hashable, None] = {}
        self._gradients: dict[str, Vector] = {}
        self._pool: Any = None

    def refresh(self) -> None:
        """Drop every graph where what they hold of the model is no longer so."""
        now: list[Any] = []
        for module in self._model.modules():
            now.append(module.training)
            for parameter in module._parameters.values():
                if parameter is not None:
                    now += (parameter.data_ptr(), parameter.requires_grad)
            now += [buffer.data_ptr() for buffer in module._buffers.values() if buffer is not None]
        if now != self._seen:
            self._drop()
            self._seen = now

    def run(
        self, settings: Hashable, needs: set[str], batch: Any, weight: float, compute: Pass
    ) -> tuple[Tensor, set[torch.dtype]]:
        """What `compute` gives, by a graph where there is one; its gradients are added to `.grad` of the groups in `needs`."""
        sources: list[Tensor] = []
        map_leaves(batch, _collect(sources))
        kind = self._kind(settings, needs, batch)
        recorded = self._recorded.get(kind)
        if recorded is None:
            if elsewhere := {str(tensor.device) for tensor in sources if tensor.device != self._device}:
                raise ValueError(f"cuda_graphs needs batches on {self._device}, got tensors on {', '.join(sorted(elsewhere))}")
            if kind not in self._once or len(self._recorded) >= LIMIT:
                self._remember(kind)
                return compute(batch, weight)
            recorded = self._recorded[kind] = self._record(needs, batch, compute)
            del self._once[kind]
        copy_all(recorded.inputs, sources)
        recorded.weight.fill_(weight)
        recorded.replay()
        for group, had in recorded.had.items():
            flat = self._flat[group]
            views = flat.views([part.clone() for part in self._gradients[group]])
            pairs = [(p, view) for p, view, one in zip(flat.parameters, views, had, strict=True) if one]
            sums = [(p.grad, view) for p, view in pairs if p.grad is not None]
            if sums:
                torch._foreach_add_([grad for grad, _ in sums], [view for _, view in sums])
            for parameter, view in pairs:
                if parameter.grad is None:
                    parameter.grad = view
        return recorded.loss.to(recorded.loss_dtype, copy=True), recorded.dtypes

    def _kind(self, settings: Hashable, needs: set[str], batch: Any) -> Hashable:
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        return settings, frozenset(needs), autocast, current_mode(), repr(map_leaves(batch, _describe))

    def _remember(self, kind: Hashable) -> None:
        """Note that a kind has come once; where many have and few came again, say what keeps them apart."""
        self._once[kind] = None
        if len(self._once) <= LIMIT:
            return
        del self._once[next(iter(self._once))]
        if not self._told:
            self._told = True
            warnings.warn(
                f"cuda_graphs: {LIMIT} kinds of passes came and did not come again, so that they run without a graph. Give "
                "loss_fn as one function that is not made anew for each step, and pad batches to few lengths",
                stacklevel=2,
            )

    def _record(self, needs: set[str], batch: Any, compute: Pass) -> _Recorded:
        """Record a pass, which does not run it. Raises RuntimeError where it does what a graph cannot hold."""
        inputs: list[Tensor] = []
        static = map_leaves(batch, _collect(inputs, torch.clone))
        weight, loss = (torch.ones((), dtype=torch.float64, device=self._device) for _ in range(2))
        flats = {group: self._flat[group] for group in sorted(needs)}
        for group, flat in flats.items():
            if group not in self._gradients:
                self._gradients[group] = flat.zeros()
        earlier = [(p, p.grad) for flat in flats.values() for p in flat.parameters]  # of micro-batches before this one
        dtypes: set[torch.dtype] = set()
        loss_dtypes: set[torch.dtype] = set()
        had: dict[str, list[bool]] = {}

        def differentiate() -> None:
            value, seen = compute(static, weight)
            loss.copy_(value)
            loss_dtypes.add(value.dtype)
            dtypes.update(seen)
            for group, flat in flats.items():
                had[group] = [parameter.grad is not None for parameter in flat.parameters]
                pairs = zip(flat.views(self._gradients[group]), flat.parameters, strict=True)
                known = [(view, parameter.grad) for view, parameter in pairs if parameter.grad is not None]
                copy_all([view for view, _ in known], [grad for _, grad in known])
                for parameter in flat.parameters:
                    parameter.grad = None

        torch.clear_autocast_cache()
        for parameter, _ in earlier:
            parameter.grad = None
        try:
            if self._pool is None:
                self._pool = new_pool()
            replay = record(differentiate, self._device, self._pool)
        except RuntimeError as error:
            raise RuntimeError(
                "a pass cannot be recorded as a CUDA graph. loss_fn and the model must not wait for the device, as .item() and "
                f"branches on a tensor's value do: start anew without cuda_graphs. It said: {error}"
            ) from error
        finally:
            torch.clear_autocast_cache()  # what it holds lies in the graph's memory
            for parameter, grad in earlier:
                parameter.grad = grad
        return _Recorded(inputs, weight, loss, loss_dtypes.pop(), dtypes, had, replay)


def new_pool() -> Any:
    """Memory that graphs share: they run one after the other, and nothing is read from one after the next has begun."""
    return torch.cuda.graph_pool_handle()


def record(run: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
    """Record what `run` launches, without running it; returns what launches it."""
    graph = torch.cuda.CUDAGraph()
    # other threads, as one that pins a loader's memory, may go on
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


def _collect(into: list[Tensor], take: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Callable[[Any], Any]:
    """A function that keeps `take` of every tensor it is given in a list, and returns it; anything else it returns."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        into.append(take(value))
        return into[-1]

    return leaf


def _describe(value: Any) -> Any:
    return (tuple(value.shape), value.dtype, value.device, value.requires_grad) if isinstance(value, Tensor) else value
