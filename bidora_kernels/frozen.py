"""The linear layers of a model that are not adapted: most of a step's products where only some layers are."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from . import functional


class FrozenLinear(nn.Linear):
    """An `nn.Linear` that is not trained: the same numbers but for rounding, and a cheaper pass on the native backend.

        y = x weight^T + bias

    `apply_dora` makes them of the plain linear layers that it freezes (of transformers' `Conv1D` its twin, `FrozenConv1D`), and
    `merge_and_unload` makes them plain again. x is [..., in], weight [out, in], bias [out]. Where a quarter of the tokens of
    the output or more have no gradient, the backward pass leaves them out (`functional.frozen_linear`). In small calls (below
    2^26 multiply-adds), where weight or bias are trained after all, in a compiled model, on another backend than native and on
    every device but a CPU, it is `F.linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] for x [..., in]; errors as of `nn.Linear`."""
        return functional.frozen_linear(x, self.weight, self.bias)


@functools.cache
def _frozen_conv1d() -> type[nn.Module]:
    """`FrozenConv1D`, made where transformers is there."""
    from transformers.pytorch_utils import Conv1D

    class FrozenConv1D(Conv1D):  # type: ignore[misc,no-any-unimported]
        """`FrozenLinear` for transformers' `Conv1D`, whose weight is stored [in, out]."""

        def forward(self, x: Tensor) -> Tensor:
            """Return [..., out] for x [..., in]."""
            return functional.frozen_linear(x, self.weight.t(), self.bias)

    FrozenConv1D.__qualname__ = "FrozenConv1D"  # where a copy or a file looks for it
    return FrozenConv1D


def __getattr__(name: str) -> type[nn.Module]:
    if name == "FrozenConv1D":
        return _frozen_conv1d()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _frozen_kind(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The frozen class of a plain one, None for every other class."""
    if kind is nn.Linear:
        return FrozenLinear
    return _frozen_conv1d() if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D") else None


def is_frozen(module: nn.Module) -> bool:
    """Whether the module is a `FrozenLinear` or `FrozenConv1D`."""
    return type(module).__module__ == __name__


def use_frozen_layers(model: nn.Module) -> None:
    """Make the plain, untrained linear layers of a model `FrozenLinear` and `FrozenConv1D`, in place.

    The module stays the same object: hooks, ties and references to it hold. Left alone are subclasses and layers with a forward
    of their own.
    """
    for module in model.modules():
        frozen = _frozen_kind(type(module))
        if frozen is not None and "forward" not in vars(module) and not any(p.requires_grad for p in module.parameters()):
            module.__class__ = frozen


def use_plain_layers(model: nn.Module) -> None:
    """Make the layers of a model that `use_frozen_layers` changed plain again, in place."""
    for module in model.modules():
        if is_frozen(module):
            module.__class__ = type(module).__base__  # type: ignore[assignment]
