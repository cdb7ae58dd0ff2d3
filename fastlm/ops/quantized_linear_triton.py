"""quantized_linear in Triton: few rows by kernels that widen the weight in registers, many by the library's products.

Up to 16 rows a program takes a block of outputs. Its inputs are in slices, each of them multiplied by a warp's tensor
cores, and the slices' sums are added at the end: so the weight arrives by many copies at once. A single row goes
without tensor cores where it was faster. For more rows the weight is widened once, or the rows rounded to 8 bits, and
torch multiplies. Tiles are those that an H200 was fastest with: benchmarks/LOG.md 2026-11-26.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastlm.ops.quantized_linear import MODES, differentiable, reference
from fastlm.ops.triton_kernels import DTYPES, INTERPRETED, cannot_here, launch, multiprocessors
from fastlm.ops.triton_kernels import loses as loses_here

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

ACCEPTS = {f"{mode} {name}" for mode in MODES for name in ("one row", "odd sizes", "one output", "no rows",
                                                           "outliers", "transposed")}
ACCEPTS |= {"groups of 32", "groups of 128"}

MOST_ROWS = 16  # of what reads the weight as it is: the widest tile that a warp gives the rows


def _pairs(bits, top, number):
    """Return code for four bytes $2: `bits` leaves in t what is to get the byte `top` above, and `number` makes of two
    such 16 bits, called #, two numbers."""
    return "\n".join(("{ .reg .b32 t, u, one, less;", bits, f"prmt.b32 $0, t, {top}, 0x4140;",
                      f"prmt.b32 $1, t, {top}, 0x4342;", number.replace("#", "$0"), number.replace("#", "$1"), "}"))


# 2^7 (bfloat16) and 2^10 (float16) have an exponent behind which bits are numbers; to take that power away, from two at
# a time, is exact. bfloat16 has room for 7 bits there: the eighth says how much to take away.
_LOW, _HIGH = "and.b32 t, $2, 0x0F0F0F0F;", "shr.u32 t, $2, 4; and.b32 t, t, 0x0F0F0F0F;"
_ONE = "mov.b32 one, 0x3F803F80;"
_FOUR = {torch.bfloat16: (f"{_ONE} mov.b32 less, 0xC308C308;", "0x43434343", "fma.rn.bf16x2 #, #, one, less;"),
         torch.float16: ("mov.b32 less, 0x64086408;", "0x64646464", "sub.f16x2 #, #, less;")}
LOW = {dtype: _pairs(_LOW + bits, *rest) for dtype, (bits, *rest) in _FOUR.items()}
HIGH = {dtype: _pairs(_HIGH + bits, *rest) for dtype, (bits, *rest) in _FOUR.items()}
BYTES = {torch.bfloat16: _pairs(f"mov.b32 t, $2; {_ONE}", "0", "lop3.b32 less, #, 0x00800080, 0xC300C300, 0xEA; "
                                "lop3.b32 u, #, 0x007F007F, 0x43004300, 0xEA; fma.rn.bf16x2 #, u, one, less;"),
         torch.float16: _pairs("xor.b32 t, $2, 0x80808080; mov.b32 less, 0x64806480;", "0x64646464",
                               "sub.f16x2 #, #, less;")}


def cannot(x, weight, scale, bias, mode, group_size):
    if x.shape[0] > MOST_ROWS and x.numel() and weight.numel():
        if mode == "int8_dynamic" and any(size % 8 for size in weight.shape):
            return f"more than {MOST_ROWS} rounded rows: torch multiplies 8 bits in sizes that are multiples of 8"
        if mode != "int8_dynamic" and x.dtype is not torch.bfloat16:
            return f"more than {MOST_ROWS} rows: the weight is widened in bfloat16 alone"
    return cannot_here(x)


def loses(x, *args):
    return loses_here(x)


def run(*args):
    return _kernels(args[:4], *args[4:])[0]


