"""Which calls the Gluon kernels of attention take, forward and backward, and how they are launched.

Gluon is experimental, so it is imported only for a launch, and only of the Triton that it was run with.
"""

import torch
import triton
from torch import Tensor

from fastlm.ops.attention_common import Options
from fastlm.ops.gpu import capability
from fastlm.ops.triton_kernels import INTERPRETED, multiprocessors

LOG2_E = 1.4426950408889634
KNOWN = triton.__version__.startswith("3.6.")
LEAST = 128  # fewer queries or keys leave most of a tile empty
ROWS = 64  # of a warp group
COLUMNS = 128  # keys in a block
NARROW = {64: 1024, 128: 256}  # head size -> a window of fewer keys is the plain kernel's
# Head size -> warp groups, stages of the rings, registers of a thread: the fastest of a few on an H200. Dropout needs
# more registers than three groups leave each other.
TILES = {64: (3, 3, 160), 128: (2, 2, 240)}
DROPOUT_TILES = {64: (2, 3, 240), 128: (2, 2, 240)}


def takes(call) -> bool:
    """Tell whether the kernel can take a call: see `fits`; no feature but causality, a window, ALiBi and dropout."""
    features = (call.mask, call.sinks, call.lengths, call.query_ids, call.cu_q, call.cu_k, call.table)
    tensors = (call.query, call.key, call.value)
    return (all([x is None for x in features]) and fits(*tensors, call.options)
            and (call.slopes is None or max(call.longest) < 1 << 22)
            and all([x.data_ptr() % 16 == 0 for x in tensors]))


def narrow(options: Options, keys: int) -> bool:
    """Tell whether a window is of fewer keys: then most tiles are cut, and large ones waste much."""
    right = 0 if options.is_causal else options.right
    return options.left >= 0 and right >= 0 and options.left + right < keys


def fits(query: Tensor, key: Tensor, value: Tensor, options: Options) -> bool:
    """Tell whether the kernel can take such tensors, by what is known of them without looking at their memory."""
    return (KNOWN and not INTERPRETED and query.is_cuda and query.element_size() == 2
            and options.scale > 0 and not options.softcap
            and query.size(3) in TILES and query.size(3) == value.size(3)
            and query.size(2) >= LEAST and key.size(2) >= LEAST
            and reachable(query) and reachable(key) and reachable(value) and capability(query.device) == (9, 0))


def reachable(x: Tensor) -> bool:
    """Tell whether the copy engine can read `[B, H, S, D]`: rows of adjacent numbers, 16 bytes between all others."""
    *steps, last = x.stride()
    return last == 1 and all([n == 1 or (s > 0 and s % 8 == 0) for n, s in zip(x.shape, steps, strict=False)])


def wins(query: Tensor, key: Tensor, value: Tensor, options: Options) -> bool:
    """Tell whether the kernel is at least as fast as SDPA, which was measured on an H200, of 2^18 rows in all heads."""
    least = 1024 if query.size(3) == 128 else 4096
    return (fits(query, key, value, options) and query.size(2) >= least and key.size(2) >= least
            and query.size(0) * query.size(1) * query.size(2) >= 1 << 18)


BACKWARD_ROWS = {64: 128, 128: 64}  # head size -> queries in a tile


def takes_backward(call, dout: Tensor) -> bool:
    """Tell whether the kernel of the backward pass can take a call, the upstream gradient being `dout`.

    It adds the gradient of the queries in no fixed order. Of masks it takes those of 16 bits for each query and key,
    but not beside dropout, for whose bits shared memory does not suffice. What a query draws is 8 bytes, and the copy
    engine's copies begin at multiples of 16: 653 queries ended with an illegal instruction.
    """
    mask, (batch, heads, queries, _) = call.mask, call.query.shape
    masked = mask is None or (
        call.draws is None and mask.is_floating_point() and mask.element_size() == 2
        and mask.shape[2:] == (queries, call.key.size(2)) and reachable(mask) and mask.data_ptr() % 16 == 0)
    begins = call.draws is None or queries % 2 == 0 or batch * heads == 1
    return (takes(call._replace(mask=None)) and masked and begins and reachable(dout) and dout.data_ptr() % 16 == 0
            and call.options.left < 0 and not torch.are_deterministic_algorithms_enabled()
            and batch * heads * (queries + LEAST) < 1 << 29)


def pays(call) -> bool:
    """Tell whether the kernel of the backward pass has enough to do: half the multiprocessors, as many as a call has
    blocks of keys. Two kernels have four times the blocks.
    """
    blocks = triton.cdiv(call.key.size(2), COLUMNS) * call.key.size(1) * call.key.size(0)
    return 2 * blocks >= multiprocessors(call.query.device)


