"""The linear layers of a model that are not adapted: most of a step's products where only some layers are."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional


class FrozenLinear(nn.Linear):
    """An `nn.Linear` that is not trained: the same numbers, and a cheaper backward pass on the native backend.

        y = x weight^T + bias

    `apply_dora` makes them of the plain linear layers that it freezes, `merge_and_unload` makes them plain again. x is [..., in],
    weight [out, in], bias [out]. Where most tokens of the output have no gradient, the pass leaves those out
    (`functional.frozen_linear`); where weight or bias are trained after all, and on every other device, it is `F.linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] for x [..., in]; errors as of `nn.Linear`."""
        return functional.frozen_linear(x, self.weight, self.bias)


def to_frozen(model: nn.Module) -> None:
    """Turn the plain, untrained linear layers of a model into `FrozenLinear`, in place.

    The module stays the same object: hooks, ties and references to it hold. Left alone are subclasses of `nn.Linear` and layers
    with a forward of their own.
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module) and not any(p.requires_grad for p in module.parameters()):
            module.__class__ = FrozenLinear


def to_plain(model: nn.Module) -> None:
    """Turn every `FrozenLinear` of a model back into a plain `nn.Linear`, in place."""
    for module in model.modules():
        if type(module) is FrozenLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
