"""Which CPUs the rules of `loses` were measured on, and the rule that the kernels of csrc/rows.h share."""

import functools
from types import ModuleType

import torch
from torch import Tensor

from fastlm.ops.tensors import needs_gradient

MEASURED = ("intel", "zen5", "avx2")  # timed in benchmarks/LOG.md
ROW = "benchmarks/LOG.md 2026-11-23 and 25 to 27"


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc's malloc keep up to 64 MB of what is freed: new pages can cost a call a fifth of its time.

    It keeps twice the largest block below 32 MB that was ever freed. This one is never touched.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


def unmeasured(native: ModuleType, cpus: tuple[str, ...] = MEASURED) -> str | None:
    """Return that nothing was measured on this CPU, None where it is among `cpus`.

    Args:
        native: the compiled extension; its `cpu` is "intel" or "zen5" where AVX-512 is in use there, else "avx2" or
            "generic". On "intel" holds what an Ice Lake showed (benchmarks/LOG.md 2026-11-23 and 24), on "avx2" what a
            Zen 5 did, where torch was capped to AVX2 too (2026-11-26): kernels are taken that won by a margin. Other
            CPUs with AVX-512, such as Zen 4, are held to these as well: those margins were there on both others.
    """
    return None if native.cpu in cpus else f"not yet measured on this CPU ({native.cpu})"


def on_amx(native: ModuleType) -> bool:
    """Tell whether this is an Intel CPU with AMX, such as was timed on 2026-11-26 and 27."""
    return native.cpu == "intel" and native.amx


def cannot_here(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Return why a kernel for the CPU cannot take `x`."""
    if x.is_cuda:
        return "runs on the CPU alone"
    return None if x.dtype in dtypes else f"no kernel for {x.dtype}"


def loses_below(native: ModuleType, least: tuple[int, int], *tensors: Tensor | None) -> str | None:
    """Return why stock is the better choice for the first tensor, None where a measured row says that it is not.

    Args:
        least: how many numbers it must have, without gradients and with them; 0: never enough.
    """
    x = tensors[0]
    if unknown := unmeasured(native):
        return unknown
    if x.dtype is torch.bfloat16 and native.bf16_arithmetic and not (native.cpu == "zen5" or on_amx(native)):
        return "not yet measured on a CPU with bfloat16 arithmetic"
    enough = least[1] if needs_gradient(*tensors) else least[0]
    if not enough:
        return f"slower than torch: {ROW}"
    return f"slower than torch below {enough} numbers: {ROW}" if x.numel() < enough else None
