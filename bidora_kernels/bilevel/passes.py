"""One forward and backward pass at a time: what it differentiates, on which micro-batches, scaled how, and how long it took."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops._context import DirectionPoint, pass_mode
from .batches import parts_of
from .flat import FlatParameters, Vector
from .graphs import PassGraphs
from .sharding import sum_over
from .snapshot import PassState

LossFunction = Callable[[Any, Any], Tensor]  # (model, batch) -> scalar mean loss


class NonFinitePass(ArithmeticError):
    """Under a GradScaler, a pass gave a value that is not finite: the step is skipped."""


class Stopwatch:
    """The seconds of each kind of pass; on a CUDA device by events, read once at the end."""

    def __init__(self, device: torch.device) -> None:
        """Time passes that run on `device`."""
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []
        self.passes = 0

    @contextlib.contextmanager
    def measure(self, kind: str, passes: int = 1) -> Iterator[None]:
        """Time the block as passes of this kind."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((kind, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[kind] = self._seconds.get(kind, 0.0) + time.perf_counter() - start
        self.passes += passes

    def seconds(self) -> dict[str, float]:
        """Seconds by kind of pass."""
        for kind, begin, end in self._events:
            end.synchronize()
            self._seconds[kind] = self._seconds.get(kind, 0.0) + begin.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)


@dataclasses.dataclass
class PassResult:
    """A pass's mean loss (detached, fp32 or wider) and the gradients that it was asked for, one per parameter or None.

    drawn: the generators after the parts that gave the magnitudes' gradient.
    """

    loss: Tensor
    direction: list[Tensor | None]
    magnitude: list[Tensor | None]
    seen_dtypes: set[torch.dtype]
    drawn: PassState


