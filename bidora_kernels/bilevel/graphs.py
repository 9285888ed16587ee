"""Passes as CUDA graphs: one launch by the host where a pass takes thousands, once batches of the same shapes come again."""

from __future__ import annotations

import dataclasses
import random
import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._context import current_mode
from .batches import map_leaves
from .flat import FlatParameters, Vector, copy_all

LIMIT = 64  # of recorded passes, and of kinds of passes that have come once
PLAIN = frozenset({bool, int, float, str, type(None)})

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
    kernels at the addresses that they had: every graph is dropped where a parameter, buffer or module of the model is another
    one or has moved, or where a plain public attribute of a module (`training`, a dropout's `p`, a layer's `scaling`), a hook or
    `requires_grad` is no longer what it was. What else Python does in a pass is done while it is recorded, and not again. All
    graphs share one memory pool and the tensors that gradients are read from.
    """

    def __init__(self, model: nn.Module, lower: FlatParameters, upper: FlatParameters) -> None:
        """Record nothing yet."""
        self._model, self._flat = model, {"direction": lower, "magnitude": upper}
        self._device = lower.buffers[0].device
        self._told, self._dropped = False, 0
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
        for flat in self._flat.values():
            now += [buffer.data_ptr() for buffer in flat.buffers]
            now += [parameter.requires_grad for parameter in flat.parameters]
        for module in self._model.modules():
            now += (id(module), type(module))
            now += [value for name, value in vars(module).items() if type(value) in PLAIN and name[0] != "_"]
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
                now += hooks
            for parameter in module._parameters.values():
                if parameter is not None:
                    now += (_address(parameter), parameter.requires_grad)
            now += [_address(buffer) for buffer in module._buffers.values() if buffer is not None]
        if now != self._seen:
            self._dropped += bool(self._once or self._recorded)
            if self._dropped == LIMIT:
                self._tell("the model has changed in many steps, and with each change what was recorded is dropped")
            self._drop()
            self._seen = now

    def run(
        self, loss_fn: Any, settings: Hashable, needs: set[str], batch: Any, weight: float, compute: Pass
    ) -> tuple[Tensor, set[torch.dtype]]:
        """What `compute` gives, by a graph where there is one; its gradients are added to `.grad` of the groups in `needs`.

        Raises TypeError or ValueError for a batch that cannot be copied from step to step.
        """
        sources: list[Tensor] = []
        map_leaves(batch, _collect(sources))
        kind = self._kind(loss_fn, settings, needs, batch)
        recorded = self._recorded.get(kind)
        if recorded is None:
            self._check(sources)
            if not self._comes_again(kind):
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

    def _kind(self, loss_fn: Any, settings: Hashable, needs: set[str], batch: Any) -> Hashable:
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        cuda = torch.backends.cuda
        attention = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()
        around = autocast, attention, torch.get_float32_matmul_precision(), current_mode()
        kind = _weakly(loss_fn), settings, frozenset(needs), around, _described(batch)
        try:
            hash(kind)
        except TypeError as error:
            raise TypeError(f"cuda_graphs tells passes apart by loss_fn and the batch's plain values: {error}") from None
        return kind

    def _check(self, sources: list[Tensor]) -> None:
        if elsewhere := {str(tensor.device) for tensor in sources if tensor.device != self._device}:
            raise ValueError(f"cuda_graphs needs batches on {self._device}, got tensors on {', '.join(sorted(elsewhere))}")
        if any(tensor.requires_grad for tensor in sources):
            raise ValueError("cuda_graphs: a batch's tensors must not require gradients, which would go to copies")

    def _comes_again(self, kind: Hashable) -> bool:
        """Whether the pass is to be recorded; where many kinds are not, say once what keeps them apart."""
        full = len(self._recorded) >= LIMIT
        if kind in self._once and not full:
            return True
        self._once[kind] = None
        if len(self._once) > LIMIT:
            del self._once[next(iter(self._once))]
            full = True
        if full:
            self._tell(
                f"{len(self._recorded)} kinds of passes are recorded, and others keep coming that run without a graph. Give "
                "loss_fn as one function that is not made anew for each step, and pad batches to few lengths; other plain values "
                "in a batch are a kind of their own, too"
            )
        return False

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(f"cuda_graphs: {what}", stacklevel=2)

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
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "a pass cannot be recorded as a CUDA graph. loss_fn and the model must not wait for the device, as .item() and "
                "branches on a tensor's value do, nor draw random numbers of the CPU: leave cuda_graphs off, in a new process "
                f"(this one's generator may still be recording). It said: {error}"
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
    """Record what `run` launches, without running it; returns what launches it.

    Raises RuntimeError where it cannot be recorded, and where it draws random numbers of the CPU, which a replay would not.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    drawn = random.getstate(), torch.get_rng_state()
    try:
        # other threads, as one that pins a loader's memory, may go on
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            run()
    finally:
        torch.cuda.set_stream(stream)  # a recording that fails would leave its own current
    if random.getstate() != drawn[0] or not torch.equal(torch.get_rng_state(), drawn[1]):
        raise RuntimeError("random numbers of the CPU were drawn")
    replay: Callable[[], None] = graph.replay
    return replay


def _weakly(function: Any) -> Any:
    """A function by its identity, or a method by its object's, without keeping alive what it holds."""
    try:
        return weakref.WeakMethod(function) if hasattr(function, "__self__") else weakref.ref(function)
    except TypeError:  # one of C's
        return function


def _collect(into: list[Tensor], take: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Callable[[Any], Any]:
    """A function that keeps `take` of every tensor it is given in a list, and returns it; anything else it returns."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        into.append(take(value))
        return into[-1]

    return leaf


def _described(value: Any) -> Hashable:
    """What of a batch is recorded with a pass: its structure and plain values, of tensors all but the values."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device, value.requires_grad
    if isinstance(value, Mapping):
        if any(isinstance(other, Tensor) for other in getattr(value, "__dict__", {}).values()):
            raise TypeError(
                f"cuda_graphs sees the items of a {type(value).__name__}, not its attributes, of which one is a tensor"
            )
        return type(value), tuple((key, _described(item)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_described, value))
    return type(value), value  # 1 is not True, nor 1.0


def _address(tensor: Tensor) -> Any:
    """Where a tensor's values lie; of one that is made of others, as quantized ones are, where theirs do."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.data_ptr()
    return [_address(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
