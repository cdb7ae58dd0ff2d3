"""Which CPUs the rules of `loses` were measured on."""

from types import ModuleType


def unmeasured(native: ModuleType, *cpus: str) -> str | None:
    """Return that nothing was measured on this CPU, None where it is among `cpus`.

    Args:
        native: the compiled extension; its `cpu` is "intel" or "zen5" where AVX-512 is in use there, else "avx2" or
            "generic". On "intel" holds what an Ice Lake showed (benchmarks/LOG.md 2026-11-23 and 24), on "avx2" what a
            Zen 5 did, where torch was capped to AVX2 too (2026-11-26): kernels are taken that won by a margin. Other
            CPUs with AVX-512, such as Zen 4, are held to these as well: those margins were there on both others.
    """
    return None if native.cpu in cpus else f"not yet measured on this CPU ({native.cpu})"
