"""DoRA layers that stand in for `nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import functional, reference
from .ops import _checks as checks
from .ops import _context as context
from .ops import cost_model, quantized
from .ops.parameter_state import ParameterState, is_counted

NORM_CEILING = 1e18  # above it the sum of squares overflows fp32
_Kept = TypeVar("_Kept")


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


class FusedDoraLinear(nn.Module):
    """A linear layer with a frozen weight, a trained low-rank direction and one trained magnitude per output feature.

        y = x (magnitude * V / ||V||)^T + bias,   V = weight + scaling * lora_B @ lora_A    (DoRA, arXiv:2402.09353, eq. 5)

    Made by `from_linear`. `weight` [out, in] and `bias` [out] are frozen; `lora_A` [r, in], `lora_B` [out, r] and `magnitude`
    [out] are trained, in fp32 (fp64 for an fp64 weight). x is [..., in]; the output has x's dtype, or autocast's. Norms and
    scales are computed in fp32 (fp64). `scaling` is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.

    `detach_norm` (the default, as in PEFT and DoRA section 4.3) treats ||V|| as a constant in the backward pass. Dropout acts as
    in PEFT: on the input of the low-rank branch and of the change of scale, never on the frozen layer's own output.

    `plan(tokens)` says how the layer would run. `reuse` (1) is the number of passes that run with the same parameters, such as
    the micro-batches of a step or those of inference: above 1 the triton backend may keep the merged weight between passes, at
    the price of its memory. `forced_plan` ("auto") names a plan instead: "activation" or "weight".

    In eval mode the norms are cached, for few tokens on a CPU the scales and the bias too. The caches notice in-place writes that
    autograd counts, replaced tensors, `load_state_dict`, `.to()` and this library's own flat buffers; a write through `.data` by
    somebody else cannot be seen: call `clear_cache()`.
    """

    reuse: int = 1
    forced_plan: str = "auto"

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        detach_norm: bool = True,
    ) -> None:
        """Build the layer around an existing weight and bias, which are frozen in place; see `from_linear` for the arguments."""
        super().__init__()
        if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
            raise ValueError(f"r must be a positive integer, got {r!r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
        values = quantized.stand_in(weight)  # the weight itself, unless it is quantized
        checks.check_float("weight", values)
        checks.check_shape("weight", values, ("out", "in"))
        self.out_features, self.in_features = self._as_rows(values).shape
        if r > min(self.out_features, self.in_features):
            warnings.warn(
                f"r={r} is larger than the smaller side of a layer [{self.out_features}, {self.in_features}]: "
                "the extra rank cannot change what it expresses",
                stacklevel=3,
            )
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.use_rslora, self.detach_norm = use_rslora, detach_norm
        self.scaling = scaling_of(lora_alpha, r, use_rslora)
        for frozen in (weight, bias):
            if frozen is not None:
                frozen.requires_grad_(False)
        self.weight = weight
        self.register_parameter("bias", bias)
        options: dict[str, Any] = {"device": weight.device, "dtype": reference.norm_dtype(values)}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **options))
        self.magnitude = nn.Parameter(torch.empty(self.out_features, **options))
        # the original weight while merged; in a list so that it is no parameter of the module
        self._unmerged: list[nn.Parameter] = []
        self._norm_cache: tuple[Tensor, ParameterState] | None = None
        self._merged_cache: tuple[tuple[Tensor, Tensor], ParameterState] | None = None
        self._decode: functional.Decode | None = None
        self._forward_mode: context.PassMode | None = None
        self.reset_adapter()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        detach_norm: bool = True,
    ) -> FusedDoraLinear:
        """Return a DoRA layer that computes what `linear` does until its adapter is trained.

        r: rank of lora_B @ lora_A. lora_alpha: scaling is lora_alpha / r, with use_rslora lora_alpha / sqrt(r). lora_dropout:
        probability in [0, 1) of the dropout before lora_A in training. detach_norm: the derivative takes ||V|| for a constant.

        The layer holds the linear's own weight and bias parameters, not copies, and freezes them. Raises TypeError for anything
        but an `nn.Linear` with a floating-point weight, ValueError for r <= 0, for dropout outside [0, 1) and for a weight with a
        non-finite value or a row norm above 1e18 (the row is named); warns where r exceeds the layer's smaller side.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        layer = cls(linear.weight, linear.bias, r, lora_alpha, lora_dropout, use_rslora, detach_norm)  # type: ignore[arg-type]
        return layer.train(linear.training)

    @staticmethod
    def _as_rows(weight: Tensor) -> Tensor:
        """The stored weight as [out, in], a view; the same function turns [out, in] into the stored layout."""
        return weight

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Start the adapter afresh, as PEFT does: lora_A Kaiming-uniform, lora_B zero, magnitude = ||weight|| per row."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if not self.weight.is_meta:
            norm = functional.weight_norm(*self._stored_terms())
            bad = ~(norm <= NORM_CEILING)
            if bad.any():
                row = int(bad.nonzero()[0])
                raise ValueError(
                    f"weight must be finite with row norms of at most {NORM_CEILING:g}, got {norm[row].item()} in row {row}"
                )
            self.magnitude.copy_(norm)

    @property
    def merged(self) -> bool:
        """Whether `weight` currently holds the merged weight."""
        return bool(self._unmerged)

    def direction_terms(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """(weight [out, in], lora_A, lora_B, scaling): the terms of V = weight + scaling * lora_B @ lora_A.

        A quantized weight comes dequantized.
        """
        weight, lora_A, lora_B, scaling = self._stored_terms()
        return quantized.dequantized(weight), lora_A, lora_B, scaling

    def _stored_terms(self) -> tuple[Tensor, Tensor, Tensor, float]:
        weight = self._unmerged[0] if self._unmerged else self.weight
        return self._as_rows(weight), self.lora_A, self.lora_B, self.scaling

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] for x [..., in]. Raises RuntimeError when a merged layer is asked to train."""
        if self._unmerged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("a merged layer cannot be trained: call unmerge() first")
            return self._merged_forward(x)
        if is_compiling():
            return self._dora_forward(x)
        if (seen := self._forward_mode) is not (mode := context.eager_mode()):
            if seen is not None and context.inside_backward():
                with context.adopt_mode(seen):  # a checkpointed segment's recomputation
                    return self._dora_forward(x)
            self.__dict__["_forward_mode"] = mode  # a module's own way to set an attribute takes longer than the rest of this
        decode = None if self.training else self._decode
        if decode is not None and (y := decode(x, self._parameters, self.scaling, mode)) is not None:
            return y
        return self._dora_forward(x)

    def _dora_forward(self, x: Tensor) -> Tensor:
        weight, lora_A, lora_B, scaling = self._stored_terms()
        x_dropped = merged = norm = None
        if self.training and self.lora_dropout > 0.0:
            x_dropped = F.dropout(x, self.lora_dropout)
        elif self._reuse() > 1:
            merged, norm = self._kept_merged(x)
        if merged is None and not self.training:
            norm = self._cached_norm()
            if not is_compiling():
                self._decode = self._prepared_decode(norm)
        return functional.dora_linear(
            x, weight, lora_A, lora_B, self.magnitude, scaling, self.bias, x_dropped, self.detach_norm, norm=norm, merged=merged,
            plan=self.forced_plan,
        )  # fmt: skip

    def plan(self, tokens: int, dtype: torch.dtype | None = None) -> cost_model.Plan:
        """How the layer would run for `tokens` rows of x in `dtype` (the weight's by default) as it stands now, and why.

        The plan's `name` is "activation", "weight" or "reference"; `print` shows it with its reason.
        """
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in (self.lora_A, self.lora_B, self.magnitude))
        dropped, reuse = self.training and self.lora_dropout > 0.0, self._reuse()
        return functional.plan(
            self._stored_terms()[0], self.r, tokens, dtype=dtype, trains=trains, norm_known=self._norm_is_constant(),
            dropped=dropped, reuse=reuse, forced=self.forced_plan, has_bias=self.bias is not None,
        )  # fmt: skip

    def _reuse(self) -> int:
        reuse = context.current_mode().reuse
        return self.reuse if reuse is None else reuse

    def _kept_merged(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(the merged weight, its norms) where the plan keeps one between passes, made once per state of the parameters."""
        if is_compiling() or quantized.format_of(self.weight) is not None:
            return None, None
        dtype = reference.matmul_dtype(x, self.weight, context.current_mode().precise)
        if not self.plan(x.numel() // max(1, self.in_features), dtype).kept:
            return None, None

        def merged() -> tuple[Tensor, Tensor]:
            weight, lora_A, lora_B, scaling = self.direction_terms()
            with torch.autocast(x.device.type, enabled=False):
                return functional.kept_merged(weight, lora_A, lora_B, self.magnitude, scaling, dtype)

        sources = self.weight, self.lora_A, self.lora_B, self.magnitude
        return self._kept("_merged_cache", merged, sources, dtype) or (None, None)

    def _kept(self, name: str, compute: Callable[[], _Kept], sources: tuple[Tensor, ...], *plain: Any) -> _Kept | None:
        """What `compute` gives, once per state of the parameters that it reads; None where it may not be kept."""
        if not is_counted(sources) or functional.is_captured(self.weight):
            return None
        kept: tuple[_Kept, ParameterState] | None = getattr(self, name)  # another thread may clear or replace it
        if kept is None or not kept[1].is_current(sources, self.scaling, *plain):
            state = ParameterState(sources, self.scaling, *plain)  # before it is computed: a write in between makes it outdated
            with torch.inference_mode(False), torch.no_grad():
                kept = compute(), state
            setattr(self, name, kept)
        return kept[0]

    def _merged_forward(self, x: Tensor) -> Tensor:
        dtype = reference.matmul_dtype(x, self.weight)
        out_dtype = reference.output_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return functional.frozen_linear(x.to(dtype), self._as_rows(self.weight).to(dtype), bias).to(out_dtype)

    def _cached_norm(self) -> Tensor | None:
        """The norms where they are constants of an eval-mode pass, computed once per state of the parameters; else None."""
        if not self._norm_is_constant():
            return None
        sources = self.weight, self.lora_A, self.lora_B
        return self._kept("_norm_cache", lambda: functional.weight_norm(*self._stored_terms()), sources)

    def _prepared_decode(self, norm: Tensor | None) -> functional.Decode | None:
        """What later calls with few tokens take instead of the way through here, where there is such a thing."""
        held, ready = self._parameters, self._decode
        if ready is not None and ready.state.is_current(held.values(), self.scaling):
            return ready
        if norm is None or torch.is_grad_enabled() or quantized.format_of(self.weight) is not None:
            return None
        if hasattr(self, "_hf_hook"):  # accelerate moves the weight away after the call
            return None
        terms = (*self._stored_terms()[:3], self.magnitude, self.bias)
        if not functional.may_decode(held, self.weight, *terms[1:]):
            return None
        prepared, kept = functional.Decode(held, *terms, self.scaling, norm), self._norm_cache
        # what it saw is what the norms were found from, or another thread has written in between
        same = kept is not None and kept[0] is norm and kept[1].is_current((self.weight, self.lora_A, self.lora_B), self.scaling)
        return prepared if same else None

    def _norm_is_constant(self) -> bool:
        mode = context.current_mode()
        shared = mode.point is not None  # then `functional` finds them, or has them from another pass
        if self.training or shared or is_compiling() or functional.is_transformed(self.lora_A, self.lora_B):
            return False
        differentiated = not self.detach_norm if mode.differentiate_norm is None else mode.differentiate_norm
        return not (differentiated and torch.is_grad_enabled())

    def clear_cache(self) -> None:
        """Drop what is kept between passes; needed only after a write through `.data` from outside this library."""
        self._norm_cache = self._merged_cache = self._decode = None

    def train(self, mode: bool = True) -> FusedDoraLinear:
        """As `nn.Module.train`; also drops what is kept between passes."""
        self.clear_cache()
        return super().train(mode)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """magnitude * V / ||V|| as a new [out, in] tensor in the weight's dtype, computed in fp32 (fp64 for an fp64 weight)."""
        weight, lora_A, lora_B, scaling = self._stored_terms()
        return functional.merged_weight(weight, lora_A, lora_B, self.magnitude, scaling)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False) -> None:
        """Let `weight` hold the merged weight, so that a forward is one plain linear; the original is kept for `unmerge`.

        `state_dict()` keeps describing the unmerged layer. Does nothing on a merged layer. With `safe_merge` raises ValueError,
        and changes nothing, where the merged weight is not finite; so does a quantized weight, which `to_linear` dequantizes.
        """
        if self.merged:
            return
        if (kind := quantized.format_of(self.weight)) is not None:
            raise ValueError(f"a weight in {kind.name} cannot hold the merged weight: to_linear() returns it dequantized")
        merged = self._as_rows(self.merged_weight()).contiguous()
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError("the merged weight is not finite; nothing was merged")
        self._unmerged.append(self.weight)
        self.weight = nn.Parameter(merged, requires_grad=False)
        self.clear_cache()

    def unmerge(self) -> None:
        """Put the original weight parameter back, bit for bit. Does nothing on a layer that is not merged."""
        if self.merged:
            self.weight = self._unmerged.pop()
            self.clear_cache()

    def to_linear(self) -> nn.Linear:
        """Return a plain `nn.Linear` with the merged weight and a copy of the bias, on the same device and in the same mode."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedDoraLinear:
        was_merged = self.merged
        self.unmerge()
        self.clear_cache()
        super()._apply(fn, recurse)
        if was_merged:
            self.merge()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self._unmerged[0] if keep_vars else self._unmerged[0].detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        self.clear_cache()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, r={self.r}"
        text += f", lora_alpha={self.lora_alpha}"
        for name, default in (("lora_dropout", 0.0), ("use_rslora", False), ("detach_norm", True), ("merged", False)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


class FusedDoraConv1D(FusedDoraLinear):
    """`FusedDoraLinear` for transformers' `Conv1D` (GPT-2), whose weight is stored [in, out]; made by `from_conv1d`.

    Everything is as for `FusedDoraLinear`, magnitudes one per output feature; only `weight` keeps Conv1D's layout.
    """

    @classmethod
    def from_conv1d(
        cls,
        conv1d: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        detach_norm: bool = True,
    ) -> FusedDoraConv1D:
        """Return a DoRA layer that computes what `conv1d` does until its adapter is trained; errors as in `from_linear`.

        The layer holds the module's own weight [in, out] and bias parameters and freezes them.
        """
        weight = getattr(conv1d, "weight", None)
        if type(conv1d).__name__ not in ("Conv1D", "FrozenConv1D") or not isinstance(weight, nn.Parameter):
            raise TypeError(f"conv1d must be a transformers Conv1D, got {type(conv1d).__name__}")
        layer = cls(weight, getattr(conv1d, "bias", None), r, lora_alpha, lora_dropout, use_rslora, detach_norm)
        layer.train(conv1d.training)
        return layer

    @classmethod
    def from_linear(cls, *args: Any, **kwargs: Any) -> FusedDoraLinear:
        """Not for this class: raises TypeError."""
        raise TypeError("FusedDoraConv1D is made by from_conv1d; for an nn.Linear use FusedDoraLinear.from_linear")

    @staticmethod
    def _as_rows(weight: Tensor) -> Tensor:
        return weight.t()

    def to_conv1d(self) -> nn.Module:
        """Return a plain transformers `Conv1D` with the merged weight and a copy of the bias."""
        from transformers.pytorch_utils import Conv1D

        conv1d = Conv1D(self.out_features, self.in_features)
        conv1d.weight = nn.Parameter(self.merged_weight().t().contiguous(), requires_grad=False)
        bias = torch.zeros_like(self.magnitude, dtype=self.weight.dtype) if self.bias is None else self.bias.detach().clone()
        conv1d.bias = nn.Parameter(bias, requires_grad=False)
        return conv1d.train(self.training)
