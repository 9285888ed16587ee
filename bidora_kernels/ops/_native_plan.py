"""How the native backend runs a layer: which matrix products, over which weight.

Weight plan: write the merged weight W' = c * V into the workspace and take one matrix product with it; W' is rebuilt for the
backward pass, not kept. Activation plan: multiply with the frozen weight and correct the output. Many tokens favor the first,
few the second; `weight_plan_pays` counts the bytes. Up to FEW_TOKENS one kernel does it all, reading the weight in its own dtype.

Products run in the norm's dtype (fp32, or fp64 for an fp64 weight), also for 16-bit layers: W' in fp32 loses no small update,
and inputs are not rounded to the product dtype. But where the processor has bf16 instructions, which multiply four times as fast,
a bf16 pass takes them: W' is then rounded with a fixed dither, as on the GPU. Dropout, precise passes and the forward that one
kernel does for few tokens stay in fp32. Which library multiplies in fp32 is `native.takes_onednn`'s choice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import native, reference
from ._library import as_dtype, flatten, rows
from ._skipped_tokens import picked, put_back, tokens_with_gradient
from ._workspace import rows_per_block, workspace

FEW_TOKENS = 16
LIBRARY_RANK = 32  # from here on the library's products form the gradients of lora_A and lora_B


def weight_plan_pays(tokens: int, weight: Tensor, dtype: torch.dtype, norm_known: bool, backward: bool = False) -> bool:
    """Whether W' costs less memory traffic than correcting the product with the frozen weight.

    W' is written once and read back. The activation plan reads and writes the output once more, reads x once more, and without
    known norms reads the weight once more; for the gradient of x it reads and writes both the output's gradient and the result.
    A weight in another dtype than the product's must be converted, which is W' already.
    """
    out_features, in_features = weight.shape
    if weight.dtype != dtype:
        return True
    if backward:
        activation = tokens * 2 * (out_features + in_features)
    else:
        activation = tokens * (2 * out_features + in_features) + (0 if norm_known else out_features * in_features)
    return activation > 2 * out_features * in_features


def takes_few_tokens(tokens: int, weight: Tensor, dtype: torch.dtype, norm_known: bool) -> bool:
    """Whether one kernel computes the whole output, instead of either plan's products; a weight in any dtype is read in place."""
    if tokens > FEW_TOKENS or native.is_transposed(weight):
        return False
    return weight.dtype != dtype or not weight_plan_pays(tokens, weight, dtype, norm_known)


def in_bf16(product_dtype: torch.dtype, weight: Tensor, dropped: bool) -> bool:
    """Whether the products with W' take bf16 operands."""
    bf16 = product_dtype is torch.bfloat16 and weight.dtype is not torch.float64
    return bf16 and not dropped and native.multiplies_bf16()


def added_bias(bias: Tensor | None, taken_bf16: bool) -> Tensor | None:
    """The bias as a pass adds it, and as its backward must subtract it from y again: beside bf16 operands it is one, too."""
    return bias if bias is None or not taken_bf16 else as_dtype(bias, torch.bfloat16)


def takes_weight_plan(tokens: int, weight: Tensor, operands: torch.dtype, norm_known: bool, backward: bool = False) -> bool:
    """Whether W' is written; bf16 operands mean one."""
    dtype = reference.norm_dtype(weight)
    return operands is not dtype or weight_plan_pays(tokens, weight, dtype, norm_known, backward)


def fits_workspace(weight: Tensor, operands: torch.dtype) -> bool:
    """Whether one part is the whole layer."""
    out_features, in_features = weight.shape
    return out_features <= rows_per_block(in_features, operands)


def whole_layer(
    x: Tensor, weight: Tensor, product_dtype: torch.dtype, norm_known: bool, backward: bool
) -> tuple[torch.dtype, bool] | None:
    """(The operands' dtype, whether W' is written) where one operator computes the layer's output, or its gradient of x.

    That is the usual call of a training step. None for a vector, for few tokens, whose output one kernel computes, and where W'
    is written in parts.
    """
    if x.dim() < 2:
        return None
    tokens, dtype = x.numel() // max(1, weight.shape[1]), reference.norm_dtype(weight)
    if not backward and takes_few_tokens(tokens, weight, dtype, norm_known):
        return None
    operands = torch.bfloat16 if in_bf16(product_dtype, weight, dropped=False) else dtype
    if not takes_weight_plan(tokens, weight, operands, norm_known, backward):
        return operands, False
    return (operands, True) if fits_workspace(weight, operands) else None


