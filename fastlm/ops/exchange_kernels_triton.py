"""How programs of one launch in Triton that share a row tell each other what their parts add to its sums.

A program publishes two numbers as one word of 64 bits, which is written and read at once, and is never 0: so a word
that is there needs no flag and no fence.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from fastlm.ops.triton_kernels import early, launch


def no_words(x, rows, parts):
    """Return zeros for the words of rows that programs share: written while those read their rows, where that can be.

    Its reader is the next launch, with `launch_pdl`, and waits before it publishes a word.
    """
    if not early(x.device):
        return x.new_zeros(rows, parts, dtype=torch.int64)
    words = x.new_empty(rows, parts, dtype=torch.int64)
    launch(plan_zero, words)
    return words


def plan_zero(words):
    """Return (kernel, grid, arguments)."""
    count = words.numel()
    return zero_kernel, (triton.cdiv(count, 1024),), dict(words=words, count=count, SIZE=1024, num_warps=4)


@triton.jit
def zero_kernel(words, count, SIZE: tl.constexpr):
    gdc_launch_dependents()
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(words + at, tl.zeros((SIZE,), tl.int64), at < count)


@triton.jit
def word(high, low):
    """Return the bits of two numbers as one."""
    low = low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return high.to(tl.int32, bitcast=True).to(tl.int64) << 32 | low


@triton.jit
def numbers(words):
    return (words >> 32).to(tl.int32).to(tl.float32, bitcast=True), words.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def exchange(words, part, word, idle, parts, SLOTS: tl.constexpr):
    """Publish a program's word, and wait for those of all parts of its row, `[SLOTS]`, `idle` beyond the last part.

    The parts of a row are neighbours, and programs start in order, so those that one waits for run or are next to. To
    wait is no loop of Triton's, which would keep it from pipelining the loop around.
    """
    tl.atomic_xchg(words + part, word, sem="relaxed")
    slot = tl.arange(0, SLOTS)
    found = tl.inline_asm_elementwise(
        "{.reg .pred absent; wait: ld.relaxed.gpu.global.b64 $0, [$1]; setp.eq.s64 absent, $0, 0; @absent bra wait;}",
        "=&l,l", [(words + tl.minimum(slot, parts - 1)).to(tl.int64)], tl.int64, False, 1)
    return tl.where(slot < parts, found, idle)


@triton.jit
def exchange_once(words, part, word, idle, parts, SLOTS: tl.constexpr):
    """Do the same for a word `[1, 1]`, where no loop is around, and return `[1, SLOTS]`."""
    slot = tl.arange(0, SLOTS)[None, :]
    tl.atomic_xchg(words + part + tl.zeros((1, 1), tl.int32), word, sem="relaxed")
    # Where it runs once, a loop of Triton's is faster than one in PTX: 151 us against 168 (softmax of 1024x131072).
    found = tl.load(words + slot, slot < parts, idle, volatile=True)
    while tl.min((found != 0).to(tl.int32)) == 0:
        found = tl.load(words + slot, slot < parts, idle, volatile=True)
    return found