def forward(tensors, needs, mode, group_size):
    x, weight, scale, bias = tensors
    if not x.numel() or not weight.numel():
        return [reference(x, weight, scale, bias, mode, group_size)]
    weight, scale, bias = (None if t is None else t.contiguous() for t in (weight, scale, bias))
    x, row_scale, many = x.contiguous(), None, x.shape[0] > MOST_ROWS
    if many and mode != "int8_dynamic":
        wide = x.new_empty(weight.shape[0], x.shape[1])
        launch(plan_widen, weight, scale, wide, mode, group_size)
        return [F.linear(x, wide, bias)]
    y = x.new_empty(x.shape[0], weight.shape[0])
    if mode == "int8_dynamic":
        x, wide = x.new_empty(x.shape, dtype=torch.int8), x
        row_scale = x.new_empty(x.shape[0], 1, dtype=torch.float32)
        launch(plan_round, wide, x, row_scale)
    if many:
        launch(plan_scales, torch._int_mm(x, weight.t()), row_scale, scale, bias, y)
    else:
        launch(plan, x, in_words(x, weight), scale, row_scale, bias, y, mode, group_size)
    return [y]


def in_words(x, weight):
    """View a weight that goes without tensor cores as int32: that of one row in floating point, unless 8 bits have many
    outputs."""
    alone = x.shape[0] == 1 and x.dtype is not torch.int8
    faster = x.dtype is torch.float32 or weight.dtype is torch.uint8 or not _many(x, weight)
    possible = x.shape[1] % 8 == 0 and weight.storage_offset() % 4 == 0
    return weight.view(torch.int32) if alone and faster and possible else weight


def _many(x, weight):
    """Return whether each multiprocessor has many outputs."""
    return weight.shape[0] >= 64 * multiprocessors(x.device)


