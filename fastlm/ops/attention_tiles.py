"""Attention on the CPU tile by tile: some queries of some heads against all keys that one of them may see.

The scores of one tile are all that ever exists of them, so memory is linear in the lengths. Keys that no query of a
tile sees (causality, window, lengths, documents) are not touched. Two engines compute a tile: SDPA's flash kernel,
given the tile's mask and, in backward, the log-sum-exp with the sinks in it; and plain matrix products, for what that
kernel lacks: softcap, dropout, Dv ≠ D, the gradients of a mask and through the log-sum-exp; and for the gradients of
ALiBi, whose far weights are denormal numbers, which take that kernel four times as long. Backward computes the
probabilities again from the log-sum-exp. A query that sees nothing has a log-sum-exp of +∞ here: exp(s - lse) is 0.

Cores work side by side, each on a lane of its own (attention_lanes.py).
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.attention_common import Options, relative, seen_range, visible
from fastlm.ops.attention_lanes import LANES, lanes, side_by_side
from fastlm.ops.tensors import accumulator, adjacent

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

ROWS = 128  # queries in a tile
TILE_BYTES = 4 << 20  # of scores in a tile that is computed by matrix products
TINY = 2e-28  # weights up to this count as 0
ID_BLOCK = 64  # keys that are skipped together if their documents are none of the tile's


class Call(NamedTuple):
    """The tensors and options of one call of `attention`, as its reference takes them, and the seed of its dropout."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    slopes: Tensor | None
    key_lengths: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    seed: Tensor | None
    options: Options


class Tile(NamedTuple):
    """Queries `rows` of the batch's rows `batch`, and the ranges of keys that they may see."""

    batch: slice
    rows: slice
    runs: tuple[slice, ...]

    @property
    def keys(self) -> int:
        return sum(run.stop - run.start for run in self.runs)


def forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Write the output and the log-sum-exp of a call; they may be views."""
    if _skips(call) or not out.numel() or not call.key.size(2):
        out.zero_()
        lse.fill_(torch.inf) if call.sinks is None else lse.copy_(call.sinks[:, None])
    if not out.numel() or not call.key.size(2):
        return
    products = call.options.softcap or call.options.dropout_p or out.size(3) != call.query.size(3)
    engine = _forward_products if products else _forward_flash
    side_by_side([functools.partial(engine, lane.part(call), lane.of_queries(out), lane.of_queries(lse))
                   for lane in lanes(call)])


def backward(call: Call, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
             needs: list[bool]) -> list[Tensor | None]:
    """Return the gradients of query, key, value, mask and sinks, those that `needs` asks for."""
    tensors, options = call[:5], call.options
    found = [t.new_zeros(t.shape, dtype=accumulator(t.dtype)) if n and i != 3 else None
             for i, (t, n) in enumerate(zip(tensors, needs, strict=True))]
    if needs[3]:  # the largest by far, and rarely in need of zeros
        found[3] = call.mask.new_empty(call.mask.shape, dtype=accumulator(call.mask.dtype))
        if _skips(call) or call.mask.shape != (*call.query.shape[:3], call.key.size(2)):
            found[3].zero_()
    if not out.numel() or not call.key.size(2):
        found[3] = None if found[3] is None else found[3].zero_()
        delta = -dlse
    else:
        through_lse = bool(dlse.any())
        delta = (out.to(lse.dtype) * dout).sum(3) - dlse
        products = (options.softcap or options.dropout_p or needs[3] or through_lse or call.slopes is not None
                    or out.size(3) != call.query.size(3))
        if any(needs[:4]):
            _backward(_backward_products if products else _backward_flash, call, (out, lse, dout, delta), found)
    if needs[4]:
        found[4] = -((call.sinks[:, None] - lse).exp() * delta).sum((0, 2))
    return [None if g is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True)]


def _backward(engine, call, saved, found):
    """Let an engine write the gradients in `found` but for the sinks'; lanes that share a mask's take turns."""
    cut, (dq, dk, dv, dmask, _) = lanes(call), found
    shared = dmask is not None and len(cut) > 1 and cut[0].of_queries(dmask).shape == dmask.shape

    def run(lane):
        own = torch.zeros_like(dmask) if shared else lane.of_queries(dmask)
        engine(lane.part(call), *map(lane.of_queries, saved),
               [lane.of_queries(dq), lane.of_keys(dk), lane.of_keys(dv), own, None])
        if shared:
            dmask.add_(own)

    side_by_side([functools.partial(run, lane) for lane in cut], 1 if shared else LANES)


def _skips(call: Call) -> bool:
    """Tell whether some scores may belong to no tile."""
    options = call.options
    return (options.is_causal or options.left >= 0 or options.right >= 0 or call.key_lengths is not None
            or call.query_ids is not None)


# --- which keys a tile needs -----------------------------------------------------------------------------------


def tiles(call: Call, height: int, batch: int) -> list[Tile]:
    """Cut a call into tiles of `height` queries and `batch` rows of the batch."""
    query, keys, options = call.query, call.key.size(2), call.options
    if call.key_lengths is not None or call.query_ids is not None:
        batch = 1
    lengths = None if call.key_lengths is None else call.key_lengths.tolist()
    blocks = None if call.query_ids is None else _shared_documents(call, height)
    found = []
    for b in range(0, query.size(0), batch):
        length = keys if lengths is None else lengths[b]
        for i, first in enumerate(range(0, query.size(2), height)):
            last = min(first + height, query.size(2))
            start, end = seen_range(first, last, query.size(2), length, options)
            start, end = max(start, 0), min(end, length)
            runs = [slice(start, end)] if blocks is None else _runs(blocks[b][i], start, end)
            if start < end and runs:
                found.append(Tile(slice(b, b + batch), slice(first, last), tuple(runs)))
    return found


def _shared_documents(call, height):
    """Say of each tile of queries and each block of keys whether they may share a document, `[B][tiles][blocks]`."""
    low_q, high_q = _extremes(call.query_ids, height)
    low_k, high_k = _extremes(call.key_ids, ID_BLOCK)
    return ((low_q[:, :, None] <= high_k[:, None]) & (high_q[:, :, None] >= low_k[:, None])).tolist()


def _extremes(ids, size):
    padded = torch.nn.functional.pad(ids.double()[:, None], (0, -ids.size(1) % size), "replicate")
    parts = padded[:, 0].unflatten(1, (-1, size))
    return parts.amin(2), parts.amax(2)


def _runs(shared, start, end):
    """Return the ranges of keys within [start, end) whose blocks are `shared`, neighbours joined."""
    runs = []
    for block in range(start // ID_BLOCK, -(-end // ID_BLOCK)):
        if shared[block]:
            low, high = max(start, block * ID_BLOCK), min(end, (block + 1) * ID_BLOCK)
            if runs and runs[-1].stop == low:
                runs[-1] = slice(runs[-1].start, high)
            else:
                runs.append(slice(low, high))
    return runs


def _take(x: Tensor, dim: int, runs) -> Tensor:
    """Return the parts of `x` along `dim`: a view where there is one part, or where `x` is broadcast there."""
    if x.size(dim) == 1:
        return x
    parts = [x.narrow(dim, run.start, run.stop - run.start) for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _give(total: Tensor, dim: int, runs, part: Tensor) -> None:
    """Add `part` to the parts of `total` along `dim` that `_take` reads there."""
    start = 0
    for run in runs if total.size(dim) > 1 else (slice(0, 1),):
        length = run.stop - run.start
        total.narrow(dim, run.start, length).add_(part.narrow(dim, start, length))
        start += length


def _masks(call: Call, tile: Tile):
    """Return what changes the scores of a tile: a mask to be added, slopes and distances, who is visible; or None each.

    They broadcast to `[b, H, R, C]`.
    """
    rows = torch.arange(tile.rows.start, tile.rows.stop, dtype=torch.int32, device="cpu")
    cols = torch.cat([torch.arange(run.start, run.stop, dtype=torch.int32, device="cpu") for run in tile.runs])
    sizes = (call.query.size(2), call.key.size(2))
    lengths, query_ids, key_ids, slopes = (
        x if x is None or x.size(0) == 1 else x[tile.batch]
        for x in (call.key_lengths, call.query_ids, call.key_ids, call.slopes))
    seen = visible(rows, cols, *sizes, lengths, query_ids, key_ids, call.options)
    mask = call.mask
    if mask is not None:
        mask = mask if mask.size(0) == 1 else mask[tile.batch]
        mask = _take(_take(mask, 2, (tile.rows,)), 3, tile.runs)
        if mask.dtype is torch.bool:
            seen = mask if seen is None else seen & mask
            mask = None
    distances = None
    if slopes is not None:
        # Exact: positions are below 2^24.
        dtype = accumulator(call.query.dtype)
        distances = relative(rows.to(dtype), cols.to(dtype), *sizes, lengths).abs_()
        slopes = slopes[:, :, None, None].to(dtype)
    return mask, slopes, distances, seen


def _barred(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores: 0 where `seen`, else -∞."""
    return seen.new_zeros((), dtype=dtype).where(seen, -torch.inf)