class Passes:
    """Runs passes over a model for two groups of parameters; the parameters' `.grad` must be None and is None afterwards."""

    def __init__(
        self,
        model: Any,
        lower: FlatParameters,
        upper: FlatParameters,
        grad_scaler: Any,
        process_group: Any,
        distributed: bool,
        stopwatch: Stopwatch,
        graphs: PassGraphs | None = None,
    ) -> None:
        """Keep what every pass needs. graphs: record and replay passes."""
        self.model, self.lower, self.upper, self.stopwatch, self._graphs = model, lower, upper, stopwatch, graphs
        self.scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        self._group, self.distributed = process_group, distributed
        self.touched: set[int] = set()  # the identities of parameters that had a gradient in a pass
        self._devices = devices = {parameter.device for parameter in (*lower.parameters, *upper.parameters)}
        # autograd gives a GPU a thread of its own, on which the layers' Python runs with cold caches: half as fast as here
        self._one_thread = len(devices) == 1 and not distributed and next(iter(devices)).type == "cuda"

    @functools.cached_property
    def _trained(self) -> list[nn.Parameter]:
        """Every parameter that requires gradients, of a level or not."""
        everything = {id(parameter): parameter for parameter in (*self.lower.parameters, *self.upper.parameters)}
        if isinstance(self.model, nn.Module):
            everything |= {id(parameter): parameter for parameter in self.model.parameters()}
        return [parameter for parameter in everything.values() if parameter.requires_grad]

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Keep a wrapper that averages gradients itself from doing so: every pass's are averaged here."""
        no_sync = getattr(self.model, "no_sync", None)
        return no_sync() if self.distributed and no_sync is not None else contextlib.nullcontext()

    @contextlib.contextmanager
    def requiring(self, needs: set[str]) -> Iterator[None]:
        """Let only the needed groups require gradients, so that a backward pass computes nothing else."""
        wanted = {"direction": self.lower.parameters, "magnitude": self.upper.parameters}
        kept = {id(parameter) for group in needs for parameter in wanted[group]}
        off = [parameter for parameter in self._trained if parameter.requires_grad and id(parameter) not in kept]
        try:
            for parameter in off:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in off:
                parameter.requires_grad_(True)

    def run(
        self,
        kind: str,
        loss_fn: LossFunction,
        batch: Any,
        needs: set[str],
        penalty: Callable[[Any], Tensor] | None = None,
        differentiate_norm: bool | None = None,
        point: DirectionPoint | None = None,
        magnitude_parts: int | None = None,
    ) -> PassResult:
        """One pass over a batch or its micro-batches. A penalty adds to the directions' gradient only, not to the loss returned.

        point: where the directions are, given where another pass runs there too. magnitude_parts: the magnitudes' gradient is
        that of the first so many parts alone, rounded as in a pass over these; the other parts compute none. None: of all.

        Raises TypeError or ValueError where `loss_fn` does not return a scalar, NonFinitePass under a GradScaler.
        """
        losses: list[Tensor] = []
        seen: set[torch.dtype] = set()
        magnitude: list[Tensor | None] = []
        drawn: PassState  # after part `last`, which there always is
        parts = parts_of(batch)
        last = len(parts) if magnitude_parts is None else magnitude_parts
        share = 1.0 if last == len(parts) else sum(weight for _, weight in parts[:last])
        if magnitude_parts is not None:
            self._check_common(share)
        if point is None and len(parts) > 1:
            point = self.lower.point()
        with self.stopwatch.measure(kind), torch.enable_grad(), self.no_sync():
            for number, (part, weight) in enumerate(parts, 1):
                own = needs if number <= last else needs - {"magnitude"}
                compute = functools.partial(self._differentiate, loss_fn, needs=own, differentiate_norm=differentiate_norm)
                if self._graphs is None:
                    loss, dtypes = compute(part, weight / share, point=point)
                else:
                    loss, dtypes = self._graphs.run(loss_fn, differentiate_norm, own, part, weight / share, compute)
                losses.append(loss.to(torch.promote_types(loss.dtype, torch.float32)) * weight)
                seen |= dtypes
                if number == last:
                    drawn = PassState(self._devices)
                    magnitude = self._take(self.upper.parameters) if "magnitude" in needs else []
            if penalty is not None:
                with self.requiring({"direction"}), pass_mode(needs={"direction"}):
                    self._backward(checked_loss(penalty(self.model), "the penalty"), 1.0 / share)
            direction = self._take(self.lower.parameters) if "direction" in needs else []
        result = PassResult(torch.stack(losses).sum(), direction, magnitude, seen, drawn)
        result.direction = self._combined(self.lower, direction, kind, share)
        result.magnitude = self._combined(self.upper, magnitude, kind)
        return result

    def _differentiate(
        self,
        loss_fn: LossFunction,
        batch: Any,
        weight: float | Tensor,
        needs: set[str],
        differentiate_norm: bool | None,
        point: DirectionPoint | None = None,
    ) -> tuple[Tensor, set[torch.dtype]]:
        """(The detached loss of one batch, the dtypes of its products); adds the gradient of weight * loss to `.grad`."""
        with self.requiring(needs), pass_mode(needs=needs, differentiate_norm=differentiate_norm, point=point) as mode:
            loss = checked_loss(loss_fn(self.model, batch))
            self._backward(loss, weight)
        return loss.detach(), mode.seen_dtypes

    def eager_dtypes(self, loss_fn: LossFunction, batch: Any) -> set[torch.dtype]:
        """The dtypes of the layers' products, from a forward of one part of the batch that leaves torch.compile out."""
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"), pass_mode() as mode:
            loss_fn(self.model, parts_of(batch)[0][0])
        return mode.seen_dtypes

    def _check_common(self, share: float) -> None:
        """Raise ValueError where FSDP2, which averages gradients inside the backward pass, would mix those of other shares."""
        if self.lower.group is not None:
            ends = torch.tensor([share, -share], dtype=torch.float64, device=self.lower.buffers[0].device)
            dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self.lower.group)
            if float(ends.sum()) > 1e-12:
                raise ValueError(
                    "with sharded parameters difference_batch must be the same share of every process's batch, got "
                    f"{-float(ends[1]):.3g} to {float(ends[0]):.3g}: give equal numbers of rows, or a callable"
                )

    def _backward(self, loss: Tensor, weight: float | Tensor) -> None:
        if isinstance(weight, Tensor):  # of a recorded pass: it may be another one in each replay
            weight = weight.to(loss.dtype)
            weighted = loss * weight
        else:
            weighted = loss if weight == 1.0 else loss * weight
        with contextlib.ExitStack() as around:
            if self._one_thread:
                around.enter_context(torch.autograd.set_multithreading_enabled(False))
            for kind in {device.type for device in self._devices}:
                if torch.is_autocast_enabled(kind):  # around the whole step: it would round what the forward has not
                    around.enter_context(torch.autocast(kind, enabled=False))
            (weighted if self.scaler is None else self.scaler.scale(weighted)).backward()

    @staticmethod
    def _take(parameters: list[nn.Parameter]) -> list[Tensor | None]:
        taken = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return taken

    def _combined(self, flat: FlatParameters, grads: list[Tensor | None], kind: str, factor: float = 1.0) -> list[Tensor | None]:
        """The average over processes of each one's factor times its gradients, the GradScaler's scale undone.

        None for a parameter that has a gradient nowhere.
        """
        if not grads:
            return grads
        if self.scaler is not None:
            factor /= self.scaler.get_scale()
        known = [grad for grad in grads if grad is not None]
        if known and factor != 1.0:
            torch._foreach_mul_(known, factor)
        touched = self.touch(flat, [grad is not None for grad in grads])
        if self.distributed:
            vector = flat.gather(grads)
            self.average(vector)
            grads = [view if had else None for view, had in zip(flat.views(vector), touched, strict=True)]
            known = [grad for grad in grads if grad is not None]
        self.check_finite(known, kind)
        return grads

    def touch(self, flat: FlatParameters, had: list[bool]) -> list[bool]:
        """Which parameters had a gradient in any process, from which had one in this; `touched` remembers them."""
        if self.distributed:
            found = torch.tensor(had, dtype=torch.float32, device=flat.buffers[0].device)
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
            had = [value > 0 for value in found.tolist()]
        self.touched.update(id(parameter) for parameter, one in zip(flat.parameters, had, strict=True) if one)
        return had

    def check_finite(self, grads: Sequence[Tensor], kind: str) -> None:
        """Raise NonFinitePass where there is a GradScaler and a gradient is not finite."""
        if self.scaler is not None and not all(bool(torch.isfinite(grad).all()) for grad in grads):
            raise NonFinitePass(f"a gradient of the {kind} pass is not finite")

    def average(self, vector: Vector) -> None:
        """The mean over processes, in place; nothing where there is one process."""
        if self.distributed:
            for part in vector:
                dist.all_reduce(part, group=self._group)
                part.div_(dist.get_world_size(self._group))

    def average_loss(self, loss: Tensor) -> Tensor:
        """The mean of a loss over processes; FSDP2 averages gradients itself, but not losses."""
        self.average([loss])
        if self.lower.group is not None:
            sum_over(self.lower.group, loss).div_(dist.get_world_size(self.lower.group))
        return loss


def checked_loss(loss: Any, name: str = "the loss") -> Tensor:
    """The loss, where it is a scalar tensor. Raises TypeError or ValueError otherwise."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} must be a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{name} must be a scalar, got {list(loss.shape)}")
    return loss.reshape(())