def kept_dtype(
    weight: Tensor, dropped: bool, precise: bool, product_dtype: torch.dtype, out_dtype: torch.dtype, keeps: bool,
    has_bias: bool,
) -> torch.dtype | None:  # fmt: skip
    """The dtype of what the backward needs beyond y for the magnitude's gradient, None where y is enough.

    With dropout it is V x_dropped; a precise pass keeps the y that was not rounded to 16 bits.
    """
    dtype = reference.norm_dtype(weight)
    return dtype if keeps and (dropped or (precise and out_dtype != dtype)) else None


class Layer:
    """The constants of one call in the accumulating dtype, and the weights of its products in blocks of output features.

    `operands`: the dtype of the operands of a product with W', the accumulating one or bf16.
    """

    def __init__(
        self,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        scaling: float,
        in_bf16: bool,
    ) -> None:
        self.dtype = reference.norm_dtype(weight)
        self.operands = torch.bfloat16 if in_bf16 else self.dtype
        self.weight, self.scaling = weight, scaling
        self.lora_A, self.lora_B, self.magnitude = (self.constant(tensor) for tensor in (lora_A, lora_B, magnitude))
        self.bias = None if bias is None else self.constant(bias)

    def constant(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype is self.dtype and tensor.is_contiguous() else tensor.to(self.dtype).contiguous()

    def flat(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[tokens, features] in the accumulating dtype or another, rows contiguous."""
        x, dtype = flatten(x), dtype or self.dtype
        return rows(x if x.dtype is dtype else x.to(dtype))

    def parts(self) -> Iterator[slice]:
        """Slices of the output features, each with a merged weight that fits the workspace."""
        out_features, in_features = self.weight.shape
        step = rows_per_block(in_features, self.operands)
        for start in range(0, out_features, step):
            yield slice(start, min(start + step, out_features))

    def merged(self, norm: Tensor, norm_known: bool, minus_weight: bool = False, part: slice | None = None) -> Tensor:
        """W' of a part of the output features (all without one) in the workspace; norms are filled in unless they are known."""
        weight, lora_B, magnitude = self.weight, self.lora_B, self.magnitude
        if part is not None:
            weight, lora_B, magnitude, norm = weight[part], lora_B[part], magnitude[part], norm[part]
        block = workspace(weight.shape[0], weight.shape[1], self.operands, native.is_transposed(weight))
        dither = self.operands is not self.dtype
        native.merged_weight(weight, self.lora_A, lora_B, magnitude, self.scaling, norm, block, norm_known, minus_weight, dither)
        return block

    def merged_blocks(self, norm: Tensor, minus_weight: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice of output features, W' of them in the workspace) for known norms."""
        for part in self.parts():
            yield part, self.merged(norm, True, minus_weight, part)

    def frozen_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice of output features, the frozen weight of them in the accumulating dtype)."""
        if self.weight.dtype == self.dtype:
            yield slice(0, self.weight.shape[0]), self.weight
            return
        for part in self.parts():
            weight = self.weight[part]
            yield part, workspace(weight.shape[0], weight.shape[1], self.dtype, native.is_transposed(weight)).copy_(weight)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    bias: Tensor | None,
    x_dropped: Tensor | None,
    scaling: float,
    precise: bool,
    product_dtype: torch.dtype,
    out_dtype: torch.dtype,
    keeps: bool,
    watches_output: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
    """(y in `out_dtype`, norm, what the backward needs beyond y or None, () as nothing is left to use again).

    y is [tokens, out] or [..., out] as x is [..., in].
    """
    if x_dropped is None and not precise:
        whole = whole_layer(x, weight, product_dtype, norm is not None, backward=False)
        if whole is not None:
            operands, merges = whole
            block = workspace(weight.shape[0], weight.shape[1], operands, native.is_transposed(weight)) if merges else None
            y, norm = native.dora_linear(as_dtype(x, operands), weight, lora_A, lora_B, magnitude, bias, scaling, block, norm)
            return as_dtype(y, out_dtype), norm, None, ()
    x, out_features, norm_known = flatten(x), weight.shape[0], norm is not None
    dtype = reference.norm_dtype(weight)
    few = x_dropped is None and takes_few_tokens(x.shape[0], weight, dtype, norm_known)
    bf16 = in_bf16(product_dtype, weight, x_dropped is not None)
    layer = Layer(weight, lora_A, lora_B, magnitude, added_bias(bias, bf16 and (keeps or not few)), scaling, bf16 and not few)
    norm = layer.magnitude.new_empty(out_features) if norm is None else layer.constant(norm)
    if x_dropped is None and not few and takes_weight_plan(x.shape[0], weight, layer.operands, norm_known):
        kept = y = _outputs(layer, layer.flat(x, layer.operands), norm, layer.bias, norm_known)
    else:
        x = layer.flat(x)
        if not norm_known:
            norm = native.weight_norm(weight, layer.lora_A, layer.lora_B, scaling)
        scale = reference.row_scale(layer.magnitude, norm)
        if few:
            kept = y = x.new_empty(x.shape[0], out_features)
            native.few_tokens(x, native.stored(weight), layer.lora_A, layer.lora_B, scale, layer.bias, scaling, y)
        elif x_dropped is None:
            kept = y = native.product(x, weight)
            native.compose(y, torch.mm(x, layer.lora_A.t()), layer.lora_B, scale, layer.bias, scaling, y)
        else:
            x_dropped = layer.flat(x_dropped)
            if weight.dtype == layer.dtype:
                y, kept = native.product(x, weight), native.product(x_dropped, weight)
            else:
                y, kept = x.new_empty(x.shape[0], out_features), x.new_empty(x.shape[0], out_features)
                for part, frozen in layer.frozen_blocks():
                    native.product(x, frozen, out=y[:, part])
                    native.product(x_dropped, frozen, out=kept[:, part])
            native.compose(y, torch.mm(x_dropped, layer.lora_A.t()), layer.lora_B, scale, layer.bias, scaling, y, kept)
    kept_as = kept_dtype(weight, x_dropped is not None, precise, product_dtype, out_dtype, keeps, bias is not None)
    return y if y.dtype is out_dtype else y.to(out_dtype), norm, None if kept_as is None else kept, ()


def backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    kept: Tensor | None,
    scaling: float,
    dropped: bool,
    needs_x: bool,
    needs_dropped: bool,
    needs_direction: bool,
    needs_magnitude: bool,
    differentiate_norm: bool,
    product_dtype: torch.dtype,
    again: tuple[Tensor, ...] = (),
    watched_output: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(grad_x, grad_x_dropped, grad_lora_A, grad_lora_B, grad_magnitude), None for what is not needed.

    `x` is the input of the low-rank branch (with dropout: x_dropped), `kept` is y or what the forward kept beyond it. The
    gradients of x are [tokens, in] or of its shape.
    """
    through_norm = needs_direction and differentiate_norm
    needs_output = needs_magnitude or through_norm
    if not grad_output.is_contiguous():
        grad_output = rows(flatten(grad_output))
    tokens = grad_output.numel() // max(1, weight.shape[0])
    multiplies = needs_x or needs_dropped or (needs_output and kept is None)
    chosen = tokens_with_gradient(grad_output, weight) if multiplies else None
    if chosen is not None:
        grad_output, x = picked(grad_output, chosen), picked(x, chosen)
        kept = None if kept is None else picked(kept, chosen)
    by_library = needs_direction and lora_A.shape[0] >= LIBRARY_RANK
    bf16 = in_bf16(product_dtype, weight, dropped)
    bias = added_bias(bias, bf16)
    grad_x = grad_dropped = grad_A = grad_B = grad_magnitude = doubtful = None
    whole = False
    if not (dropped or by_library or x.dim() < 2 or (needs_output and kept is None)):
        found = whole_layer(x, weight, product_dtype, norm_known=True, backward=True) if needs_x else None
        whole = not needs_x or (found is not None and found[0] is grad_output.dtype)
    if whole:
        merges = found is not None and found[1]
        block = workspace(weight.shape[0], weight.shape[1], grad_output.dtype, native.is_transposed(weight)) if merges else None
        grad_x, grad_A, grad_B, grad_magnitude, doubtful = native.dora_linear_backward(
            grad_output, x, kept if needs_output else None, weight, lora_A, lora_B, magnitude, norm, bias, scaling, block,
            needs_direction, needs_x,
        )  # fmt: skip
        if doubtful is None and not through_norm:
            return put_back(grad_x, chosen, tokens), None, grad_A, grad_B, grad_magnitude
    layer = Layer(weight, lora_A, lora_B, magnitude, bias, scaling, bf16)
    norm = layer.constant(norm)
    g = rows(flatten(grad_output))
    if not whole and (needs_direction or needs_magnitude):
        inputs, subtracted = rows(flatten(x)), None if dropped else layer.bias
        if not needs_output:
            kept = None
        elif kept is None:
            kept, subtracted = _outputs(layer, layer.flat(x, layer.operands), norm, None), None
        grad_A, grad_B, grad_magnitude, doubtful = native.adapter_gradients(
            inputs, g, None if kept is None else rows(flatten(kept)), layer.lora_A, layer.lora_B, layer.magnitude, norm,
            subtracted, scaling, needs_direction and not by_library, dropped,
        )  # fmt: skip
        if by_library:
            grad_A, grad_B = _low_rank_gradients(layer, layer.flat(inputs), rows(g.to(layer.dtype)), norm)
    if doubtful is not None and grad_magnitude is not None:
        exact = doubtful.nonzero().squeeze(1)
        updated = reference.direction(weight[exact], layer.lora_A, layer.lora_B[exact], scaling)
        per_row = torch.mm(g[:, exact].to(layer.dtype).t(), layer.flat(x))
        grad_magnitude[exact] = (per_row * updated).sum(1) / norm[exact]
    if through_norm and grad_A is not None and grad_B is not None and grad_magnitude is not None:
        grad_norm = -reference.row_scale(layer.magnitude, norm) * grad_magnitude
        norm_A, norm_B, _ = native.direction_backward(weight, None, layer.lora_A, layer.lora_B, None, scaling, norm, grad_norm)
        grad_A, grad_B = grad_A.add_(norm_A), grad_B.add_(norm_B)
    if not whole and (needs_x or needs_dropped):
        g = rows(g if g.dtype is layer.operands else g.to(layer.operands))
        if dropped:
            grad_x = _product(g, layer.frozen_blocks(), weight.shape[1]) if needs_x else None
            if needs_dropped:
                grad_dropped = _product(g, layer.merged_blocks(norm, minus_weight=True), weight.shape[1])
        elif takes_weight_plan(g.shape[0], weight, layer.operands, norm_known=True, backward=True):
            grad_x = _product(g, layer.merged_blocks(norm), weight.shape[1])
        else:
            scaled = g * reference.row_scale(layer.magnitude, norm)
            grad_x = native.product(scaled, weight.t()).addmm_(torch.mm(scaled, layer.lora_B), layer.lora_A, alpha=scaling)
    grad_x, grad_dropped = put_back(grad_x, chosen, tokens), put_back(grad_dropped, chosen, tokens)
    return grad_x, grad_dropped, grad_A, grad_B, grad_magnitude if needs_magnitude else None


def _low_rank_gradients(layer: Layer, x: Tensor, g: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """(grad_lora_A, grad_lora_B) by four products of the library."""
    scaled_B = reference.row_scale(layer.magnitude, norm).unsqueeze(1) * layer.scaling
    grad_A = torch.mm(torch.mm(g, layer.lora_B * scaled_B).t(), x)
    return grad_A, torch.mm(g.t(), torch.mm(x, layer.lora_A.t())).mul_(scaled_B)


def _outputs(layer: Layer, x: Tensor, norm: Tensor, bias: Tensor | None, norm_known: bool = True) -> Tensor:
    """x W'^T + bias, [tokens, out]."""
    if bias is not None and bias.dtype is not layer.operands:
        bias = bias.to(layer.operands)
    if fits_workspace(layer.weight, layer.operands):
        return native.product(x, layer.merged(norm, norm_known), bias)
    y = x.new_empty(x.shape[0], layer.weight.shape[0])
    for part in layer.parts():
        native.product(x, layer.merged(norm, norm_known, part=part), None if bias is None else bias[part], y[:, part])
    return y


def _product(g: Tensor, blocks: Iterator[tuple[slice, Tensor]], in_features: int) -> Tensor:
    """g @ weight over blocks of output features."""
    product = None
    for part, block in blocks:
        partial = native.product(g[:, part], block.t())
        if product is None:
            product = partial
            continue
        # bf16 parts are summed in fp32 and rounded once
        product = (product.float() if product.dtype is torch.bfloat16 else product).add_(partial)
    return g.new_zeros(g.shape[0], in_features) if product is None else product