# --- SDPA's kernel, tile by tile ---------------------------------------------------------------------------------


def _flash_tiles(call):
    """Return tiles, and whether the kernel itself masks the future: one tile is best where no mask must be built."""
    options = call.options
    masked = (call.slopes is not None or call.key_lengths is not None or call.query_ids is not None
              or options.left >= 0 or options.right >= 0)
    masked |= options.is_causal and options.scale <= 0  # the kernel gives NaN
    if not masked and (call.mask is None or not (options.is_causal or call.mask.dtype is torch.bool)):
        everything = Tile(slice(0, call.query.size(0)), slice(0, call.query.size(2)), (slice(0, call.key.size(2)),))
        return [everything], options.is_causal
    return tiles(call, ROWS, max(1, call.query.size(0))), False


def _flash_mask(call, tile, known):
    """Return the tile's mask as the kernel takes it: added to the scores; None where there is none.

    `known` keeps masks of a window, which are alike from tile to tile.
    """
    first = tile.runs[0]
    place = (tile.batch.start, tile.rows.start - first.start, tile.rows.stop - first.start, first.stop - first.start)
    alike = call.options.left >= 0 and call.mask is None and call.query_ids is None
    if alike and place in known:
        return known[place]
    mask = _added(call, tile)
    if alike:
        known[place] = mask
    return mask


def _added(call, tile):
    """Return the sum of all that is added to a tile's scores, -∞ for what is barred, or None."""
    mask, slopes, distances, seen = _masks(call, tile)
    if slopes is not None:
        bias = slopes.neg() * distances
        mask = bias if mask is None else bias + mask
    if seen is not None and not seen.all():
        barred = _barred(seen, accumulator(call.query.dtype))
        mask = barred if mask is None else mask + barred
    # Beside halves the kernel reads float32 too, beside float64 it does not.
    return mask if mask is None or mask.dtype == call.query.dtype else mask.to(accumulator(call.query.dtype))


def _forward_flash(call, out, lse):
    query, key, value = (adjacent(t) for t in call[:3])
    (parts, causal), masks = _flash_tiles(call), {}
    for tile in parts:
        at = (tile.batch, slice(None), tile.rows)
        mask = None if causal else _flash_mask(call, tile, masks)
        k, v = (_take(t[tile.batch], 2, tile.runs) for t in (key, value))
        part, part_lse = _flash(query[at], k, v, 0.0, causal, attn_mask=mask, scale=call.options.scale)
        empty = None
        if call.options.return_lse and mask is not None:
            empty = mask.amax(3) == -torch.inf
        if call.sinks is None:
            lse[at] = part_lse if empty is None else part_lse.masked_fill(empty, torch.inf)
            out[at] = part
            continue
        if empty is not None:
            part_lse = part_lse.masked_fill(empty, -torch.inf)
        whole = torch.logaddexp(part_lse, call.sinks[:, None])
        out[at] = part * (part_lse - whole).exp()[..., None]
        lse[at] = whole


