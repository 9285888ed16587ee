"""The bilevel step: directions on the train batch, magnitudes on the validation batch through what the directions answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops._context import DirectionPoint
from .batches import first_share
from .checks import check_graphs, check_groups, check_levels, check_settings, check_sharding, dora_layers
from .estimators import Estimator, FirstOrder
from .flat import FlatParameters, Vector, add, is_finite, scaled
from .graphs import PassGraphs
from .passes import LossFunction, NonFinitePass, Passes, Stopwatch
from .radius import coarsest_dtype
from .sama import Sama, step_derivative
from .sharding import whole_value
from .snapshot import Copies, PassState, Undo, with_statistics
from .stats import Advice, Hypergradient, StepStats, step_stats
from .train_loss import TrainLoss


class BilevelOptimizer:
    """Takes the steps of a bilevel problem: min_M L_val(V*(M), M) with V*(M) = argmin_V L_train(V, M)  (BiDoRA, eq. 4-8).

    V are the parameters of the optimizer `lower` (directions, a task head), M those of `upper` (magnitudes). One step: the lower
    pass at (V, M); on an upper step the validation pass at the unrolled directions, the passes of the second-order term, and the
    hypergradient h; then V and M take their optimizers' steps, both from the same (V, M).

    model: given to `loss_fn`, else not called. estimator: how h is taken; the default `Sama()` differentiates the step that the
    lower optimizer really takes. xi: the length of the unrolled step for the other estimators, None and "lr" the lower learning
    rate per parameter group, or a number. unroll: "optimizer", the lower optimizer's own step, or "gradient", V - xi * gradient.
    penalty: a callable model -> scalar, added to the lower level's loss. upper_every: an upper part on the first of every that
    many steps. lower_scheduler, upper_scheduler: stepped once per step of their level. lower_max_norm, upper_max_norm: clip the
    gradient, the hypergradient. grad_scaler: scales every pass; one pass that is not finite skips both updates. compute_dtype:
    what the passes compute in, for the differences' radius; None takes what the DoRA layers saw, else the parameters' dtype,
    and tf32 where fp32 products run in it. difference_batch: what the second-order term's passes use of the train batch, None
    for all of it. A share, as 0.5: its first rows (keep them in random order) or MicroBatches, and the lower pass of an upper
    step takes it in two parts, weighted by rows: the loss must be a mean over rows (a dict with token labels is left whole
    unless its rows have equal numbers of them and of ones in every mask, and always under FSDP2). A callable train batch -> part:
    any part, at the price of a base pass of its own. process_group: average over its processes; under DistributedDataParallel
    the default group is taken. Under FSDP2 (`fully_shard` before the optimizers are made) every process holds its shards;
    estimators that differentiate twice, a penalty and a grad_scaler are refused there. cuda_graphs: record a pass the second
    time that its kind comes (a loss function, the shapes and plain values of a batch) and replay it from then on, which spares
    the host the launches of all but the first; for one CUDA device, without a grad_scaler or processes. What `loss_fn` and the
    model do in Python happens while a pass is recorded, not in each: no value of the device may be waited for and no random
    number of the CPU be drawn, which raises, and loss_fn must be one function, not one made anew for every step. Where recording
    raises, nothing has changed, but the device's generator may be left unusable in this process.

    The parameters' values move into flat buffers, of which they become views; everything else about them stays. A step in which
    anything raises changes nothing. After a step `.grad` is None; a parameter that had no gradient is not moved. Random numbers
    and running statistics: the train pass runs from the current state, the validation pass goes on from there, the passes of the
    second-order term rewind to the train pass's start, and the step ends where train and validation end; of random numbers
    torch's generators only, of statistics those of batch and instance normalization, not a module's other buffers.

    Raises TypeError or ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        model: Any,
        *,
        lower: torch.optim.Optimizer,
        upper: torch.optim.Optimizer,
        estimator: Estimator | None = None,
        xi: float | str | None = None,
        unroll: str = "optimizer",
        penalty: Callable[[Any], Tensor] | None = None,
        upper_every: int = 1,
        lower_scheduler: Any = None,
        upper_scheduler: Any = None,
        lower_max_norm: float | None = None,
        upper_max_norm: float | None = None,
        grad_scaler: Any = None,
        compute_dtype: torch.dtype | None = None,
        difference_batch: float | Callable[[Any], Any] | None = None,
        process_group: Any = None,
        cuda_graphs: bool = False,
    ) -> None:
        """Check the settings and move the parameters into flat buffers."""
        self.model, self.lower, self.upper = model, lower, upper
        self.estimator = Sama() if estimator is None else estimator
        self.xi, self.unroll, self.penalty, self.upper_every = xi, unroll, penalty, upper_every
        self.lower_scheduler, self.upper_scheduler = lower_scheduler, upper_scheduler
        self.lower_max_norm, self.upper_max_norm = lower_max_norm, upper_max_norm
        self.grad_scaler, self.compute_dtype, self.difference_batch = grad_scaler, compute_dtype, difference_batch
        self.process_group = process_group
        self._steps = 0
        self._left: tuple[DirectionPoint, Vector] | None = None  # where a validation pass ran and the step ended
        self._seen: set[torch.dtype] = set()  # what the latest pass that said so computed in; compiled ones may not say
        self._normalizing = with_statistics(model)
        self._advice = Advice()
        self._copies = Copies(), Copies()  # of the optimizers' states, for steps that fail
        check_settings(self)
        self._direction = FlatParameters(_parameters(lower))
        self._magnitude = FlatParameters(_parameters(upper))
        if {id(p) for p in self._direction.parameters} & {id(p) for p in self._magnitude.parameters}:
            raise ValueError("a parameter is in both the lower and the upper optimizer")
        check_sharding(self)
        check_levels(self)
        plain = getattr(model, "_orig_mod", model)  # of a compiled one
        self._distributed = process_group is not None or (
            isinstance(plain, nn.parallel.DistributedDataParallel) and dist.is_available() and dist.is_initialized()
        )
        self._graphs: PassGraphs | None = None
        if cuda_graphs:
            check_graphs(self)
            self._graphs = PassGraphs(model, self._direction, self._magnitude)

    @property
    def needs_validation(self) -> bool:
        """Whether the next step has an upper part; where it has none, `val_batch` may be None."""
        return self._steps % self.upper_every == 0

    def step(self, loss_fn: LossFunction, train_batch: Any, val_batch: Any = None) -> StepStats:
        """Take one step and say what it did; `loss_fn(model, batch)` returns a scalar mean loss.

        Raises ValueError where the step has an upper part and `val_batch` is None. Where anything raises nothing has changed.
        """
        with_upper = self.needs_validation
        if with_upper and val_batch is None:
            raise ValueError("this step has an upper part (needs_validation is True): val_batch must be given")
        self._refresh()
        undo = Undo(self)
        watch = Stopwatch(self._direction.buffers[0].device)
        result = Hypergradient()
        try:
            try:
                self._compute(result, watch, undo, loss_fn, train_batch, val_batch if with_upper else None, keep=True)
                stats = self._finish(result, watch)
                self._advice.after(stats, result.signal, self.estimator)  # a warning may be an error
                self._tell_scaler(finite=True)
            except NonFinitePass as error:
                undo.restore(passes=False)
                self._tell_scaler(finite=False)
                _clear_grads([*self._direction.parameters, *self._magnitude.parameters])
                return step_stats(result, watch, self._magnitude, skipped=str(error))
        except BaseException:
            undo.restore()
            raise
        self._steps += 1
        self._left = result.left
        return stats

    def hypergradient(self, loss_fn: LossFunction, train_batch: Any, val_batch: Any, *, terms: bool = False) -> Any:
        """The hypergradient as a list of tensors, one per upper parameter; nothing is updated.

        With `terms` two such lists, the direct and the second-order term, whose sum is the hypergradient before `max_ratio`.
        Parameters, `.grad`, optimizers, schedulers, the scaler and torch's random state are left as they were. Raises
        FloatingPointError where, under a GradScaler, a pass is not finite.
        """
        self._refresh()
        undo = Undo(self)
        result = Hypergradient()
        try:
            watch = Stopwatch(self._direction.buffers[0].device)
            self._compute(result, watch, undo, loss_fn, train_batch, val_batch, keep=False)
            direct, second_order = self._terms(result)
            if not terms:
                return self._magnitude.tensors(self._capped(direct, second_order)[0])
            return self._magnitude.tensors(direct), self._magnitude.tensors(second_order)
        except NonFinitePass as error:
            raise FloatingPointError(str(error)) from None
        finally:
            undo.restore()

    def _refresh(self) -> None:
        check_groups(self)
        self._magnitude.refresh()
        if self._direction.refresh():
            self._left = None
        if self._graphs is not None:
            self._graphs.refresh()

    def _where(self) -> tuple[DirectionPoint | None, Vector]:
        """Where the directions are, and a copy of them; the last step's, norms included, where nobody has moved them since."""
        left, self._left = self._left, None
        if left is not None and all(map(torch.equal, left[1], self._direction.buffers)):
            return left
        return None, self._direction.clone()

    def _compute(
        self,
        result: Hypergradient,
        watch: Stopwatch,
        undo: Undo,
        loss_fn: LossFunction,
        train_batch: Any,
        val_batch: Any,
        keep: bool,
    ) -> None:
        """Run the passes into `result`; with `keep` the lower optimizer's step has been taken at the end."""
        estimator, flat = self.estimator, self._direction
        passes = Passes(
            self.model, flat, self._magnitude, self.grad_scaler, self.process_group, self._distributed, watch, self._graphs
        )  # fmt: skip
        start, before = undo.start, undo.direction
        part = train_batch
        if val_batch is not None and estimator.has_second_order and isinstance(self.difference_batch, int | float):
            train_batch, part = first_share(train_batch, self.difference_batch, alike=flat.group is not None)
        shared = None if part is train_batch else len(part)
        reuse = val_batch is not None and estimator.reuses_lower_gradient and not callable(self.difference_batch)
        needs = {"direction", "magnitude"} if reuse else {"direction"}
        point = undo.point or (flat.point() if self._returns() and val_batch is not None else None)
        lower = passes.run("lower", loss_fn, train_batch, needs, self.penalty, point=point, magnitude_parts=shared)
        undo.reached = self._pass_state()
        result.train_loss = passes.average_loss(lower.loss)
        grads = lower.direction
        if val_batch is None:
            self._lower_step(grads, derive=False)
            return
        base, drawn = (self._magnitude.gather(lower.magnitude), lower.drawn) if reuse else (None, None)
        del lower

        needs = {"direction", "magnitude"} if estimator.has_second_order else {"magnitude"}
        jacobian, stepped = None, False
        there = point
        if isinstance(estimator, FirstOrder) and estimator.at == "before":
            pass
        elif self.unroll == "gradient":
            flat.set(before, self._times_xi(flat.gather(grads)), -1.0)
            there = None
        else:
            jacobian, stepped, grads = self._lower_step(grads), True, []
            there = flat.point() if keep else None
        validation = passes.run("validation", loss_fn, val_batch, needs, point=there)
        undo.reached = self._pass_state()
        result.validation_loss = passes.average_loss(validation.loss)
        result.direct = self._magnitude.gather(validation.magnitude)
        kept = there if keep and stepped and there is not None and there.norms else None
        after = flat.clone() if estimator.has_second_order or kept is not None else []
        if kept is not None:
            result.left = kept, after
        if estimator.has_second_order:
            vector = flat.gather(validation.direction)
            dtype = self._radius_dtype(validation.seen_dtypes, passes, loss_fn, val_batch)
            del validation
            if jacobian is not None:
                torch._foreach_mul_(vector, jacobian)
                del jacobian
            elif estimator.takes_xi:
                self._times_xi(vector)
            if callable(self.difference_batch):
                part = self.difference_batch(train_batch)
            loss = TrainLoss(passes, loss_fn, part, start, before, after, base, drawn, dtype, self.penalty, point)
            try:
                result.second_order = self._second_order(loss, vector)
            finally:
                flat.set(after)
                undo.reached.restore()
            result.radius, result.signal = loss.radius, loss.signal
        result.touched = passes.touched
        if keep and not stepped:
            flat.set(before)
            self._lower_step(grads)

    def _radius_dtype(self, seen: set[torch.dtype], passes: Passes, loss_fn: LossFunction, batch: Any) -> torch.dtype:
        """The coarsest dtype that a difference goes through; where no layer has said its own yet, one eager forward is asked."""
        if self.compute_dtype is not None:
            return self.compute_dtype
        own = {buffer.dtype for buffer in self._direction.buffers}
        self._seen = seen or self._seen
        if not self._seen:
            self._seen = own | (passes.eager_dtypes(loss_fn, batch) if dora_layers(self.model) else set())
        return coarsest_dtype(self._seen | own, self._direction.buffers[0].device)

    def _returns(self) -> bool:
        """Whether a second pass of a step runs where the lower pass does."""
        if isinstance(self.estimator, FirstOrder):
            return self.estimator.at == "before"
        return self.estimator.reuses_lower_gradient and callable(self.difference_batch)

    def _second_order(self, loss: TrainLoss, vector: Vector) -> Vector | None:
        """-q(vector), or None where the vector is zero or its length underflows."""
        if float(self._direction.norm(vector)) < torch.finfo(vector[0].dtype).tiny:
            return None
        return scaled(self.estimator.mixed_derivative(loss, self.estimator.response(loss, vector)), -1.0)

    def _lower_step(self, grads: list[Tensor | None], derive: bool = True) -> Vector | None:
        """The lower optimizer's step on clipped gradients; for Sama also J, from the state before it, where it will be used."""
        parameters = self._direction.parameters
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        clip = 1.0
        if self.lower_max_norm is not None:
            total = torch.nn.utils.clip_grad_norm_(parameters, self.lower_max_norm)
            clip = min(1.0, self.lower_max_norm / (whole_value(total) + 1e-6))
        jacobian = None
        if derive and isinstance(self.estimator, Sama):
            jacobian = step_derivative(self.lower, self._direction, grads, self.estimator.horizon, clip)
        _step(self.lower, parameters)
        return jacobian

    def _times_xi(self, vector: Vector) -> Vector:
        """vector * xi in place, xi being one number or the learning rate of each parameter's group."""
        if self.xi is None or self.xi == "lr":
            rates = {id(p): float(group["lr"]) for group in self.lower.param_groups for p in group["params"]}
        else:
            rates = {id(parameter): float(self.xi) for parameter in self._direction.parameters}
        torch._foreach_mul_(self._direction.views(vector), [rates[id(p)] for p in self._direction.parameters])
        return vector

    def _terms(self, result: Hypergradient) -> tuple[Vector, Vector]:
        direct = self._magnitude.zeros() if result.direct is None else result.direct
        return direct, self._magnitude.zeros() if result.second_order is None else result.second_order

    def _capped(self, direct: Vector, second_order: Vector) -> tuple[Vector, bool]:
        """direct + second_order, the latter cut to Sama's max_ratio, and whether it was."""
        ratio = getattr(self.estimator, "max_ratio", math.inf)
        length, limit = float(self._magnitude.norm(second_order)), ratio * float(self._magnitude.norm(direct))
        if length > limit:
            return add(direct, second_order, limit / length), True
        return add(direct, second_order), False

    def _finish(self, result: Hypergradient, watch: Stopwatch) -> StepStats:
        """The upper update and the schedulers."""
        capped = None
        if result.direct is not None:
            direct, second_order = self._terms(result)
            hypergradient, capped = self._capped(direct, second_order)
            stats = step_stats(result, watch, self._magnitude, hypergradient, capped)
            if self.grad_scaler is not None and not is_finite(hypergradient):
                raise NonFinitePass("the hypergradient is not finite")
            for parameter, grad in zip(self._magnitude.parameters, self._magnitude.tensors(hypergradient), strict=True):
                parameter.grad = grad if id(parameter) in result.touched else None  # as PyTorch: no gradient, no step
            if self.upper_max_norm is not None:
                torch.nn.utils.clip_grad_norm_(self._magnitude.parameters, self.upper_max_norm)
            _step(self.upper, self._magnitude.parameters)
        else:
            stats = step_stats(result, watch, self._magnitude)
        if self.lower_scheduler is not None:
            self.lower_scheduler.step()
        if self.upper_scheduler is not None and result.direct is not None:
            self.upper_scheduler.step()
        return stats

    def _tell_scaler(self, finite: bool) -> None:
        """Let the GradScaler grow or back off, by a gradient of a parameter that nobody trains."""
        if self.grad_scaler is None or not self.grad_scaler.is_enabled():
            return
        device = self._direction.buffers[0].device
        probe = nn.Parameter(torch.zeros((), device=device))
        probe.grad = torch.zeros_like(probe) if finite else torch.full_like(probe, math.inf)
        self.grad_scaler.unscale_(torch.optim.SGD([probe], lr=0.0))
        self.grad_scaler.update()

    def _pass_state(self) -> PassState:
        buffers = (*self._direction.buffers, *self._magnitude.buffers)
        return PassState([buffer.device for buffer in buffers], self._normalizing)

    def state_dict(self) -> dict[str, Any]:
        """The optimizers', schedulers' and scaler's states and the number of steps; the parameters are the model's."""
        state: dict[str, Any] = {"steps": self._steps}
        for name, part in self._parts():
            state[name] = None if part is None else part.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned. Raises ValueError where it belongs to other settings; nothing has changed then."""
        missing = [name for name, _ in (*self._parts(), ("steps", None)) if name not in state]
        if missing:
            raise ValueError(f"the state has no {', '.join(missing)}")
        for name, part in self._parts():
            if (state[name] is None) != (part is None):
                holds, has = ("no", "one") if state[name] is None else ("a", "none")
                raise ValueError(f"the state holds {holds} {name}, this optimizer has {has}")
        for name, part in self._parts():
            if part is not None:
                part.load_state_dict(state[name])
        self._steps = int(state["steps"])

    def _parts(self) -> list[tuple[str, Any]]:
        return [(n, getattr(self, n)) for n in ("lower", "upper", "lower_scheduler", "upper_scheduler", "grad_scaler")]


def _step(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """A step, after which nothing is left of the gradients, nor of 16-bit copies that an autocast around it all has kept."""
    optimizer.step()
    torch.clear_autocast_cache()
    _clear_grads(parameters)


def _clear_grads(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
