"""What a step may change, copied so that a failed step changes nothing: optimizer states, generators, statistics, `.grad`."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .sharding import local_part, reshard

if TYPE_CHECKING:
    from .optimizer import BilevelOptimizer


def with_statistics(model: Any) -> list[nn.Module]:
    """The modules that keep running statistics, which a pass in training mode moves: batch and instance normalization."""
    return [m for m in model.modules() if isinstance(m, _NormBase)] if isinstance(model, nn.Module) else []


class PassState:
    """What passes move besides gradients: torch's generators on the CPU and on the given devices, running statistics."""

    def __init__(self, devices: Iterable[torch.device], modules: Iterable[nn.Module] = ()) -> None:
        """Copy the current states."""
        self._statistics = Copies()
        self._statistics.take(buffer for module in modules for buffer in module.buffers(recurse=False))
        self._cpu = torch.get_rng_state()
        kinds = {device for device in devices if device.type not in ("cpu", "meta")}
        self._devices = [(device, torch.get_device_module(device).get_rng_state(device)) for device in kinds]

    def drew_as(self, other: PassState) -> bool:
        """Whether the generators stand where they do in `other`."""
        own, others = ([state for _, state in each._devices] for each in (self, other))
        return torch.equal(self._cpu, other._cpu) and len(own) == len(others) and all(map(torch.equal, own, others))

    def restore(self) -> None:
        """Make the copied states current."""
        self._statistics.put_back()
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, device)


class Copies:
    """Copies of tensors, in few kernels; in the same memory while the tensors are the same ones."""

    def __init__(self) -> None:
        """Nothing is copied yet."""
        self._of: list[Tensor] = []
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []  # tensors of one kind, their copies
        self._scalars: list[tuple[list[Tensor], Tensor]] = []  # tensors of one number each, as an optimizer's steps are

    def take(self, values: Iterable[Any]) -> None:
        """Copy the tensors among the values as they are now."""
        tensors = [value for value in values if torch.is_tensor(value)]
        with torch.no_grad():
            if len(tensors) != len(self._of) or not all(map(operator.is_, tensors, self._of)):
                self._lay_out(tensors)
            for originals, copies in self._pairs:
                torch._foreach_copy_(copies, originals)
            for scalars, numbers in self._scalars:
                torch.stack(scalars, out=numbers)

    def _lay_out(self, tensors: list[Tensor]) -> None:
        self._of, self._pairs, self._scalars = [], [], []  # nothing is held twice, nor taken for copied where memory runs out
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for tensor in tensors:
            part = local_part(tensor)
            alike.setdefault((part.dtype, part.device, part.ndim == 0), []).append(part)
        for (_, _, is_scalar), parts in alike.items():
            if is_scalar:
                self._scalars.append((parts, torch.stack(parts)))
            else:
                self._pairs.append((parts, [torch.empty_like(part) for part in parts]))
        self._of = tensors

    def put_back(self) -> None:
        """Write the copies into the tensors that they were taken of."""
        with torch.no_grad():
            for originals, copies in self._pairs:
                torch._foreach_copy_(originals, copies)
            for scalars, numbers in self._scalars:
                torch._foreach_copy_(scalars, list(numbers.unbind()))


class OptimizerState:
    """The state and the settings of an optimizer, put back exactly and into the same tensors."""

    def __init__(self, optimizer: torch.optim.Optimizer, copies: Copies) -> None:
        """Copy every tensor of the state, and the groups' settings. copies: where to, no others' meanwhile."""
        self._optimizer, self._copies = optimizer, copies
        self._entries = {parameter: dict(state) for parameter, state in optimizer.state.items()}
        self._groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        copies.take(value for part in (*self._entries.values(), *self._groups) for value in part.values())

    def restore(self) -> None:
        """Put everything back."""
        state = self._optimizer.state
        state.clear()
        state.update({parameter: dict(entry) for parameter, entry in self._entries.items()})
        self._copies.put_back()
        for group, settings in zip(self._optimizer.param_groups, self._groups, strict=True):
            for key in [key for key in group if key != "params" and key not in settings]:
                del group[key]
            group.update(settings)


class Grads:
    """The `.grad` of parameters, taken away for the time of a step; the tensors are kept, not copied."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take `.grad` off every parameter."""
        self._kept = [(parameter, parameter.grad) for parameter in parameters]
        for parameter, _ in self._kept:
            parameter.grad = None

    def restore(self) -> None:
        """Put the same tensors back."""
        for parameter, grad in self._kept:
            parameter.grad = grad


class SchedulerState:
    """The state of a learning-rate scheduler."""

    def __init__(self, scheduler: Any) -> None:
        """Copy the state."""
        self._scheduler = scheduler
        self._state = copy.deepcopy(scheduler.state_dict())

    def restore(self) -> None:
        """Put the state back."""
        self._scheduler.load_state_dict(self._state)


class Undo:
    """Everything that a step may change, as it was before the step."""

    def __init__(self, owner: BilevelOptimizer) -> None:
        """Copy it."""
        self._owner = owner
        self.point, self.direction = owner._where()
        self.magnitude = owner._magnitude.clone()
        self._grads = Grads([*owner._direction.parameters, *owner._magnitude.parameters])
        self._parts: list[Any] = [OptimizerState(owner.lower, owner._copies[0]), OptimizerState(owner.upper, owner._copies[1])]
        schedulers = [owner.lower_scheduler, owner.upper_scheduler]
        self._parts += [SchedulerState(scheduler) for scheduler in schedulers if scheduler is not None]
        self.start = owner._pass_state()
        self.reached = self.start  # where the train and the validation pass have come to

    def restore(self, passes: bool = True) -> None:
        """Put everything back, what passes move too unless told to leave it where they came to."""
        self._owner._direction.set(self.direction)
        self._owner._magnitude.set(self.magnitude)
        if self._owner._direction.group is not None:
            reshard(self._owner.model)
        for part in reversed(self._parts):
            part.restore()
        self._grads.restore()
        (self.start if passes else self.reached).restore()
