"""Where lstm, gru and rnn by the kernels of csrc/rnn.h were measured to lose on a CPU: sizes, by CPU and dtype."""

from types import ModuleType

import torch

from fastlm.ops import gpu, recurrent, recurrent_cuda
from fastlm.ops.cpu import unmeasured
from fastlm.ops.products import exact_float32
from fastlm.ops.recurrent import IN_PLACE, MOST_ROWS
from fastlm.ops.tensors import needs_gradient

ROW = "benchmarks/LOG.md 2026-11-24"
AMX = "benchmarks/LOG.md 2026-11-26, AMX"
STEPS = "benchmarks/LOG.md 2026-11-27, fifth session"
ROUNDED = "benchmarks/LOG.md 2026-11-27, float32 below the highest precision"
PAIRS = {("avx512_bf16", "zen5", torch.bfloat16), ("avx512_bf16", "zen5", torch.float32),
         ("amx", "intel", torch.bfloat16), ("amx", "intel", torch.float32)}  # which were timed


def losses(native: ModuleType, cell: str, data, batch_sizes, hx, params, *options) -> str | None:
    """Return why stock is the better choice, None where a measured row says that it is not.

    Stock runs a dense LSTM in float32 and bfloat16 (in float32 alone without AVX-512) through oneDNN, which is hard
    to beat, and all else step by step in PyTorch, which only few steps, and so little to save, make as fast as a
    kernel.
    """
    if data.is_cuda:
        return gpu.unmeasured(data) or recurrent_cuda.losses(cell, data, batch_sizes, hx, params, *options)
    if unknown := unmeasured(native):
        return unknown
    dtype = data.dtype
    if dtype is torch.float32 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    pairs = native.pairs and (dtype is torch.bfloat16 or (dtype is torch.float32 and not exact_float32()))
    if (dtype is torch.bfloat16 and native.bf16_arithmetic and not pairs) or \
            (dtype is torch.float16 and native.fp16_arithmetic):
        return f"not yet measured on a CPU with {str(dtype).removeprefix('torch.')} arithmetic"
    if pairs and (native.pairs, native.cpu, dtype) not in PAIRS:
        return f"not yet measured with {native.pairs} in {str(dtype).removeprefix('torch.')}"
    if torch.compiler._is_exporting_flag:
        return None  # stock would be unrolled for one length, and a rule of sizes be a limit to theirs
    narrow = native.cpu == "avx2"
    steps = batch_sizes.numel() if batch_sizes is not None else data.shape[1 if options[-1] else 0]
    batch, hidden = hx[-1].shape[1:]
    trains = needs_gradient(data, *hx, *params)
    if pairs:
        dense = batch_sizes is None and not recurrent.projects(params, options[0], options[1:])
        return _losses_of_pairs(cell, dtype, steps, batch, hidden, trains, dense, native.pairs == "amx")
    if recurrent.projects(params, options[0], options[1:]):  # which stock does without oneDNN, step by step
        return f"slower than torch below 8 steps of a projection: {ROW}" if steps < 8 else None
    # Without gradients few rows run in place, which pays sooner.
    in_place = batch_sizes is None and not trains and hidden >= IN_PLACE and batch * steps <= 16
    if steps == 1 and batch_sizes is None:
        if dtype is torch.float32 and batch > MOST_ROWS[cell]:
            return f"one step of many sequences: slower than torch's: {STEPS}"
        ahead = not trains and hidden >= IN_PLACE and (dtype is torch.float32 or (cell == "lstm" and hidden >= 256 and
                                                 dtype is torch.bfloat16 and not narrow))
        return None if ahead else f"one step: slower than torch's, or not measured: {ROW}"
    of_onednn = (torch.float32,) if narrow else (torch.float32, torch.bfloat16)
    if cell != "lstm" or batch_sizes is not None or dtype not in of_onednn:
        elman = cell in ("tanh", "relu")
        if in_place and dtype is torch.float32 and (steps >= 8 if elman else batch * steps >= 4):
            return None
        least = 32 if elman and not trains else 16
        return f"slower than torch below {least} steps: {ROW}" if steps < least else None
    if native.cpu == "zen5":
        return _losses_on_zen5(steps, batch, hidden, trains)
    if hidden < 256:
        return f"slower than torch's oneDNN below 256 hidden units: {ROW}"
    if narrow:
        return None if in_place else "no faster than torch's oneDNN: benchmarks/LOG.md 2026-11-26, AVX2"
    if trains or (in_place and hidden >= 512):
        return None
    if dtype is torch.bfloat16:
        alone = batch == 1 and hidden < 512
        return f"slower than torch's oneDNN for one sequence below 512 hidden units: {ROW}" if alone else None
    if hidden < 512 or steps < 32:
        return f"slower than torch's oneDNN without gradients below 512 hidden units or 32 steps: {ROW}"
    return None


def _losses_on_zen5(steps, batch, hidden, trains):
    """Return what `losses` does for a dense LSTM in float32 of more than one step."""
    row = "benchmarks/LOG.md 2026-11-26, one sequence; recurrent layers: narrow products"
    if hidden < 256:
        wins = batch <= 8 and steps >= 128
        return None if wins else f"slower than torch's oneDNN below 256 hidden units, but for long sequences: {row}"
    few = batch <= 4 and steps >= (32 if hidden % 16 == 0 else 128)
    wins = trains or few or hidden >= 768 or batch * steps <= 16
    return None if wins else f"slower than torch's oneDNN without gradients, but for few sequences: {row}"


def _losses_of_pairs(cell, dtype, steps, batch, hidden, trains, dense, tiles):
    """Return what `losses` does where pairs of bfloat16 are multiplied, as they are in stock's oneDNN."""
    row, later = "benchmarks/LOG.md 2026-11-25, pairs", "benchmarks/LOG.md 2026-11-26, recurrent layers in bfloat16"
    if tiles:
        row = later = AMX
    if cell == "relu":  # which is computed in float32
        return f"relu in bfloat16 was not measured: {row}"
    if tiles and dtype is torch.float32:
        wins = steps >= 16 and hidden >= {"lstm": 256, "tanh": 128}.get(cell, 1)
        return None if wins else f"slower than torch in few steps or units, or not measured: {ROUNDED}"
    if cell != "lstm" or not dense:
        least = (4 if dense else 8) if tiles else 16
        return f"slower than torch below {least} steps: {row}" if steps < least else None
    if dtype is torch.float32:
        return f"slower than torch's oneDNN below the highest precision, or not measured: {row}"
    if tiles and trains:
        wins = (hidden >= 256 and steps >= 4) or (batch <= 16 and hidden >= 64 and steps * hidden >= 2048)
        return None if wins else f"slower than torch's oneDNN below 256 hidden units or in few steps: {AMX}"
    if trains:
        wins = hidden >= 512 or (hidden >= 256 and steps >= 8)
        return None if wins else f"slower than torch's oneDNN below 256 hidden units or 8 steps: {later}"
    if tiles:
        long = steps >= 32 and (hidden >= 128 or batch <= 32)
        wide = hidden >= 256 and (steps >= (4 if hidden >= 512 else 16) or batch == 1)
        wins = batch <= 64 and (long or wide)
        return None if wins else f"no faster than torch's oneDNN above 64 sequences or in few steps: {AMX}"
    few, odd = hidden >= 256 and batch <= (1 if steps == 1 else 4), hidden >= 512 and hidden % 32 and steps >= 32
    return None if few or odd else f"slower than torch's oneDNN without gradients, but for few sequences: {later}"
