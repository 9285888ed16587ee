"""What the launchers share: a launch on the right device, a count of launches, tile and precision choice."""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .tiles import Tile, any_forced, tile_for

LAUNCHES: collections.Counter[str] = collections.Counter()  # launches per kernel in this process


Compiled = tuple[Any, tuple[Any, ...], Any]  # a compiled kernel, the values of its compile-time parameters, the kernel
_COMPILED: dict[tuple[Any, ...], Compiled] = {}  # by everything that Triton would compile it anew for
_INT32 = 31


def compiled_for(args: Sequence[Any]) -> list[Any]:
    """What Triton compiles a kernel for, of its run-time arguments: dtype, alignment to 16 bytes, multiples of 16, ones, width.

    Equal lists are served by one compiled kernel. Finer than Triton's own key costs a kernel that was there already, coarser
    would be wrong.
    """
    found: list[Any] = []
    for arg in args:
        if type(arg) is int:
            found.append((arg == 1, arg & 15 == 0, arg >> _INT32))
        elif type(arg) is float:
            found.append(None)
        else:
            found += (arg.dtype, arg.data_ptr() & 15 == 0)
    return found


def run(name: str, kernel: Any, grid: tuple[int, ...], anchor: Tensor, *args: Any, **options: Any) -> Compiled | None:
    """Launch a kernel on the device of `anchor` and count it under `name`; the keywords are its compile-time parameters.

    A second launch with arguments of the same kind goes past Triton's own look at them, which takes longer than most kernels.
    Returns what such launches take, or None where there is nothing to go past.
    """
    LAUNCHES[name] += 1
    if not anchor.is_cuda or torch.version.hip is not None:  # AMD's kernels also depend on the sizes of tensors
        guard = torch.cuda.device(anchor.device) if anchor.is_cuda else contextlib.nullcontext()
        with guard:
            kernel[grid](*args, enable_fp_fusion=True, **options)
        return None
    if (index := anchor.get_device()) == torch.cuda.current_device():
        return _launch_compiled(kernel, index, grid, args, options)
    with torch.cuda.device(index):
        return _launch_compiled(kernel, index, grid, args, options)


def _launch_compiled(
    kernel: Any, index: int, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> Compiled | None:
    key = (id(kernel), index, *options.items(), *compiled_for(args))
    ready = _COMPILED.get(key)
    if ready is not None:
        compiled, constants, _ = ready
        compiled[(*grid, 1, 1)[:3]](*args, *constants)
        return ready
    compiled = kernel[grid](*args, enable_fp_fusion=True, **options)
    if compiled is None:
        return None
    constants = tuple(options[parameter] for parameter in kernel.arg_names[len(args) :])
    _COMPILED[key] = ready = (compiled.result() if hasattr(compiled, "result") else compiled), constants, kernel
    return ready


class Prepared:
    """A launch that lacks nothing but its tensors: what a launcher works out from sizes, strides and flags, kept by `geometry`.

    The kernel takes its pointers first. A call costs a look at dtypes and alignment; the first of a kind goes by `run`.
    """

    __slots__ = ("_ready", "grid", "kernel", "name", "numbers", "options")

    def __init__(self, name: str, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...], **options: Any) -> None:
        """Keep a kernel's grid, its run-time numbers and its compile-time parameters."""
        self.name, self.kernel, self.grid, self.numbers, self.options = name, kernel, grid, numbers, options
        self._ready: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the device of the first tensor."""
        anchor = tensors[0]
        if not anchor.is_cuda or torch.version.hip is not None:
            run(self.name, self.kernel, self.grid, anchor, *tensors, *self.numbers, **self.options)
            return
        index, aligned = anchor.get_device(), 0
        addresses = [tensor.data_ptr() for tensor in tensors]
        for address in addresses:
            aligned = 2 * aligned + (address & 15 == 0)
        key = (index, aligned, *[tensor.dtype for tensor in tensors])
        ready = self._ready.get(key)
        if ready is not None and index == torch.cuda.current_device():
            LAUNCHES[self.name] += 1
            launch, tail = ready
            launch(*addresses, *tail)  # of a tensor Triton would ask the driver whether its address is a GPU's
            return
        launched = run(self.name, self.kernel, self.grid, anchor, *tensors, *self.numbers, **self.options)
        if launched is not None:
            compiled, constants, _ = launched
            self._ready[key] = compiled[(*self.grid, 1, 1)[:3]], (*self.numbers, *constants)


Worked = TypeVar("Worked")


def geometry(work: Callable[..., Worked]) -> Callable[..., Worked]:
    """Cache what a launcher works out from hashable arguments: the architecture, sizes, strides, dtypes and flags."""
    cached = functools.lru_cache(maxsize=4096)(work)

    @functools.wraps(work)
    def known(*arguments: Any) -> Worked:
        return work(*arguments) if any_forced() else cached(*arguments)

    return known


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architecture_of(device: str | torch.device) -> str:
    """The name of a device's row in the tile tables, like "sm_90"; "default" for a CPU."""
    if isinstance(device, str):
        device = torch.device(device)
    if device.type != "cuda":
        return "default"
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


def tile(kernel: str, r: int, *operands: Tensor | None) -> Tile:
    """The tile for a kernel whose streamed operands are these."""
    widest, anchor = 0, None
    for operand in operands:
        if operand is not None:
            widest, anchor = max(widest, operand.element_size()), operand
    assert anchor is not None
    return tile_for(kernel, r, widest, architecture_of(anchor.device))


def precision(*operands: Tensor | None) -> str:
    """How fp32 matrix products run: with 16-bit operands one tf32 pass holds them exactly, fp32 operands take three.

    A kernel whose operands are 16-bit tensors and a factor computed from them in fp32 (the gradients of the factors) rounds that
    factor to tf32's 11 bits, less than such adapters themselves are rounded to.
    """
    if torch.version.hip is not None:
        return "ieee"
    for operand in operands:
        if operand is not None and operand.element_size() > 2:
            return "tf32x3"
    return "tf32"


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its columns are contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def padded_ranks(lora_A: Tensor, lora_B: Tensor, multiple: int = 16) -> tuple[Tensor, Tensor]:
    """lora_A [r, in] and lora_B [out, r] with zero ranks up to a multiple: Triton knows strides as multiples of 16 or not."""
    missing = -lora_A.shape[0] % multiple
    if missing == 0:
        return lora_A, lora_B
    return torch.nn.functional.pad(lora_A, (0, 0, 0, missing)), torch.nn.functional.pad(lora_B, (0, missing))


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def splits_for(blocks: int, steps: int, programs: int = 512, least_steps: int = 4) -> int:
    """Into how many parts a loop of `steps` is split for about `programs` programs in all; depends on shapes alone."""
    return max(1, min(cdiv(programs, max(blocks, 1)), steps // least_steps))