def padded(call) -> tuple[int, int, int]:
    """Return [B, H, Sq] with whole tiles of queries."""
    batch, heads, queries, dim = call.query.shape
    return batch, heads, triton.cdiv(queries, BACKWARD_ROWS[dim]) * BACKWARD_ROWS[dim]


def plan_prepare(call, out: Tensor, lse: Tensor, dlse: Tensor, dout: Tensor, sums: Tensor, delta: Tensor,
                 total: Tensor) -> tuple:
    """Plan what `plan_backward` reads of each query, `sums`, in 3 planes with ALiBi, and `delta`; zeros in `total`."""
    from fastlm.ops.attention_backward_kernels_triton import prepare_kernel

    batch, heads, queries, dim = call.query.shape
    slopes, p, rows = call.slopes, call.options.dropout_p, BACKWARD_ROWS[dim]
    tiles = triton.cdiv(queries, rows)
    do_b, do_h, do_s, _ = dout.stride()
    arguments = dict(
        o=out, do=dout, lse=lse, dlse=dlse, sums=sums, delta=delta, total=total, slopes=slopes,
        share=share(p) if p else None, queries=queries, tiles=tiles, heads=heads, do_b=do_b, do_h=do_h, do_s=do_s,
        slopes_b=0 if slopes is None or slopes.size(0) == 1 else slopes.stride(0), D=dim, M=rows, num_warps=rows // 16)
    return prepare_kernel, (batch * heads * tiles,), arguments


def plan_longest(x: Tensor, found: Tensor) -> tuple:
    """Plan the largest sum of squares of the rows of each head, `[B, H]`; it must be at least what `found` has."""
    from fastlm.ops.attention_backward_kernels_triton import longest_kernel

    batch, heads, rows, dim = x.shape
    x_b, x_h, x_s, _ = x.stride()
    tiles = triton.cdiv(rows, 128)
    arguments = dict(x=x, found=found, rows=rows, tiles=tiles, heads=heads, x_b=x_b, x_h=x_h, x_s=x_s, D=dim, M=128,
                     num_warps=8)
    return longest_kernel, (batch * heads * tiles,), arguments


def plan_backward(call, sums: Tensor, delta: Tensor, dout: Tensor, total: Tensor, dk: Tensor, dv: Tensor,
                  longest: tuple[Tensor, Tensor] | None = None) -> tuple:
    """Plan the gradients of keys and values, and that of queries, over the scale, added to `total` as blocks.

    These are `[64, 64]`, in the order of attention_hopper_backward_kernels_triton.py. With ALiBi `longest` are what
    `plan_longest` finds of queries and keys.
    """
    from fastlm.ops.attention_hopper_backward_kernels_triton import hopper_backward_kernel

    batch, _, queries, dim = call.query.shape
    heads, keys, rows, mask = call.key.size(1), call.key.size(2), BACKWARD_ROWS[dim], call.mask
    _, upper = band(call.options, queries, keys)
    blocks = triton.cdiv(keys, COLUMNS)
    numbers = features(call, sums, longest)
    plain = mask is None and not numbers["ALIBI"] and not numbers["DROPOUT"]
    sums_desc = describe_numbers(sums, rows)
    arguments = dict(
        q_desc=describe(call.query, rows), do_desc=describe(dout, rows), sums_desc=sums_desc,
        delta_desc=describe_numbers(delta, rows), draws_desc=describe_numbers(numbers.pop("draws"), rows),
        mask_desc=sums_desc if mask is None else describe(mask, rows, 64), k_desc=describe(call.key, ROWS),
        v_desc=describe(call.value, ROWS), dk_desc=describe(dk, ROWS), dv_desc=describe(dv, ROWS), total=total,
        **numbers, scale=call.options.scale * LOG2_E,
        dk_scale=call.options.scale / share(call.options.dropout_p), blocks=blocks, heads=heads, group=call.group,
        queries=queries, keys=keys, right=upper or 0, wide=batch if mask is not None else 1 if upper is None else 8,
        mask_b=int(mask is not None and mask.size(0) > 1), mask_h=int(mask is not None and mask.size(1) > 1),
        D=dim, M=rows, STAGES=2, LAG=int(dim == 64 or not plain), RIGHT=upper is not None, MASK=mask is not None,
        TURN=plain and dim == 64 and upper is None, num_warps=4)
    return hopper_backward_kernel, (blocks * heads * batch,), arguments


def plan_unfold(total: Tensor, dq: Tensor, scale: float) -> tuple:
    """Plan dq `[B, H, S, D]`, contiguous, from the blocks of `plan_backward`."""
    from fastlm.ops.attention_backward_kernels_triton import unfold_kernel

    dim = dq.size(3)
    rows = BACKWARD_ROWS[dim]
    arguments = dict(total=total, dq=dq, scale=scale, queries=dq.size(2), D=dim, M=rows, num_warps=4)
    return unfold_kernel, (total.numel() // dim // rows,), arguments


def plan(call, out: Tensor, lse: Tensor, longest: tuple[Tensor, Tensor] | None = None) -> tuple:
    """Plan the output `[B, H, Sq, D]` and log-sum-exp `[B, H, Sq]` of a call, both contiguous.

    With ALiBi `longest` are what `plan_longest` finds of queries and keys.
    """
    from fastlm.ops.attention_hopper_kernels_triton import hopper_kernel

    batch, heads, queries, dim = call.query.shape
    keys, (groups, stages, registers) = call.key.size(2), (TILES if call.draws is None else DROPOUT_TILES)[dim]
    lower, upper = band(call.options, queries, keys)
    blocks = triton.cdiv(queries, groups * ROWS)
    tiles = blocks * heads * batch
    arguments = dict(
        q_desc=describe(call.query, ROWS), k_desc=describe(call.key, COLUMNS), v_desc=describe(call.value, COLUMNS),
        o_desc=describe(out, ROWS), lse=lse, **features(call, lse, longest), scale=call.options.scale * LOG2_E,
        blocks=blocks, tiles=tiles, heads=heads, group=call.group, queries=queries, keys=keys, left=-(lower or 0),
        right=upper or 0, wide=together(blocks, upper is not None and lower is None), D=dim, N=COLUMNS, GROUPS=groups,
        STAGES=stages, RIGHT=upper is not None, LEFT=lower is not None, REGISTERS=registers, num_warps=4)
    return hopper_kernel, (min(tiles, multiprocessors(call.query.device)),), arguments


def describe_numbers(x: Tensor, count: int):
    """Return the descriptor of contiguous numbers for copies of so many."""
    import triton.experimental.gluon.language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, [x.numel()], [1], [count],
                            gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * x.element_size(), rank=1))


