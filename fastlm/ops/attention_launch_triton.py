"""Launch the kernels of attention_kernels_triton.py: block sizes, grids and arguments of attention and varlen_attn."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastlm.ops import attention_hopper_launch_triton as hopper
from fastlm.ops.attention_backward_kernels_triton import delta_kernel
from fastlm.ops.attention_common import Options
from fastlm.ops.attention_forward_kernels_triton import combine_kernel
from fastlm.ops.attention_kernels_triton import attention_kernel
from fastlm.ops.attention_score_kernels_triton import documents_kernel
from fastlm.ops.tensors import matmul_precision
from fastlm.ops.triton_kernels import INTERPRETED, cannot_here, generation, launch, multiprocessors

LOG2_E = 1.4426950408889634
# What the kernels read without strides.
COMPACT = ("sinks", "slopes", "lengths", "query_ids", "key_ids", "draws", "cu_q", "cu_k", "table")


class Call(NamedTuple):
    """A call of attention as the kernels see it.

    Packed sequences are one row of a batch that `cu_q` and `cu_k` cut; pages are rows of a batch that `table` names.
    """

    query: Tensor  # [B, H, Sq, D]
    key: Tensor  # [B, H_kv, Sk, D]
    value: Tensor  # [B, H_kv, Sk, Dv]
    mask: Tensor | None  # broadcasts to [B, H, Sq, Sk]
    sinks: Tensor | None  # [H]
    slopes: Tensor | None  # [B or 1, H]
    lengths: Tensor | None  # [B]
    query_ids: Tensor | None  # [B, Sq]
    key_ids: Tensor | None  # [B, Sk]
    draws: Tensor | None  # [B, H, Sq]
    options: Options
    cu_q: Tensor | None = None  # [B + 1]
    cu_k: Tensor | None = None  # [B + 1]
    table: Tensor | None = None  # [B, max_pages]
    max_q: int | None = None  # the longest sequence, where there are cu_q
    max_k: int | None = None
    splits: int | None = None  # as num_splits of varlen_attn

    @property
    def rows(self) -> int:
        return self.query.size(0) if self.cu_q is None else self.cu_q.size(0) - 1

    @property
    def group(self) -> int:
        return self.query.size(1) // self.key.size(1)

    @property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys that a row may have."""
        keys = self.key.size(2) if self.table is None else self.table.size(1) * self.key.size(2)
        return (self.query.size(2) if self.max_q is None else min(self.max_q, self.query.size(2)),
                keys if self.max_k is None else min(self.max_k, keys))


def cannot(query: Tensor, value: Tensor) -> str | None:
    """Return why these tensors have no kernel, or None."""
    widest = max(query.size(-1), value.size(-1))
    return cannot_here(query) or (f"head size {widest} is above 256" if widest > 256 else None)


def _compact(call: Call) -> Call:
    """Return the call with those tensors contiguous, and slopes, which may be float64, in float32."""
    call = call._replace(**{name: x.contiguous() for name in COMPACT if (x := getattr(call, name)) is not None})
    return call if call.slopes is None else call._replace(slopes=call.slopes.float())


def forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Write the output and the log-sum-exp; rows are numbered as in `lse`, whose strides are those of its view.

    Args:
        call: the inputs.
        out: contiguous, the output, 0 where a row is of no sequence.
        lse: `[B, H, Sq]`, float32, a view of contiguous memory laid out like `out`.
    """
    call = _compact(call)
    packed, any_rows = call.cu_q is not None, out.numel() and call.rows and call.longest[0]
    splits = _splits(call) if any_rows else 1
    if splits > 1:
        parts = out.new_empty(splits, *out.shape, dtype=torch.float32)
        part_lse = lse.new_empty(splits, lse.numel())
        if packed:
            part_lse.fill_(-torch.inf)  # of rows of no sequence
        launch(plan_forward, call, parts, part_lse, lse, splits, _ranges_of_queries(call, "forward"))
        return launch(plan_combine, parts, part_lse, out, lse, splits)
    if packed or not any_rows:
        out.zero_()
        lse.fill_(-torch.inf)
    if not any_rows:
        return
    if hopper.takes(call) and not hopper.narrow(call.options, hopper.NARROW[call.query.size(3)]):
        return launch(hopper.plan, call, out, lse, _longest(call))
    launch(plan_forward, call, out, lse, lse, 1, _ranges_of_queries(call, "forward"))


def backward(call: Call, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, needs: list[bool],
             like: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Return the gradients of query, key, value, mask and sinks, those that `needs` asks for.

    All are summed in a fixed order, except that of the query where the kernel for Hopper runs, which it does not with
    `torch.use_deterministic_algorithms(True)`.

    Args:
        call: the inputs.
        out: the output.
        lse: the log-sum-exp, `[B, H, Sq]` as in `forward`.
        dout: gradient of the output, a view `[B, H, Sq, Dv]`.
        dlse: gradient of the log-sum-exp in the layout of `lse`.
        needs: whose gradients.
        like: query, key, value, mask and sinks as the caller has them: the shapes of what is returned.
    """
    call = _compact(call)
    # The softmax over one key is constant, so zeros are exact.
    constant = call.longest[1] == 1 and call.sinks is None and call.cu_q is None and not call.options.return_lse
    whole = out.numel() and not constant and call.cu_q is None and call.lengths is None  # kernels write all rows
    found = [None if not n else t.new_empty(t.shape) if whole else t.new_zeros(t.shape)
             for t, n in zip(like, needs, strict=True)]
    dq, dk, dv, dmask, dsinks = found
    if not (out.numel() and call.rows and call.longest[0]):
        return found
    if constant:
        dq = dk = dmask = None
    if all([t is not None for t in (dq, dk, dv)]) and hopper.takes_backward(call, dout) and hopper.pays(call):
        sums, delta = _backward_on_hopper(call, out, lse, dout, dlse, dq, dk, dv)
        if dmask is not None:
            found[3] = _mask_gradient(call, sums, delta, dout, dmask)
        return found
    # Of queries of no sequence nobody writes delta, which is multiplied by 0 for the sinks.
    sums, delta = torch.empty_like(lse), (torch.zeros_like if call.cu_q is not None else torch.empty_like)(lse)
    rows, upstream = (out, lse, dlse, sums, delta, dout), (sums, delta, dout)
    apart = dq is None or dq.element_size() == 4  # IEEE products of a tile would not fit beside the others
    if apart:
        launch(plan_delta, *rows, call.options.dropout_p)
    if dq is not None:
        rows = (None, *rows[1:]) if apart else rows
        launch(plan_queries, call, *rows, dq, _ranges_of_queries(call, "queries"))
    if (dk is not None or dv is not None) and call.key.numel():
        places = None
        if call.slopes is not None and _near(call):
            places = torch.arange(call.query.size(2), device=lse.device, dtype=torch.float32)
        launch(plan_keys, call, *upstream, dk, dv, _ranges_of_keys(call), places)
    if dmask is not None and dmask.numel():
        found[3] = _mask_gradient(call, *upstream, dmask)
    if dsinks is not None:
        shares = torch.where(lse == -torch.inf, 0, (call.sinks[:, None] - lse).exp())
        found[4] = -(shares * delta).sum((0, 2)).div(hopper.share(call.options.dropout_p)).to(dsinks.dtype)
    return found


def _backward_on_hopper(call, out, lse, dout, dlse, dq, dk, dv):
    """Write these gradients by the kernel for Hopper; return `sums` and `delta` as plan_mask reads them."""
    shape, dim = hopper.padded(call), dq.size(3)
    sums = lse.new_empty(1 if call.slopes is None else 3, *shape)
    delta, total = lse.new_empty(shape), lse.new_empty(*shape, dim)
    launch(hopper.plan_prepare, call, out, lse, dlse, dout, sums, delta, total)
    launch(hopper.plan_backward, call, sums, delta, dout, total, dk, dv, _longest(call))
    launch(hopper.plan_unfold, total, dq, call.options.scale / hopper.share(call.options.dropout_p))
    return sums[0, :, :, :dq.size(2)], delta[:, :, :dq.size(2)]


