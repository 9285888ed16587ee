"""How far a difference moves the directions: as far as rounding asks for, and no farther than truncation allows."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# Of the directions' length; beyond it truncation dominates late in training, 16-bit or not.
RELATIVE_RADIUS_CEILING = 0.005
# Multiples of eps^(1/3) and of eps^(1/2), measured in fp32. Largest errors of q on MiniLM at three stages, ranks 4 and 16: 4e-4
# and 4e-3 (with 0.2 and 1: 9e-4 and 1.4e-2); on 12 RoBERTa-shaped layers with a low-rank part as large as W0: 7e-4 and 1.1e-2
# (6e-3 and 5.5e-2).
CENTRAL_FACTOR, ONE_SIDED_FACTOR = 0.07, 0.2
PROBE_SIZE = 128  # large enough for every library to take the kernel that it takes for a model


def relative_radius(dtype: torch.dtype, central: bool) -> float:
    """The perturbation's length as a fraction of the directions', for passes computed in `dtype`.

    Rounding costs about eps / radius and truncation radius^2 (central) or radius (one-sided); their sum is least at a
    multiple of eps^(1/3) and of eps^(1/2); the multiples were measured.
    """
    eps = torch.finfo(dtype).eps
    return min(RELATIVE_RADIUS_CEILING, CENTRAL_FACTOR * eps ** (1 / 3) if central else ONE_SIDED_FACTOR * eps ** (1 / 2))


def noise_floor(dtype: torch.dtype) -> float:
    """The change of a gradient, over its length, below which a difference is rounding.

    Measured with perturbations too short to see: up to 27 eps in fp32, 0.4 eps under bf16 autocast, whose sums are in fp32.
    """
    eps = torch.finfo(dtype).eps
    return eps if eps > 1e-4 else 30.0 * eps


def coarsest_dtype(dtypes: Iterable[torch.dtype], device: torch.device) -> torch.dtype:
    """The dtype of the largest eps; fp32 counts as what its matrix products keep on `device`."""
    dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return fp32_product_resolution(device) if dtype == torch.float32 else dtype


@torch.no_grad()
def fp32_product_resolution(device: torch.device) -> torch.dtype:
    """The dtype as fine as what fp32 matrix products keep of their operands on `device`.

    float32; float16 where they run in tf32, which has as many bits; bfloat16. A product is asked rather than PyTorch's settings
    (`torch.set_float32_matmul_precision` and its relatives), which have several spellings and not always an effect.
    """
    operand = torch.eye(PROBE_SIZE, device=device)
    fine, coarse = 1.0 + 2.0**-12, 1.0 + 2.0**-9  # bits that float16 and tf32, that bfloat16 lack
    operand[0, 0], operand[1, 1] = fine, coarse
    with torch.autocast(device.type, enabled=False):
        kept = torch.mm(operand, torch.eye(PROBE_SIZE, device=device)).diagonal()[:2].tolist()
    if kept[0] == fine:
        return torch.float32
    return torch.float16 if kept[1] == coarse else torch.bfloat16