def plan_round(x, values, row_scale):
    """Return (kernel, grid, arguments) for x `[M, K]`, its int8 values and its scales `[M, 1]`."""
    rows, inputs = x.shape
    width = min(triton.next_power_of_2(inputs), 4096)
    return round_kernel, (rows,), dict(x=x, values=values, row_scale=row_scale, inputs=inputs, WIDTH=width,
                                       num_warps=min(max(width // 512, 1), 8))


def plan(x, weight, scale, row_scale, bias, y, mode, group_size):
    """Return (kernel, grid, arguments); `row_scale` `[M, 1]` and an int8 x are for "int8_dynamic", see `in_words`."""
    (rows, inputs), (outputs, columns) = x.shape, weight.shape
    int4, group_bytes, many = mode == "int4", group_size // 2, _many(x, weight)
    arguments = dict(x=x, weight=weight, scale=scale, bias=bias, y=y, outputs=outputs,
                     groups=scale.shape[1] if int4 else 1, INT4=int4)
    if weight.dtype is torch.int32:
        return row_kernel, (triton.cdiv(outputs, 8),), arguments | dict(
            eights=inputs // 8, magic=0x4B000000, COLS=8, GROUP=group_size // 8,
            WORDS=max(min(triton.next_power_of_2(columns), 1024), group_size // 8),
            num_warps=4 if many or x.dtype is torch.float32 else 8)
    packed = not INTERPRETED and x.dtype in BYTES
    tile = _tile(x, many, int4, group_bytes)
    return slices_kernel, (triton.cdiv(outputs, tile["COLS"]),), arguments | tile | dict(
        row_scale=row_scale, rows=rows, inputs=inputs, row_bytes=columns, ROWS=8 if rows <= 8 else 16,
        GROUP_BYTES=group_bytes, GROUPS=max(tile["SPAN"] // group_bytes, 1) if int4 else 1,
        LOW=LOW[x.dtype] if packed else None, HIGH=HIGH[x.dtype] if packed else None,
        BYTES=BYTES[x.dtype] if packed else None)


def _tile(x, many, int4, group_bytes):
    """Choose how many outputs a program has, and in how many slices of SPAN bytes of weight its inputs go at a time.

    For "int4" these are one group, or two where one is too short for a tensor core's operand.
    """
    if x.dtype is torch.float32:
        span = min(group_bytes, 32) if int4 else 32
        cols, once, stages = 32, 4 * span, 3
    elif int4:
        span = max(group_bytes, 32)
        cols, once, stages = 32 if many else 16, 256 if many or span > group_bytes else 512, 3
    elif x.dtype is torch.int8 or len(x) > 8:
        cols, once, span, stages = 32, 256, 64, 4 if many else 6
    else:
        cols, once, span, stages = 16, 512, 128, 4
    return dict(COLS=cols, SLICES=once // span, SPAN=span, num_warps=4, num_stages=stages)


def plan_widen(weight, scale, wide, mode, group_size):
    """Return (kernel, grid, arguments) for a weight and the same `[N, K]` as 16-bit numbers."""
    outputs, row_bytes = weight.shape
    width = min(triton.next_power_of_2(row_bytes), 2048)
    return widen_kernel, (outputs, triton.cdiv(row_bytes, width)), dict(
        weight=weight, scale=scale, wide=wide, inputs=wide.shape[1], row_bytes=row_bytes,
        groups=scale.shape[1] if mode == "int4" else 1, INT4=mode == "int4", GROUP_BYTES=group_size // 2, WIDTH=width,
        num_warps=max(width // 512, 1))


def plan_scales(sums, row_scale, scale, bias, y):
    """Return (kernel, grid, arguments) for products of integers `[M, N]`."""
    rows, outputs = sums.shape
    width = min(triton.next_power_of_2(outputs), 1024)
    return scales_kernel, (rows, triton.cdiv(outputs, width)), dict(
        sums=sums, row_scale=row_scale, scale=scale, bias=bias, y=y, outputs=outputs, WIDTH=width, num_warps=4)


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
def row_kernel(x, weight, scale, bias, y, eights, outputs, groups, magic, COLS: tl.constexpr, WORDS: tl.constexpr,
               GROUP: tl.constexpr, INT4: tl.constexpr):
    EACH: tl.constexpr = 8 if INT4 else 4  # weights in a word
    col = (tl.program_id(0) * COLS + tl.arange(0, COLS)).to(tl.int64)
    words = eights * (8 // EACH)
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
            high = w >> 16
            part = _field(w, magic, 0, 4) * a0[None, :]
            part += _field(w, magic, 4, 4) * (a1 / 16)[None, :]
            part += _field(w, magic, 8, 4) * (a2 / 256)[None, :]
            part += _field(w, magic, 12, 4) * (a3 / 4096)[None, :]
            part += _field(w, magic, 16, 4) * (a4 / 65536)[None, :]
            part += _field(high, magic, 4, 4) * (a5 / 16)[None, :]
            part += _field(high, magic, 8, 4) * (a6 / 256)[None, :]
            part += _field(high, magic, 12, 4) * (a7 / 4096)[None, :]
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
    if bias is not None:
        total += tl.load(bias + col, col < outputs, 0.0).to(tl.float32)
    tl.store(y + col, total, col < outputs)


@triton.jit
def _four_bits(w, CODE: tl.constexpr, AT: tl.constexpr, x):
    """Return four bits of bytes from bit AT on, less 8, in the dtype of x, by machine code where there is some."""
    if CODE is None:
        return (((w >> AT) & 15).to(tl.float32) - 8).to(x.dtype)
    else:
        return tl.inline_asm_elementwise(CODE, "=r,=r,r", [w], dtype=x.dtype, is_pure=True, pack=4)


@triton.jit
def _eight_bits(w, CODE: tl.constexpr, x):
    if CODE is None:
        return w.to(x.dtype)
    else:
        return tl.inline_asm_elementwise(CODE, "=r,=r,r", [w], dtype=x.dtype, is_pure=True, pack=4)


@triton.jit
def _scales(scale, col, group, outputs, groups, GROUPS: tl.constexpr):
    """Return the scales of the groups from `group` `[SLICES]` on, `[SLICES, COLS, GROUPS]`."""
    group = group[:, None, None] + tl.arange(0, GROUPS)[None, None, :]
    col = col[None, :, None]
    return tl.load(scale + col.to(tl.int64) * groups + group, (col < outputs) & (group < groups), 0.0)


@triton.jit
def _products(low, high, x):
    """Multiply four bits `[SLICES, COLS, SPAN]` with the even and the odd inputs of x `[SLICES, ROWS, 2 SPAN]`."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], low.shape[2], 2)))
    sums = tl.dot(low, tl.permute(even, (0, 2, 1)), input_precision="ieee")
    return tl.dot(high, tl.permute(odd, (0, 2, 1)), sums, input_precision="ieee")


@triton.jit
def slices_kernel(x, weight, scale, row_scale, bias, y, rows, inputs, outputs, row_bytes, groups, ROWS: tl.constexpr,
                  COLS: tl.constexpr, SLICES: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr,
                  GROUP_BYTES: tl.constexpr, INT4: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
                  BYTES: tl.constexpr):
    """Multiply `[COLS, K]` of the weight with all rows of x, transposed: the weight's numbers are made in registers.

    A slice has SPAN bytes at a time. Two numbers of a byte are neighbours in x: all even inputs are multiplied with low
    bits, all odd ones with high bits.
    """
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    part = tl.arange(0, SLICES)
    row = tl.arange(0, ROWS)
    lane = part[:, None, None] * SPAN + tl.arange(0, SPAN)[None, None, :]
    EACH: tl.constexpr = 2 if INT4 else 1
    lanes = part[:, None, None] * (EACH * SPAN) + tl.arange(0, EACH * SPAN)[None, None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((SLICES, COLS, ROWS), tl.int32 if dtype == tl.int8 else tl.float32)
    weight += col[None, :, None].to(tl.int64) * row_bytes
    x += row[None, :, None].to(tl.int64) * inputs
    if INT4:  # scales are asked for one step ahead
        s = _scales(scale, col, part * SPAN // GROUP_BYTES, outputs, groups, GROUPS)
    for start in range(0, row_bytes, SLICES * SPAN):
        w = tl.load(weight + start + lane, (start + lane < row_bytes) & (col < outputs)[None, :, None], 0)
        k = EACH * start + lanes
        live = (k < inputs) & (row < rows)[None, :, None]
        if not INT4:
            a = tl.load(x + k, live, 0)
            if dtype == tl.int8:
                acc = tl.dot(w, tl.permute(a, (0, 2, 1)), acc, out_dtype=tl.int32)
            else:  # every integer is exact in 16 bits too
                acc = tl.dot(_eight_bits(w, BYTES, a), tl.permute(a, (0, 2, 1)), acc, input_precision="ieee")
        elif GROUPS == 1:
            a = tl.load(x + k, live, 0)
            acc += _products(_four_bits(w, LOW, 0, a), _four_bits(w, HIGH, 4, a), a) * s
        else:  # each group's inputs beside zeros
            first = tl.arange(0, 2 * SPAN)[None, None, :] < SPAN
            a = tl.load(x + k, live & first, 0)
            b = tl.load(x + k, live & ~first, 0)
            low, high = _four_bits(w, LOW, 0, a), _four_bits(w, HIGH, 4, a)
            s0, s1 = tl.split(s)
            acc += _products(low, high, a) * s0[:, :, None]
            acc += _products(low, high, b) * s1[:, :, None]
        if INT4:
            s = _scales(scale, col, (start + (SLICES + part) * SPAN) // GROUP_BYTES, outputs, groups, GROUPS)
    result = tl.sum(acc, 0).to(tl.float32)
    if not INT4:
        result *= tl.load(scale + col, col < outputs, 0.0)[:, None]
    if row_scale is not None:
        result *= tl.load(row_scale + row, row < rows, 0.0)[None, :]
    if bias is not None:
        result += tl.load(bias + col, col < outputs, 0.0).to(tl.float32)[:, None]
    y += row[None, :].to(tl.int64) * outputs + col[:, None]
    tl.store(y, result, (row < rows)[None, :] & (col < outputs)[:, None])


@triton.jit
def widen_kernel(weight, scale, wide, inputs, row_bytes, groups, INT4: tl.constexpr, GROUP_BYTES: tl.constexpr,
                 WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    w = tl.load(weight + row * row_bytes + byte, byte < row_bytes, 0)
    dtype: tl.constexpr = wide.dtype.element_ty
    if INT4:
        s = tl.load(scale + row * groups + byte // GROUP_BYTES, byte < row_bytes, 0.0)
        low, high = ((w & 15).to(tl.float32) - 8) * s, ((w >> 4).to(tl.float32) - 8) * s
        k = tl.program_id(1) * (2 * WIDTH) + tl.arange(0, 2 * WIDTH)
        tl.store(wide + row * inputs + k, tl.interleave(low.to(dtype), high.to(dtype)), k < inputs)
    else:
        tl.store(wide + row * inputs + byte, (w.to(tl.float32) * tl.load(scale + row)).to(dtype), byte < inputs)


@triton.jit
def scales_kernel(sums, row_scale, scale, bias, y, outputs, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    live = col < outputs
    result = tl.load(sums + row * outputs + col, live, 0).to(tl.float32) * tl.load(row_scale + row)
    result *= tl.load(scale + col, live, 0.0)
    if bias is not None:
        result += tl.load(bias + col, live, 0.0).to(tl.float32)
    tl.store(y + row * outputs + col, result, live)


_kernels = differentiable("quantized_linear_triton", forward)
