"""What one pass needs, told to the operations without touching the model's code.

A bilevel step runs several forward and backward passes over one model, and each wants other gradients: the lower pass the
directions', the difference passes the magnitudes' alone. `pass_mode` says so for everything called inside it; the operations
read it at forward time and save and compute only that.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

GROUPS = frozenset({"direction", "magnitude"})


def _no_direction(tensor: Tensor) -> Tensor | None:
    return None


@dataclasses.dataclass(eq=False)
class DirectionPoint:
    """A state of the directions that several passes run at: row norms found in one of them are kept here for the others.

    value_of: a direction's value at this point, None for a tensor that is no direction. others: points whose passes come next,
    so that one read of a weight may give the norms of all. norms: with what the weight was, by the layer's own key.
    """

    value_of: Callable[[Tensor], Tensor | None]
    others: tuple[DirectionPoint, ...] = ()
    norms: dict[Any, tuple[Tensor, Any, int]] = dataclasses.field(default_factory=dict)

    def release(self) -> None:
        """Let go of everything: layers remember the mode of their last pass, and it the point."""
        self.value_of, self.others = _no_direction, ()
        self.norms.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model, pickled or not, holds no other model's directions."""
        return DirectionPoint, (_no_direction,)


@dataclasses.dataclass(frozen=True)
class PassMode:
    """The settings of a pass. `None` leaves a setting as the layer has it.

    needs: which parameter groups receive gradients, a subset of {"direction", "magnitude"}.
    differentiate_norm: overrides the layers' `detach_norm` (True differentiates the norm).
    backend: overrides the backend choice by name.
    precise: 16-bit layers compute their base output in fp32, for passes whose signal is a small change.
    reuse: overrides the layers' `reuse`, the number of passes that run with the same parameters.
    point: where the directions are, given where another pass runs there too or the norms of others are wanted with these.
    seen_dtypes: filled by the operations with the dtypes their matrix products ran in.
    """

    needs: frozenset[str] = GROUPS
    differentiate_norm: bool | None = None
    backend: str | None = None
    precise: bool = False
    reuse: int | None = None
    point: DirectionPoint | None = None
    seen_dtypes: set[torch.dtype] = dataclasses.field(default_factory=set, compare=False)

    def saw(self, dtype: torch.dtype) -> None:
        """Record the dtype that an operation's matrix product runs in."""
        if not torch.compiler.is_compiling():
            self.seen_dtypes.add(dtype)


_mode: contextvars.ContextVar[PassMode | None] = contextvars.ContextVar("bidora_pass_mode", default=None)
_DEFAULT = PassMode()
# torch.compile cannot trace a context variable, and a graph traced under one mode must not serve another: it guards on these
# plain values, which follow the latest `pass_mode` of any thread
_Traced = tuple[bool, bool, bool | None, str | None, bool]
_traced: _Traced = (True, True, None, None, False)
_epoch = 0


def current_mode() -> PassMode:
    """The mode of the innermost `pass_mode`, or the default one (every gradient, settings as the layers have them)."""
    if torch.compiler.is_compiling():
        direction, magnitude, differentiate_norm, backend, precise = _traced
        needs = frozenset((["direction"] if direction else []) + (["magnitude"] if magnitude else []))
        return PassMode(needs, differentiate_norm, backend, precise)
    return eager_mode()


def eager_mode() -> PassMode:
    """The same where nothing is being compiled."""
    return _mode.get() or _DEFAULT


@contextlib.contextmanager
def adopt_mode(mode: PassMode) -> Iterator[PassMode]:
    """Run under a mode captured earlier: what a recomputation inside backward does."""
    global _traced
    token, outer_traced = _mode.set(mode), _traced
    _traced = ("direction" in mode.needs, "magnitude" in mode.needs, mode.differentiate_norm, mode.backend, mode.precise)
    try:
        yield mode
    finally:
        _mode.reset(token)
        _traced = outer_traced


@contextlib.contextmanager
def pass_mode(
    needs: Collection[str] | None = None,
    differentiate_norm: bool | None = None,
    backend: str | None = None,
    precise: bool | None = None,
    reuse: int | None = None,
    point: DirectionPoint | None = None,
) -> Iterator[PassMode]:
    """Set what the operations called inside compute; arguments left at None are inherited from an enclosing `pass_mode`.

    needs: groups that receive gradients, a subset of {"direction", "magnitude"}. differentiate_norm: overrides `detach_norm`.
    backend: one by name, checked where an operation needs it. precise: 16-bit layers compute their base output in fp32. reuse:
    how many passes run with the same parameters. point: where the directions are, as `BilevelOptimizer` gives it.

    The mode covers the forward and the backward of a pass. A segment under activation checkpointing runs its forward again
    inside backward, perhaps on another thread; the layers of this library then use the mode of their first forward. A thread that
    is started inside (`nn.DataParallel` starts some) begins with the default mode.

    Raises ValueError for a group that is not "direction" or "magnitude".
    """
    outer = current_mode()
    if needs is not None and not GROUPS.issuperset(needs):
        raise ValueError(f"needs must be a subset of {sorted(GROUPS)}, got {sorted(needs)}")
    mode = PassMode(
        needs=outer.needs if needs is None else frozenset(needs),
        differentiate_norm=outer.differentiate_norm if differentiate_norm is None else differentiate_norm,
        backend=outer.backend if backend is None else backend,
        precise=outer.precise if precise is None else precise,
        reuse=outer.reuse if reuse is None else reuse,
        point=outer.point if point is None else point,
    )
    with adopt_mode(mode):
        yield mode


def inside_backward() -> bool:
    """Whether this thread is executing an autograd graph: a forward seen now is a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def bump_parameter_epoch() -> None:
    """Tell every layer that parameters may have changed in a way that autograd's version counter does not show.

    Whoever writes parameters through an alias of their storage (the flat buffers of `bilevel/flat.py`) calls it after the write.
    Every step of a `torch.optim.Optimizer` does.
    """
    global _epoch
    _epoch += 1


def _after_optimizer_step(*_: Any) -> None:
    bump_parameter_epoch()  # a fused optimizer writes past the version counter


register_optimizer_step_post_hook(_after_optimizer_step)


def parameter_epoch() -> int:
    """The number of announced writes so far; caches keep it as part of their key."""
    return _epoch
