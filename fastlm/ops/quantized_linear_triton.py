"""quantized_linear for few rows in Triton: a program takes a block of outputs and widens its weight in registers.

One kernel takes the rows one by one: its programs have few outputs, so that the whole weight is on its way at once.
Another multiplies tiles of rows. Many rows are the work of a GEMM: there stock dequantizes first.
"""

import torch
import triton
import triton.language as tl

from fastlm.ops.quantized_linear import MODES, differentiable, reference
from fastlm.ops.triton_kernels import DTYPES, cannot_here, launch
from fastlm.ops.triton_kernels import loses as loses_here

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

ACCEPTS = {f"{mode} {name}" for mode in MODES for name in ("one row", "odd sizes", "one output", "no rows",
                                                           "outliers", "transposed")}
ACCEPTS |= {"groups of 32", "groups of 128"}

MOST_ROWS = 16  # the height of a tensor core's tile


def cannot(x, weight, scale, bias, mode, group_size):
    if x.shape[0] > MOST_ROWS:
        return f"more than {MOST_ROWS} rows are a GEMM's work"
    return cannot_here(x)


def loses(x, *args):
    return loses_here(x)


def run(*args):
    return _kernels(args[:4], *args[4:])[0]


def forward(tensors, needs, mode, group_size):
    x, weight, scale, bias = tensors
    if not x.numel() or not weight.numel():
        return [reference(x, weight, scale, bias, mode, group_size)]
    x, row_scale = x.contiguous(), None
    y = x.new_empty(x.shape[0], weight.shape[0])
    if mode == "int8_dynamic":
        x, wide = x.new_empty(x.shape, dtype=torch.int8), x
        row_scale = x.new_empty(x.shape[0], 1, dtype=torch.float32)
        launch(plan_round, wide, x, row_scale)
    weight, scale, bias = (None if t is None else t.contiguous() for t in (weight, scale, bias))
    launch(plan, x, in_words(x, weight, mode), scale, row_scale, bias, y, mode, group_size)
    return [y]


def in_words(x, weight, mode):
    """View a weight that goes row by row as int32; the others are of tiles, which tensor cores multiply.

    These win from two rows on where integers go into them as they are or in 16 bits.
    """
    by_row = x.shape[0] == 1 or mode == "int4" or x.dtype is torch.float32
    return weight.view(torch.int32) if by_row and x.shape[1] % 8 == 0 and weight.storage_offset() % 4 == 0 else weight