def _backward_flash(call, out, lse, dout, delta, found):
    query, key, value, dout = (adjacent(t) for t in (*call[:3], dout))
    dq, dk, dv = found[:3]
    (parts, causal), masks = _flash_tiles(call), {}
    for tile in parts:
        at = (tile.batch, slice(None), tile.rows)
        mask = None if causal else _flash_mask(call, tile, masks)
        k, v = (_take(t[tile.batch], 2, tile.runs) for t in (key, value))
        grads = _flash_backward(dout[at], query[at], k, v, out[at], lse[at], 0.0, causal,
                                attn_mask=mask, scale=call.options.scale)
        if dq is not None:
            dq[at] = grads[0]
        for total, part in ((dk, grads[1]), (dv, grads[2])):
            if total is not None:
                _give(total[tile.batch], 2, tile.runs, part)


# --- matrix products, tile by tile -------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Some heads of keys of a tile; its scores have the shape (b, h, G, R, C), as G heads of queries share one."""

    tile: Tile
    heads: slice
    shape: torch.Size


class _Products:
    """A call in float32 or float64, cut into pieces whose scores fit into `TILE_BYTES`, and buffers for them."""

    def __init__(self, call: Call, buffers: int):
        batch, heads, queries, _ = call.query.shape
        _, kv_heads, keys, _ = call.key.shape
        dtype = accumulator(call.query.dtype)
        room = TILE_BYTES // dtype.itemsize
        self.call, self.group = call, heads // kv_heads
        self.far = call.slopes is not None or _skips(call) or (call.mask is not None and call.mask.dtype is torch.bool)
        self.query, self.key, self.value = (t.to(dtype).contiguous() for t in call[:3])
        self.pieces = []
        height = min(queries, ROWS if _skips(call) else queries, max(16, room // (self.group * keys)))
        for tile in tiles(call, height, max(1, room // (heads * height * keys))):
            rows, height = min(tile.batch.stop, batch) - tile.batch.start, tile.rows.stop - tile.rows.start
            step = kv_heads if rows > 1 else max(1, min(kv_heads, room // (self.group * height * tile.keys)))
            for first in range(0, kv_heads, step):
                last = min(first + step, kv_heads)
                shape = torch.Size((rows, last - first, self.group, height, tile.keys))
                self.pieces.append(Piece(tile, slice(first, last), shape))
        size = max((piece.shape.numel() for piece in self.pieces), default=0)
        self.buffers = self.key.new_empty(buffers, size)
        self.random = None if call.seed is None else torch.Generator().manual_seed(call.seed.item())

    def queries(self, x: Tensor, piece: Piece) -> Tensor:
        """Return the piece's part of `x` `[B, H, Sq, …]` as `[b, h, G, R, …]`, a view."""
        return x.unflatten(1, (-1, self.group))[piece.tile.batch, piece.heads, :, piece.tile.rows]

    def operands(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        """Return the piece's queries `[b·h, G·R, D]`, scaled, keys `[b·h, C, D]` and values."""
        keys = (x[piece.tile.batch, piece.heads] for x in (self.key, self.value))
        keys = (_take(x, 2, piece.tile.runs).flatten(0, 1) for x in keys)
        return _flat(self.queries(self.query, piece)) * self.call.options.scale, *keys

    def buffer(self, i: int, piece: Piece) -> Tensor:
        """Return buffer i in the shape of the piece's scores."""
        return self.buffers[i, : piece.shape.numel()].view(piece.shape)

    def scores(self, q: Tensor, k: Tensor, piece: Piece, tanh: Tensor | None = None) -> Tensor:
        """Return the piece's scores, capped, biased and masked, in buffer 0; tanh(s / c) is left in `tanh`."""
        scores, cap = self.buffer(0, piece), self.call.options.softcap
        torch.bmm(q / cap if cap else q, k.mT, out=_flat(scores))
        if cap:
            scores.tanh_()
            if tanh is not None:
                tanh.copy_(scores)
            scores.mul_(cap)
        mask, slopes, distances, seen = _masks(self.call, piece.tile)
        if mask is not None:
            scores.add_(self._of_heads(mask, piece))
        if slopes is not None:
            slopes, distances = (self._of_heads(x, piece) for x in (slopes, distances))
            scores.addcmul_(slopes, distances, value=-1)
        if seen is not None and not seen.all():
            scores.add_(self._of_heads(_barred(seen, scores.dtype), piece))  # masked_fill_ takes ten times as long
        return scores

    def _of_heads(self, x, piece):
        """Return the part of `x` `[b or 1, H or 1, …]` of the piece's heads, `[b or 1, h or 1, G or 1, …]`."""
        return x[:, :, None] if x.size(1) == 1 else x.unflatten(1, (-1, self.group))[:, piece.heads]

    def exp(self, x: Tensor) -> Tensor:
        """Replace x by exp(x); where x may be far below 0, by 0 up to `TINY`: denormal numbers and -∞ are slow."""
        return torch.threshold_(x.clamp_min_(-64).exp_(), TINY, 0) if self.far else x.exp_()

    def place(self, total: Tensor, piece: Piece) -> Tensor | None:
        """Return the part of the mask's gradient that the piece's scores have to themselves, or None."""
        alone = total.shape == (*self.call.query.shape[:3], self.call.key.size(2))
        if not alone or self.group > 1 or len(piece.tile.runs) > 1:
            return None
        found = self.queries(total, piece)[..., piece.tile.runs[0]]
        return found if _flattens(found) else None

    def give_mask(self, total: Tensor, piece: Piece, slope: Tensor) -> None:
        """Add the gradient of the piece's scores to that of the mask, summed where the mask is broadcast."""
        tile, part = piece.tile, slope.flatten(1, 2)
        whole = (*self.call.query.shape[:3], self.call.key.size(2))
        shared = [d for d in range(4) if total.size(d) < whole[d]]
        places = (tile.batch, slice(piece.heads.start * self.group, piece.heads.stop * self.group), tile.rows)
        total = total[tuple(slice(None) if d in shared else places[d] for d in range(3))]
        if shared:
            part = part.sum(shared, keepdim=True)
        if shared or len(tile.runs) > 1:
            _give(total, 3, tile.runs, part)
        else:
            total[..., tile.runs[0]] = part  # written once, so it need not be read

    def kept(self, piece: Piece) -> Tensor:
        """Draw which weights of the next piece stay: 1, or 0, in the last buffer, which multiply fast.

        Forward and backward ask for pieces in the same order.
        """
        words = torch.empty(-(-piece.shape.numel() // 4), dtype=torch.int64, device="cpu")
        words.random_(-(2**63), None, generator=self.random)
        # 16 random bits for each weight
        draws = words.view(torch.int16)[: piece.shape.numel()].view(piece.shape)
        highest = max(round(self.call.options.dropout_p * 2**16) - 2**15 - 1, -2**15)  # that is dropped: all, at p = 1
        return torch.gt(draws, highest, out=self.buffer(-1, piece))


def _give_product(total: Tensor, piece: Piece, a: Tensor, b: Tensor) -> None:
    """Add a·b `[b·h, C, …]` to the rows of the piece's keys in `total` `[B, H_kv, Sk, …]`."""
    total, runs = total[piece.tile.batch, piece.heads], piece.tile.runs
    if len(runs) == 1 and _flattens(total):
        total[:, :, runs[0]].view(a.size(0), a.size(1), b.size(2)).baddbmm_(a, b)
    else:
        _give(total, 2, runs, torch.bmm(a, b).unflatten(0, piece.shape[:2]))


def _flattens(x: Tensor) -> bool:
    """Tell whether the first two dimensions can be viewed as one."""
    return x.size(0) == 1 or x.stride(0) == x.size(1) * x.stride(1)


def _flat(x: Tensor) -> Tensor:
    """Return `[b, h, G, R, …]` as `[b·h, G·R, …]`, a view of what is contiguous."""
    return x.flatten(2, 3).flatten(0, 1)


def _forward_products(call, out, lse):
    work = _Products(call, 1 + bool(call.options.dropout_p))
    keep = 1 - call.options.dropout_p or 1.0
    for piece in work.pieces:
        q, k, v = work.operands(piece)
        weights = work.scores(q, k, piece)
        highest = weights.amax(4, keepdim=True)
        sinks = None if call.sinks is None else call.sinks.to(highest.dtype).view(-1, work.group, 1, 1)[piece.heads]
        if sinks is not None:
            highest = torch.maximum(highest, sinks)
        highest.masked_fill_(highest == -torch.inf, 0)
        work.exp(weights.sub_(highest))
        total = weights.sum(4, keepdim=True)
        if sinks is not None:
            total += (sinks - highest).exp()
        if work.random is not None:
            weights.mul_(work.kept(piece))
        empty = total == 0
        total.masked_fill_(empty, 1)
        part = torch.bmm(_flat(weights), v).view(*piece.shape[:4], -1)
        work.queries(out, piece).copy_(part / (total * keep))
        work.queries(lse, piece).copy_((highest + total.log()).masked_fill_(empty, torch.inf).squeeze(4))


def _backward_products(call, out, lse, dout, delta, found):
    dq, dk, dv, dmask, _ = found
    keep, capped = 1 - call.options.dropout_p or 1.0, bool(call.options.softcap)
    work = _Products(call, 2 + capped + bool(call.options.dropout_p))
    dout = dout.to(lse.dtype) / keep
    for piece in work.pieces:
        q, k, v = work.operands(piece)
        g = _flat(work.queries(dout, piece))
        tanh = work.buffer(2, piece) if capped else None
        weights = work.scores(q, k, piece, tanh)
        work.exp(weights.sub_(work.queries(lse, piece)[..., None]))
        # The gradient of the weights, then of the scores, where the mask's own is made if that is the same.
        direct = None if dmask is None or capped else work.place(dmask, piece)
        slope = work.buffer(1, piece) if direct is None else direct
        torch.bmm(g, v.mT, out=_flat(slope))
        kept = None if work.random is None else work.kept(piece)
        if kept is not None:
            slope.mul_(kept)
        slope.sub_(work.queries(delta, piece)[..., None]).mul_(weights)
        if dv is not None:
            if kept is not None:
                weights.mul_(kept)
            _give_product(dv, piece, _flat(weights).mT, g)
        if dmask is not None and direct is None:
            work.give_mask(dmask, piece, slope)
        if capped:
            slope.addcmul_(tanh.square_(), slope, value=-1)
        if dq is not None:
            part = torch.bmm(_flat(slope), k).view(*piece.shape[:4], -1)
            work.queries(dq, piece).copy_(part.mul_(call.options.scale))
        if dk is not None:
            _give_product(dk, piece, _flat(slope).mT, q)


def dropped(call: Call) -> Tensor:
    """Return which weights the call drops, `[B, H, Sq, Sk]`."""
    found = call.query.new_zeros(*call.query.shape[:3], call.key.size(2), dtype=torch.bool)
    for lane in lanes(call):
        work = _Products(lane.part(call), 1)
        for piece in work.pieces:
            drawn, start = work.kept(piece) == 0, 0
            for run in piece.tile.runs:
                end = start + run.stop - run.start
                work.queries(lane.of_queries(found), piece)[..., run] = drawn[..., start:end]
                start = end
    return found