def features(call, other: Tensor, longest: tuple[Tensor, Tensor] | None) -> dict:
    """Return the arguments of ALiBi and dropout. Partitions of a kernel take no None: `other` stands for a tensor."""
    slopes, draws, p = call.slopes, call.draws, call.options.dropout_p
    longest_q, longest_k = longest or (other, other)
    return dict(slopes=other if slopes is None else slopes, draws=other if draws is None else draws,
                slopes_b=0 if slopes is None or slopes.size(0) == 1 else slopes.stride(0), longest_q=longest_q,
                longest_k=longest_k, threshold=threshold(p), share=share(p), ALIBI=slopes is not None,
                DROPOUT=draws is not None)


def threshold(p: float) -> int:
    """Return the signed 32-bit number that random ones are not above with probability p."""
    return max(round(p * 2**32), 1) - 1 - 2**31


def share(p: float) -> float:
    """Return what dropout divides by."""
    return 1 - p or 1.0


def band(options: Options, queries: int, keys: int) -> tuple[int | None, int | None]:
    """Return (lower, upper): query i sees key j where lower ≤ j - i ≤ upper; None is no bound."""
    ahead, uppers = keys - queries, []
    if options.is_causal:
        uppers.append(0)
    if options.right >= 0:
        uppers.append(ahead + min(options.right, queries))
    return ahead - min(options.left, keys) if options.left >= 0 else None, min(uppers, default=None)


def together(blocks: int, uneven: bool) -> int:
    """Choose how many heads have their tiles side by side.

    Tiles of even length go head after head, so that those of one head find its keys in the L2 cache. Programs take
    tiles there and back (`pick`): where lengths fall with a period near the number of programs, some would get all the
    long ones. So a period is a fraction of that number, or many times it.
    """
    if not uneven:
        return 1
    return 32 // blocks if blocks <= 16 else 64


def describe(x: Tensor, rows: int, columns: int | None = None):
    """Return the descriptor of `[B, H, S, D]` for copies of so many rows, and of columns, else of all."""
    import triton.experimental.gluon.language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # The engine wants a legal stride also of what there is one of.
    strides = [x.size(3) if x.size(d) == 1 else x.stride(d) for d in range(3)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, columns or x.size(3)],
                            gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4))