def plan_round(x, values, row_scale):
    """Return (kernel, grid, arguments) for x `[M, K]`, its int8 values and its scales `[M, 1]`."""
    rows, inputs = x.shape
    width = min(triton.next_power_of_2(inputs), 4096)
    return round_kernel, (rows,), dict(x=x, values=values, row_scale=row_scale, inputs=inputs, WIDTH=width,
                                       num_warps=min(max(width // 512, 1), 8))


def plan(x, weight, scale, row_scale, bias, y, mode, group_size):
    """Return (kernel, grid, arguments); `row_scale` `[M, 1]` and an int8 x are for "int8_dynamic", see `in_words`."""
    (rows, inputs), (outputs, columns) = x.shape, weight.shape
    int4, group_bytes = mode == "int4", group_size // 2
    arguments = dict(x=x, weight=weight, scale=scale, row_scale=row_scale, bias=bias, y=y, rows=rows, outputs=outputs,
                     groups=scale.shape[1] if int4 else 1, INT4=int4)
    wide = x.dtype is torch.float32
    if weight.dtype is torch.int32:
        return row_kernel, (rows * triton.cdiv(outputs, 8),), arguments | dict(
            eights=inputs // 8, magic=0x4B000000, COLS=8, GROUP=group_size // 8,
            WORDS=max(min(triton.next_power_of_2(columns), 1024), group_size // 8), num_warps=4 if wide else 8)
    # More than these bytes would spill.
    read = min(group_bytes, 32 if wide else 128) if int4 else 64 if wide else 256
    return tile_kernel, (triton.cdiv(outputs, 32),), arguments | dict(
        inputs=inputs, row_bytes=columns, ROWS=MOST_ROWS, COLS=32, BYTES=read, GROUP_BYTES=group_bytes, num_warps=4,
        num_stages=5)


@triton.jit
def round_kernel(x, values, row_scale, inputs, WIDTH: tl.constexpr):
    """Round a row to 8 bits as `round_rows` does: to the nearest even, its scale NaN where a value is not finite."""
    row = tl.program_id(0).to(tl.int64)
    x += row * inputs
    values += row * inputs
    lane = tl.arange(0, WIDTH)
    most = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, inputs, WIDTH):
        a = tl.abs(tl.load(x + start + lane, start + lane < inputs, 0.0).to(tl.float32))
        most = tl.maximum(most, a, propagate_nan=tl.PropagateNan.ALL)
    finite = tl.min((most < float("inf")).to(tl.int32), 0) != 0
    scale = tl.maximum(tl.div_rn(tl.max(most, 0), 127.0), 1.1754943508222875e-38)
    for start in range(0, inputs, WIDTH):
        v = tl.load(x + start + lane, start + lane < inputs, 0.0).to(tl.float32)
        v = tl.div_rn(v, scale + tl.zeros((WIDTH,), tl.float32)) + 12582912.0  # 1.5·2^23: no room for a fraction
        tl.store(values + start + lane, (v - 12582912.0).to(tl.int8), start + lane < inputs)
    tl.store(row_scale + row, tl.where(finite, scale, float("nan")))


@triton.jit
def _field(words, magic, at: tl.constexpr, bits: tl.constexpr):
    """Return 2^at · (u - 2^bits / 2), float32, for the whole number u in `bits` bits of words from bit `at` on.

    2^23 + 2^at · u has u among its last bits, which are 23: no conversion is as cheap. Its exponent comes as `magic`,
    an argument, because an instruction that masks and sets bits takes one constant alone.
    """
    found = (words & (((1 << bits) - 1) << at)) | magic
    return found.to(tl.float32, bitcast=True) - (8388608.0 + (1 << (at + bits - 1)))


# Not of which numbers `eights` is a multiple: then each thread reads eight weights at once, those of the eight values
# of x that it reads at once, and nothing has to be exchanged.
@triton.jit(do_not_specialize=["eights", "magic"])
def row_kernel(x, weight, scale, row_scale, bias, y, rows, eights, outputs, groups, magic, COLS: tl.constexpr,
               WORDS: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr):
    EACH: tl.constexpr = 8 if INT4 else 4  # weights in a word
    row = (tl.program_id(0) % rows).to(tl.int64)
    col = (tl.program_id(0) // rows * COLS + tl.arange(0, COLS)).to(tl.int64)
    words = eights * (8 // EACH)
    x += row * (eights * 8)
    weight += col[:, None] * words
    total = tl.zeros((COLS,), tl.float32)
    for start in range(0, words, WORDS):
        word = start + tl.arange(0, WORDS)
        live = (word < words)[None, :] & (col < outputs)[:, None]
        w = tl.load(weight + word[None, :], live, 0)
        at = start * EACH + tl.arange(0, WORDS * EACH)
        a = tl.load(x + at, at < eights * 8, 0).to(tl.float32)
        if INT4:
            even, odd = tl.split(tl.reshape(a, (WORDS, 2, 2, 2)))
            a04, a26 = tl.split(even)
            a15, a37 = tl.split(odd)
            a0, a4 = tl.split(a04)
            a1, a5 = tl.split(a15)
            a2, a6 = tl.split(a26)
            a3, a7 = tl.split(a37)
            high = w >> 20
            part = _field(w, magic, 0, 4) * a0[None, :]
            part += _field(w, magic, 4, 4) * (a1 / 16)[None, :]
            part += _field(w, magic, 8, 4) * (a2 / 256)[None, :]
            part += _field(w, magic, 12, 4) * (a3 / 4096)[None, :]
            part += _field(w, magic, 16, 4) * (a4 / 65536)[None, :]
            part += _field(high, magic, 0, 4) * a5[None, :]
            part += _field(high, magic, 4, 4) * (a6 / 16)[None, :]
            part += _field(high, magic, 8, 4) * (a7 / 256)[None, :]
            group = start // GROUP + tl.arange(0, WORDS // GROUP)
            s = tl.load(scale + col[:, None] * groups + group[None, :],
                        (group < groups)[None, :] & (col < outputs)[:, None], 0.0)
            part *= tl.reshape(tl.broadcast_to(s[:, :, None], (COLS, WORDS // GROUP, GROUP)), (COLS, WORDS))
        else:
            even, odd = tl.split(tl.reshape(a, (WORDS, 2, 2)))
            a0, a2 = tl.split(even)
            a1, a3 = tl.split(odd)
            low = w ^ -0x7F7F7F80  # each byte plus 128
            high = low >> 16
            part = _field(low, magic, 0, 8) * a0[None, :]
            part += _field(low, magic, 8, 8) * (a1 / 256)[None, :]
            part += _field(high, magic, 0, 8) * a2[None, :]
            part += _field(high, magic, 8, 8) * (a3 / 256)[None, :]
        total += tl.sum(part, 1)
    if not INT4:
        total *= tl.load(scale + col, col < outputs, 0.0)
    if row_scale is not None:
        total *= tl.load(row_scale + row)
    if bias is not None:
        total += tl.load(bias + col, col < outputs, 0.0).to(tl.float32)
    tl.store(y + row * outputs + col, total, col < outputs)


@triton.jit
def tile_kernel(x, weight, scale, row_scale, bias, y, rows, inputs, outputs, row_bytes, groups, ROWS: tl.constexpr,
                COLS: tl.constexpr, BYTES: tl.constexpr, INT4: tl.constexpr, GROUP_BYTES: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    lane = tl.arange(0, BYTES)
    dynamic: tl.constexpr = x.dtype.element_ty == tl.int8
    acc = tl.zeros((ROWS, COLS), tl.int32 if dynamic else tl.float32)
    x += row.to(tl.int64) * inputs
    weight += col[None, :].to(tl.int64) * row_bytes
    for start in range(0, row_bytes, BYTES):
        byte = start + lane
        w = tl.load(weight + byte[:, None], (byte < row_bytes)[:, None] & (col < outputs)[None, :], 0)
        if INT4:
            even = 2 * byte
            s = tl.load(scale + col.to(tl.int64) * groups + start // GROUP_BYTES, col < outputs, 0.0)[None, :]
            low = ((w & 15).to(tl.float32) - 8).to(x.dtype.element_ty)
            high = ((w >> 4).to(tl.float32) - 8).to(x.dtype.element_ty)
            x_low = tl.load(x + even[None, :], (row < rows) & (even < inputs)[None, :], 0.0)
            x_high = tl.load(x + even[None, :] + 1, (row < rows) & (even + 1 < inputs)[None, :], 0.0)
            part = tl.dot(x_low, low, input_precision="ieee")
            acc += tl.dot(x_high, high, part, input_precision="ieee") * s
        else:
            a = tl.load(x + byte[None, :], (row < rows) & (byte < inputs)[None, :], 0)
            if dynamic:
                acc = tl.dot(a, w, acc, out_dtype=tl.int32)
            else:  # every integer is exact in 16 bits too
                acc += tl.dot(a, w.to(x.dtype.element_ty), input_precision="ieee")
    result = acc.to(tl.float32)
    if not INT4:
        result *= tl.load(scale + col, col < outputs, 0.0)[None, :]
    if dynamic:
        result *= tl.load(row_scale + row, row < rows, 0.0)
    if bias is not None:
        result += tl.load(bias + col, col < outputs, 0.0).to(tl.float32)[None, :]
    tl.store(y + row * outputs + col[None, :], result, (row < rows) & (col < outputs)[None, :])


_kernels = differentiable("quantized_linear_triton", forward)