def _longest(call):
    """Return with ALiBi the largest sums of squares of the rows of each head of queries and of keys."""
    if call.slopes is None:
        return None
    found = [torch.zeros(x.shape[:2], device=x.device) for x in (call.query, call.key)]
    for x, numbers in zip((call.query, call.key), found, strict=True):
        launch(hopper.plan_longest, x, numbers)
    return tuple(found)


def _mask_gradient(call, sums, delta, dout, dmask):
    parts = parts_of_mask(call)
    launch(plan_mask, call, sums, delta, dout, parts)
    return parts.sum_to_size(dmask.shape).to(dmask.dtype)


def draws(query: Tensor) -> Tensor:
    """Draw from torch's generator the bits that decide what dropout drops of each row of queries, `[B, H, Sq]`."""
    return torch.randint(-(2**63), 2**63 - 1, query.shape[:3], device=query.device).bitwise_or_(1 << 32)


def dropped(call: Call) -> Tensor:
    """Return which weights dropout drops, `[B, H, Sq, Sk]`, as the kernels find it."""
    def low(x):
        return x & 0xFFFFFFFF

    bits = call.draws[..., None]
    mixed = low(torch.arange(call.key.size(2), device=bits.device) * 0x9E3779B9)
    mixed = mixed ^ (mixed >> 15)
    mixed = low(low(bits) + low(bits >> 32) * mixed)
    return mixed - ((mixed >> 31) << 32) <= hopper.threshold(call.options.dropout_p)


# --- launches: (kernel, grid, arguments) -----------------------------------------------------------------------


