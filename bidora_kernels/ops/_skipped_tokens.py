"""Backward passes of the native backend without the tokens that add nothing.

A token whose output has no gradient adds nothing to any gradient. Where a quarter of the tokens or more are such, a backward pass
leaves them out of a large enough product: padding, and in the last layers what nothing reads there, the tokens beside the one
that a classifier looks at or a prompt that is not trained on.
"""

from __future__ import annotations

from torch import Tensor

from .. import native
from ._library import flatten

TOKENS_FROM = 17  # fewer are never searched
SKIPS_FROM = 1 << 25  # multiply-adds of a product from which looking for tokens without a gradient costs little beside it
SKIPPED_SHARE = 0.25  # of the tokens: from there on gathering the others costs less than it saves
COUNTS = 32  # numbers of gathered tokens that a batch of one size can have: the library makes a kernel for each, and keeps it


def tokens_with_gradient(grad_output: Tensor, weight: Tensor) -> Tensor | None:
    """The tokens whose output has a gradient, and a few more; None where a backward pass of these alone would not be cheaper."""
    tokens = grad_output.numel() // max(1, weight.shape[0])
    if tokens < TOKENS_FROM or tokens * weight.numel() < SKIPS_FROM:
        return None
    found = native.nonzero_rows(grad_output, max(1, tokens // COUNTS))
    return found if found.numel() <= (1 - SKIPPED_SHARE) * tokens else None


def picked(x: Tensor, tokens: Tensor) -> Tensor:
    """The rows of some tokens of [..., features]."""
    return flatten(x).index_select(0, tokens)


def put_back(grad: Tensor | None, chosen: Tensor | None, tokens: int) -> Tensor | None:
    """The gradient of the chosen tokens among zeros, [tokens, features]; the gradient itself where none were chosen."""
    if grad is None or chosen is None:
        return grad
    return grad.new_zeros(tokens, grad.shape[1]).index_copy_(0, chosen, grad)