def plan_forward(call, out, out_lse, lse, splits, ranges=None):
    """Plan the output and log-sum-exp, in `splits` parts of the keys; `lse` is laid out like one part."""
    tiles = _tiles("forward", call)
    blocks = -(-call.longest[0] * call.group // tiles["M"])
    arguments = _arguments(call, "forward", tiles, blocks, ranges, lse, lse=out_lse, o=out,
                           splits=splits if splits > 1 else None)
    return attention_kernel, (blocks * splits * call.key.size(1) * call.rows,), arguments


def plan_combine(parts, part_lse, out, lse, splits):
    """Plan the merge of the parts of a forward pass."""
    arguments = dict(parts=parts, part_lse=part_lse, o=out, lse=lse, rows_in_all=lse.numel(), splits=splits,
                     DV=out.size(-1), BLOCK_DV=_block(out.size(-1)), num_warps=4)
    return combine_kernel, (lse.numel(),), arguments


def plan_delta(out, lse, dlse, sums, delta, dout, dropout_p):
    """Plan `sums` and `delta`, what all gradients need of each query."""
    # The dimensions of `lse` in the order of its memory, so that its rows are numbered 0, 1, …
    x, y, z = sorted(range(3), key=lambda d: (-lse.stride(d), d))
    dim = out.size(-1)
    rows = 64 if dim <= 128 else 32
    share = hopper.share(dropout_p) if dropout_p else None
    arguments = dict(o=out, do=dout, lse=lse, dlse=dlse, sums=sums, delta=delta, rows_in_all=lse.numel(), share=share,
                     Y=lse.size(y), Z=lse.size(z), do_x=dout.stride(x), do_y=dout.stride(y), do_z=dout.stride(z),
                     do_d=dout.stride(3), DV=dim, M=rows, BLOCK_DV=_block(dim), EXACT=_exact(out), num_warps=4)
    return delta_kernel, (triton.cdiv(lse.numel(), rows),), arguments


def plan_queries(call, out, lse, dlse, sums, delta, dout, dq, ranges=None):
    """Plan the gradient of the queries, and first, unless `out` is None, what `plan_delta` does."""
    tiles = _tiles("queries", call)
    blocks = -(-call.longest[0] * call.group // tiles["M"])
    arguments = _arguments(call, "queries", tiles, blocks, ranges, lse, o=out, lse=lse, dlse=dlse, sums=sums,
                           delta=delta, do=dout, dq=dq)
    return attention_kernel, (blocks * call.key.size(1) * call.rows,), arguments


def plan_keys(call, sums, delta, dout, dk, dv, ranges=None, places=None):
    """Plan the gradients of keys and values; with ALiBi `places` may be the numbers of the queries as floats."""
    tiles = _tiles("keys", call)
    blocks = -(-call.longest[1] // tiles["N"])
    arguments = _arguments(call, "keys", tiles, blocks, ranges, sums, sums=sums, delta=delta, do=dout, dk=dk,
                           dv=dv, places=places)
    return attention_kernel, (blocks * call.key.size(1) * call.rows,), arguments


def parts_of_mask(call):
    """Return memory for the gradient of an additive mask: over queries or keys that share it, for a sum of each tile.
    """
    over_rows, over_cols, row_blocks, column_blocks = _tiles_of_mask(call)
    batch, heads, queries, keys = call.mask.shape
    shape = (batch, heads, row_blocks if over_rows else queries, column_blocks if over_cols else keys)
    return call.mask.new_empty(shape, dtype=torch.float32 if over_rows or over_cols else call.mask.dtype)


def plan_mask(call, sums, delta, dout, dmask):
    """Plan the gradient of an additive mask, or the parts of it that are to be summed up."""
    over_rows, over_cols, row_blocks, column_blocks = _tiles_of_mask(call)
    batch, heads, *_ = call.mask.shape
    shared_heads = call.query.size(1) // heads
    arguments = _arguments(call, "mask", _tiles("mask", call), row_blocks * column_blocks, None, sums, sums=sums,
                           delta=delta, do=dout, dmask=dmask, mask_heads=heads, shared_heads=shared_heads,
                           shared=shared_heads * (call.rows // batch), column_blocks=column_blocks,
                           MASK_ROWS=not over_rows, MASK_COLS=not over_cols)
    return attention_kernel, (row_blocks * column_blocks * batch * heads,), arguments


def _tiles_of_mask(call):
    """Return whether queries and keys share the mask, and the numbers of tiles of them."""
    tiles, (*_, queries, keys) = _tiles("mask", call), call.mask.shape
    all_queries, all_keys = call.query.size(2), call.key.size(2)
    return (queries == 1 < all_queries, keys == 1 < all_keys, triton.cdiv(all_queries, tiles["M"]),
            triton.cdiv(all_keys, tiles["N"]))


def plan_ranges(ids, others, ranges, group, rows):
    """Plan which part of `others` shares documents with each tile of `rows` rows of `ids`, and where all are alike."""
    batch, blocks, _ = ranges.shape
    arguments = dict(ids=ids, others=others, ranges=ranges, S=ids.size(1), others_S=others.size(1), blocks=blocks,
                     group=group, M=rows, STEP=1024, num_warps=4)
    return documents_kernel, (batch * blocks,), arguments


def _ranges_of_queries(call, kind):
    if call.query_ids is None:
        return None
    rows = _tiles(kind, call)["M"]
    blocks = -(-call.longest[0] * call.group // rows)
    return _ranges(call.query_ids, call.key_ids, blocks, call.group, rows)


def _ranges_of_keys(call):
    if call.query_ids is None:
        return None
    rows = _tiles("keys", call)["N"]
    return _ranges(call.key_ids, call.query_ids, -(-call.longest[1] // rows), 1, rows)


def _ranges(ids, others, blocks, group, rows):
    """Return, `[B, blocks, 4]`, the ranges of `others` that `documents_kernel` finds for the tiles of `ids`."""
    found = ids.new_empty(ids.size(0), blocks, 4, dtype=torch.int32)
    launch(plan_ranges, ids, others, found, group, rows)
    return found


OFF = dict.fromkeys(("places", "o", "lse", "do", "dlse", "sums", "delta", "dq", "dk", "dv", "dmask", "splits",
                     "mask_heads", "shared_heads", "shared", "column_blocks", "page_size", "pages", "table_b",
                     "slopes_b", "threshold", "share"))
OFF |= dict(MASK_ROWS=True, MASK_COLS=True)
STRIDES = [*(f"{name}_{axis}" for name in ("q", "k", "v", "mask", "do") for axis in "bhsd"), "row_b", "row_h", "row_s",
           "col_b", "col_h", "col_s"]


def _arguments(call, kind, tiles, blocks, ranges, layout, **given):
    """Return the arguments of `attention_kernel`; what is not given is off.

    Strides go by (batch, head, row, column); `layout` has those of the rows of the output.
    """
    query, key, value, mask, options = call.query, call.key, call.value, call.mask, call.options
    added = mask is not None and mask.dtype is not torch.bool
    # In float32 the log-sum-exp must be exact to the last bit of a large score.
    scaled = bool(added or query.dtype is torch.float32 or (options.scale <= 0 and not options.softcap))
    unit = 1.0 if scaled else options.softcap or options.scale
    kv_heads, keys = key.size(1), key.size(2)
    columns = (kv_heads * keys, keys, 1) if call.cu_k is None else (0, 1, kv_heads)
    # Where rows of a batch share a mask, their programs follow each other, so that it is read from memory once.
    together = call.rows if call.mask is not None and call.mask.size(0) == 1 and kind != "mask" else 1
    found = dict(
        OFF, q=query, k=key, v=value, mask=mask, sinks=call.sinks, slopes=call.slopes, lengths=call.lengths,
        query_ids=call.query_ids, key_ids=call.key_ids, cu_q=call.cu_q, cu_k=call.cu_k, table=call.table, ranges=ranges,
        draws=call.draws, H=query.size(1), group=call.group, Sq=query.size(2), Sk=keys, blocks=blocks,
        together=together, rows_in_all=layout.numel(), factor=unit * LOG2_E, scale=options.scale,
        cap=options.softcap or None, left=_bound(options.left), right=_bound(options.right),
        mask_keys=None if mask is None else keys, D=query.size(3), DV=value.size(3), BLOCK_D=_block(query.size(3)),
        BLOCK_DV=_block(value.size(3)), CAUSAL=options.is_causal, SCALED=scaled, EXACT=_exact(query),
        COARSE=query.dtype is torch.bfloat16, NEAR=_near(call), KIND=kind,
        EVEN=mask is not None and keys % 16 == 0, GROUPED=call.group > 1, **tiles, **given)
    of_do = _steps(given.get("do"))
    found.update(zip(STRIDES, (*_steps(query), *_steps(key), *_steps(value), *_steps(mask), *of_do, *_steps(layout),
                               *columns), strict=True))
    if call.table is not None:
        found.update(Sk=call.table.size(1) * keys, page_size=keys, pages=key.size(0), table_b=call.table.stride(0))
    if call.slopes is not None:
        found["slopes_b"] = _steps(call.slopes)[0]
    if options.dropout_p:
        p = options.dropout_p
        found.update(threshold=hopper.threshold(p), share=hopper.share(p))
    return found


def _near(call):
    """Tell whether all positions are below 2²²."""
    keys = call.key.size(2) * (1 if call.table is None else call.table.size(1))
    return max(call.query.size(2), keys) < 1 << 22


def _exact(x):
    """Tell whether products are IEEE float32."""
    return x.dtype is torch.float32 and matmul_precision("cuda") == "highest"


def _bound(x):
    return None if x < 0 else x


def _steps(x):
    """Return the strides; packed sequences and what is shared are rows of a batch of one, which all rows use."""
    return (None,) * 4 if x is None else [0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]


def _block(dim):
    return max(16, 1 << (dim - 1).bit_length())


# --- sizes of tiles --------------------------------------------------------------------------------------------

# (M, N, warps, stages) and, where given, the most registers of a thread, for heads up to 64, 128 and 256 wide: for
# 16-bit types on a generation of GPUs or a later one, and for float32; with a mask, dropout, documents or a narrow
# window, a cap, or ALiBi others, where named. Those of 16 bits for Hopper, up to 128 wide, are the fastest of a sweep
# on an H200, or within 7% of it; the others are not timed, but fit registers and shared memory.
TILES = {
    90: {
        "forward": ((64, 64, 4, 3), (128, 128, 8, 3), (64, 32, 8, 2)),
        "masked forward": ((64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
        "dropout forward": ((128, 64, 8, 3), (128, 128, 8, 3), (64, 32, 8, 2)),
        "narrow forward": ((64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 8, 2)),
        "keys": ((64, 64, 4, 3, 168), (64, 64, 4, 2), (64, 32, 8, 1)),
        "masked keys": ((64, 64, 4, 3), (32, 64, 4, 2), (64, 32, 8, 1)),
        "queries": ((128, 64, 8, 3, 128), (64, 64, 4, 2), (32, 32, 8, 1)),
        "masked queries": ((64, 64, 4, 3), (128, 64, 8, 3), (32, 32, 8, 1)),
        "capped queries": ((64, 64, 4, 3), (64, 64, 4, 2), (32, 32, 8, 1)),
        "alibi queries": ((128, 64, 8, 3, 128), (128, 64, 8, 3), (32, 32, 8, 1)),
        "narrow queries": ((64, 64, 4, 3), (64, 64, 4, 2), (32, 32, 8, 1)),
        "dropout queries": ((64, 64, 4, 3), (128, 64, 8, 3), (32, 32, 8, 1)),
        "mask": ((64, 64, 4, 2), (128, 64, 8, 2), (32, 32, 8, 1)),
        "few queries": ((16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2)),
    },
    80: {
        "forward": ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
        "masked forward": ((128, 64, 8, 3), (64, 32, 8, 2), (64, 32, 8, 2)),
        "dropout forward": ((128, 64, 8, 3), (64, 32, 8, 2), (64, 32, 8, 2)),
        "keys": ((64, 64, 4, 1), (64, 64, 8, 1), (64, 32, 8, 1)),
        "masked keys": ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
        "dropout keys": ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
        "queries": ((128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
        "mask": ((64, 64, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
        "few queries": ((16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2)),
    },
    "float32": {
        "forward": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        "keys": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        "queries": ((32, 32, 4, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        "mask": ((32, 32, 4, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        "few queries": ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
    },
}


def _tiles(kind, call):
    """Choose rows of queries (M) and of keys (N) in a tile, warps and pipeline stages."""
    if INTERPRETED:  # fewer operations than in small tiles
        return {"M": 64, "N": 64, "CUT_STAGES": 1, "num_warps": 4, "num_stages": 1}
    wide = max(call.query.size(3), call.value.size(3))
    table = TILES["float32"]
    if call.query.element_size() == 2:
        table = TILES[90 if generation(call.query.device) >= 90 else 80]
    window = hopper.narrow(call.options, 1024)
    features = {"masked": call.mask is not None, "dropout": call.draws is not None,
                "narrow": window or call.query_ids is not None, "capped": call.options.softcap,
                "alibi": call.slopes is not None}
    feature = next((name for name, there in features.items() if there), "")
    if kind == "forward" and call.longest[0] * call.group <= 16:
        kind = "few queries"
    M, N, warps, stages, *registers = table.get(f"{feature} {kind}", table[kind])[(wide > 64) + (wide > 128)]
    ahead = kind == "queries" and feature == "narrow" and window and 64 < wide <= 128 and table is TILES[90]
    found = {"M": M, "N": N, "CUT_STAGES": 2 if ahead else 1, "num_warps": warps, "num_stages": stages}
    return found | ({"maxnreg": registers[0]} if registers and not call.options.softcap else {})  # a cap would spill


def _splits(call):
    """Choose into how many parts the keys are split, so that few queries fill the multiprocessors twice."""
    (queries, keys), most = call.longest, 2 * multiprocessors(call.query.device)
    heads = call.key.size(1) * call.rows
    if not call.splits and -(-queries * call.group // 128) * heads > most:
        return 1
    tiles = _tiles("forward", call)
    blocks = -(-keys // tiles["N"])
    if call.splits:
        return max(1, min(call.splits, blocks))
    programs = -(-queries * call.group // tiles["M"]) * heads
    return max(1, min(most // programs, blocks // 2, 128))
