"""varlen_attn: attention over sequences of different lengths, packed one after the other without padding.

Sequence n of N has the queries cu_seq_q[n] to cu_seq_q[n + 1] and the keys cu_seq_k[n] to cu_seq_k[n + 1], of which
only the first seqused_k[n] count where that is given; it is `attention` (see there) of those. With pages, its keys
are instead the first seqused_k[n] tokens of the pages block_table[n, 0], block_table[n, 1], … of a pool.
"""

import inspect
import itertools

import torch
from torch import Tensor

from fastlm.autograd import autocast, autocasts
from fastlm.dispatch import Op, Sample, assume_constant, at_once
from fastlm.ops.attention import reference as attention_reference
from fastlm.ops.attention import scaled_dot_product_attention
from fastlm.ops.attention import stock as attention_stock
from fastlm.ops.attention_common import (
    Options,
    check_floats,
    check_integers,
    check_number,
    check_scale,
    check_softcap,
    check_window,
    seen_range,
    simplest,
)
from fastlm.ops.tensors import accumulator, check_tensors, needs_gradient, readable

FEW, FEW_TRAINED = 6, 4  # sequences, below which SDPA for each is the faster one below LEAST multiplications
LEAST = 1 << 22
INTEGERS = (torch.int32, torch.int64)


def few(multiplications, sequences, *tensors) -> bool:
    """Tell whether there is so little to do that SDPA for each sequence is the faster one on every CPU."""
    return multiplications < LEAST and (sequences < FEW_TRAINED or (sequences < FEW and not needs_gradient(*tensors)))


def _shortcut(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
              enable_gqa=False, seqused_k=None, block_table=None, num_splits=None, softcap=None, alibi_slopes=None,
              sinks=None):
    lacking = return_aux, seqused_k, block_table, num_splits, softcap, alibi_slopes, sinks
    if window_size != (-1, -1) or any(x is not None for x in lacking) or autocasts("cpu"):
        return None
    (tokens, heads, width), count = query.shape, cu_seq_q.shape[0] - 1
    if not few(count * max_q * max_k * heads * 2 * width, count, query, key, value) or (
            query.shape[1:] != key.shape[1:] or key.shape != value.shape or not query.is_floating_point()
            or not (query.is_cpu and cu_seq_q.is_cpu and cu_seq_k.is_cpu)
            or cu_seq_q.dtype not in INTEGERS or cu_seq_k.dtype not in INTEGERS):
        return None
    lengths = []
    for offsets, all_tokens, longest in ((cu_seq_q, tokens, max_q), (cu_seq_k, key.shape[0], max_k)):
        places = offsets.tolist()
        found = [end - start for start, end in itertools.pairwise(places)]
        if len(found) != count or places[0] != 0 or places[-1] != all_tokens or not (
                0 < min(found) <= max(found) <= longest):
            return None
        lengths.append(found)
    parts = (x.unsqueeze(0).transpose(1, 2).split(n, 2) for x, n in zip((query, key, value), (*lengths, lengths[1]),
                                                                        strict=True))
    return torch.cat([scaled_dot_product_attention(*part, scale=scale).transpose(1, 2)
                      for part in zip(*parts, strict=True)], 1).squeeze(0)


@at_once(_shortcut)
def varlen_attn(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int,
                max_k: int, *, return_aux=None, scale: float | None = None,
                window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: Tensor | None = None,
                block_table: Tensor | None = None, num_splits: int | None = None, softcap: float | None = None,
                alibi_slopes: Tensor | None = None, sinks: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Attend within each of N packed sequences and return `[T_q, H, D_v]`; as `torch.nn.attention.varlen.varlen_attn`.

    Args:
        query: `[T_q, H, D]`.
        key, value: `[T_k, H_kv, D]` and `[T_k, H_kv, D_v]`; with `block_table` pools of pages
            `[pages, page_size, H_kv, D]`.
        cu_seq_q, cu_seq_k: `[N + 1]` integers that rise from 0 to at most T_q and T_k: where sequences begin and
            end. Queries behind the last one attend to nothing. `cu_seq_k` may be None with `block_table`.
        max_q, max_k: the longest sequence of queries and of keys.
        return_aux: `torch.nn.attention.varlen.AuxRequest(lse=True)` also asks for the log-sum-exp `[T_q, H]`, float32
            (float64 for float64).
        scale: factor of the scores, D^-0.5 by default.
        window_size: (left, right), aligned at each sequence's last query and key; (-1, 0) is causal.
        enable_gqa: H_kv may divide H.
        seqused_k: `[N]` integers: how many keys of a sequence count.
        block_table: `[N, max_pages]` integers: the pages of each sequence. Needs `seqused_k`.
        num_splits: on a GPU, how many parts the keys are split into; 1 makes results independent of the rest of the
            batch. On the CPU each implementation's are, but which one runs depends on how much there is to compute.
        softcap, alibi_slopes, sinks: as in `scaled_dot_product_attention`; slopes are `[H]` or `[N, H]`.

    Raises:
        TypeError: an argument is no tensor, no number, or `return_aux` no AuxRequest.
        ValueError: numbers of heads do not fit, or (on the CPU) `cu_seq_q` or `cu_seq_k` do not rise or do not end at
            the number of tokens, a sequence is longer than `max_q` or `max_k`, `seqused_k` exceeds a sequence, or
            `block_table` names no page.
        RuntimeError: dtypes, devices or shapes do not fit.
    """
    query, key, value = _checked(query, key, value, enable_gqa, block_table is not None)
    window = check_window(window_size, "varlen_attn")
    cap = check_softcap(softcap, "varlen_attn")
    max_q, max_k = check_number("max_q", max_q, "varlen_attn", int), check_number("max_k", max_k, "varlen_attn", int)
    if return_aux is not None and not hasattr(return_aux, "lse"):
        raise TypeError(f"varlen_attn: return_aux must be an AuxRequest, got {type(return_aux).__name__}")
    cu_seq_q, cu_seq_k, seqused_k, block_table = _checked_sequences(
        query, key, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, block_table)
    if num_splits is not None and (not isinstance(num_splits, int) or num_splits < 0):
        raise ValueError(f"varlen_attn: num_splits is {num_splits}, expected a number of splits, or None")
    heads, sequences = query.size(1), cu_seq_q.size(0) - 1
    slopes = check_floats("alibi_slopes", alibi_slopes, query, ((heads,), (sequences, heads)), "varlen_attn")
    slopes = None if slopes is None else slopes.detach().reshape(-1, heads)
    sinks = check_floats("sinks", sinks, query, ((heads,),), "varlen_attn")
    scale = check_scale(scale, query.size(-1), "varlen_attn")
    lse = return_aux is not None and return_aux.lse
    options = Options(0.0, False, scale, *window, cap, lse)
    return op(query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k,
              num_splits, options)


def _checked(query, key, value, enable_gqa, paged):
    check_tensors("varlen_attn", dict(query=query, key=key, value=value))
    query, key, value = autocast(query.device.type, query, key, value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        expected = "[pages, page_size, H_kv, D]" if paged and name != "query" else "[T, H, D]"
        if x.dim() != (4 if paged and name != "query" else 3):
            raise RuntimeError(f"varlen_attn: {name} has shape {list(x.shape)}, expected {expected}")
        if x.dtype != query.dtype or not x.is_floating_point():
            raise RuntimeError(f"varlen_attn: {name} is {x.dtype}, expected one floating dtype for query "
                               f"({query.dtype}), key and value")
    if key.size(-1) != query.size(-1):
        raise RuntimeError(f"varlen_attn: key has head_dim {key.size(-1)}, query has {query.size(-1)}")
    if value.shape[:-1] != key.shape[:-1]:
        raise RuntimeError(f"varlen_attn: value has shape {list(value.shape)}, key has {list(key.shape)}")
    heads, kv_heads = query.size(1), key.size(-2)
    if heads != kv_heads and not enable_gqa:
        raise ValueError(f"varlen_attn: key has {kv_heads} heads, query has {heads} (enable_gqa=True lets them share)")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"varlen_attn: query has {heads} heads, expected a multiple of key's {kv_heads}")
    return query, key, value


def _checked_sequences(query, key, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, block_table):
    """Check what says where sequences are; values only where they are on the CPU."""
    name = "varlen_attn"
    if not isinstance(cu_seq_q, Tensor) or cu_seq_q.dim() != 1 or cu_seq_q.size(0) < 1:
        raise RuntimeError(f"{name}: cu_seq_q must be a tensor [N + 1], got "
                           f"{list(cu_seq_q.shape) if isinstance(cu_seq_q, Tensor) else type(cu_seq_q).__name__}")
    sequences = cu_seq_q.size(0) - 1
    cu_seq_q = check_integers("cu_seq_q", cu_seq_q, query, ((sequences + 1,),), name)
    cu_seq_k = check_integers("cu_seq_k", cu_seq_k, query, ((sequences + 1,),), name)
    seqused_k = check_integers("seqused_k", seqused_k, query, ((sequences,),), name)
    if block_table is None:
        if cu_seq_k is None:
            raise RuntimeError(f"{name}: cu_seq_k is None, which needs a block_table")
    else:
        if seqused_k is None:
            raise RuntimeError(f"{name}: block_table needs seqused_k")
        pages = block_table.size(1) if isinstance(block_table, Tensor) and block_table.dim() == 2 else "max_pages"
        block_table = check_integers("block_table", block_table, query, ((sequences, pages),), name)
        cu_seq_k = None  # pages say where keys are
    if readable(cu_seq_q):
        _check_values(query, key, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, block_table)
    return cu_seq_q, cu_seq_k, seqused_k, block_table


def _check_values(query, key, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, block_table):
    for name, offsets, tokens, longest in (("q", cu_seq_q, query.size(0), max_q), ("k", cu_seq_k, key.size(0), max_k)):
        if offsets is None:
            continue
        places = offsets.tolist()
        lengths = [end - start for start, end in itertools.pairwise(places)]
        if places[0] != 0 or places[-1] > tokens or min(lengths, default=0) < 0:
            raise ValueError(f"varlen_attn: cu_seq_{name} is {_short(offsets)}, expected to rise from 0 to at most "
                             f"{tokens}, the number of tokens")
        if max(lengths, default=0) > longest:
            raise ValueError(f"varlen_attn: max_{name} is {longest}, but a sequence of cu_seq_{name} has "
                             f"{max(lengths)} tokens")
    if seqused_k is not None and seqused_k.numel():
        room = cu_seq_k.diff() if block_table is None else torch.full_like(seqused_k, block_table.size(1) * key.size(1))
        if (seqused_k < 0).any() or (seqused_k > room).any():
            raise ValueError(f"varlen_attn: seqused_k is {_short(seqused_k)}, expected 0 to {_short(room)}")
    if block_table is not None:
        pages = -(-seqused_k // max(key.size(1), 1))
        used = torch.arange(block_table.size(1), device=block_table.device) < pages[:, None]
        found = block_table[used]
        if found.numel() and not 0 <= found.min() <= found.max() < key.size(0):
            raise ValueError(f"varlen_attn: block_table has pages {found.min()} to {found.max()}, expected 0 to "
                             f"{key.size(0) - 1}")


def _short(x):
    return str(x.tolist() if x.numel() <= 8 else [*x[:4].tolist(), "…", *x[-3:].tolist()])


def sequences(key, cu_seq_q, cu_seq_k, seqused_k, block_table):
    """Yield (n, queries, keys) of each sequence n that has queries: slices of tokens, or of a pool their places."""
    starts = cu_seq_q.tolist()
    first = None if cu_seq_k is None else cu_seq_k.tolist()
    used = None if seqused_k is None else seqused_k.tolist()
    for n, queries in enumerate(map(slice, starts, starts[1:])):
        if queries.start == queries.stop:
            continue
        if block_table is None:
            keys = slice(first[n], first[n + 1] if used is None else first[n] + used[n])
        else:
            page_size = key.size(1)
            pages = block_table[n, : -(-used[n] // max(page_size, 1))].long()
            keys = (pages[:, None] * page_size + torch.arange(page_size, device=key.device)).flatten()[: used[n]]
        yield n, queries, keys


def unpaged(x: Tensor) -> Tensor:
    """Return keys or values, or a pool of pages of them, as `[T, H_kv, D]`."""
    return x if x.dim() == 3 else x.flatten(0, 1)


def rows(x: Tensor, tokens) -> Tensor:
    """Return some tokens of `x` `[T, H, D]` as a batch of one row, `[1, H, S, D]`."""
    return x[tokens].transpose(0, 1)[None]


def reference(query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, num_splits,
              options):
    """Attend within each sequence by the formula of attention.

    Args:
        query, key, value: `[T_q, H, D]`, `[T_k, H_kv, D]`, `[T_k, H_kv, Dv]`, or keys and values in pages.
        sinks, slopes: `[H]` and `[N or 1, H]`, float32 or float64.
        cu_seq_q, cu_seq_k, seqused_k, block_table: as in `varlen_attn`, int32 or int64; with pages `cu_seq_k` is None.
        max_q, max_k, num_splits: integers (`num_splits` may be None).
        options: of `attention_common`, without dropout and `is_causal`.

    Returns:
        The output `[T_q, H, Dv]`, or with `options.return_lse` the output and the log-sum-exp `[T_q, H]`.
    """
    return _each(attention_reference, query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table,
                 options)


def stock(query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, num_splits,
          options):
    """Call torch's varlen_attn where it can, which is on a GPU; else SDPA for each sequence."""
    grouped = query.size(1) != key.size(-2)
    lacking = sinks is not None or slopes is not None or options.softcap or value.size(-1) != query.size(-1)
    newer = grouped or seqused_k is not None or block_table is not None
    if lacking or not query.is_cuda or query.element_size() != 2 or (newer and not _is_newer()):
        return _each(attention_stock, query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table,
                     options)
    from torch.nn.attention import varlen  # imports the compiler

    used, table = (None if x is None else x.int() for x in (seqused_k, block_table))
    options_of_newer = dict(enable_gqa=grouped, seqused_k=used, block_table=table, num_splits=num_splits)
    found = varlen.varlen_attn(
        query, key, value, cu_seq_q.int(), None if cu_seq_k is None else cu_seq_k.int(), max_q, max_k,
        return_aux=varlen.AuxRequest(lse=options.return_lse), scale=options.scale,
        window_size=(options.left, options.right), **(options_of_newer if _is_newer() else {}))
    return (found[0], found[1].mT) if options.return_lse else found


@assume_constant
def _is_newer() -> bool:
    """Tell whether torch's varlen_attn knows grouped heads, lengths and pages: it came with less in torch 2.11."""
    from torch.nn.attention import varlen

    return "num_splits" in inspect.signature(varlen.varlen_attn).parameters


def _each(attend, query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table, options):
    """Call an implementation of attention for each sequence and pack the results."""
    outs, lses, end = [], [], 0
    flat = unpaged(key), unpaged(value)
    for n, queries, keys in sequences(key, cu_seq_q, cu_seq_k, seqused_k, block_table):
        slope = None if slopes is None else slopes[n % slopes.size(0), None]
        q, k, v = rows(query, queries), *(rows(x, keys) for x in flat)
        found = attend(q, k, v, None, sinks, slope, None, None, None, simplest(options, q.size(2), k.size(2)))
        out, lse = found if options.return_lse else (found, None)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1) if options.return_lse else None)
        end = queries.stop
    rest = (query.size(0) - end, query.size(1))
    out = torch.cat([*outs, query.new_zeros(*rest, value.size(-1))])
    if not outs:  # gradients may be asked for all the same
        out = out + sum(x[:0].sum() for x in (query, key, value))
    if not options.return_lse:
        return out
    return out, torch.cat([*lses, query.new_full(rest, -torch.inf, dtype=accumulator(query.dtype))])


def samples(scale: str, dtype: torch.dtype, device: str):
    def call(name, queries, keys, heads=2, kv_heads=2, dim=16, value_dim=None, *, sinks=None, slopes=None, used=None,
             lse=False, window=(-1, -1), softcap=0.0):
        offsets = [torch.tensor([0, *n], device=device).cumsum(0).int() for n in (queries, keys)]
        shapes = ((sum(queries), heads, dim), (sum(keys), kv_heads, dim), (sum(keys), kv_heads, value_dim or dim))
        tensors = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
        used = None if used is None else torch.tensor(used, device=device)
        return Sample(name, (*tensors, sinks, slopes, *offsets, used, None, max(queries), max(keys), None,
                             Options(0.0, False, dim**-0.5, *window, softcap, lse)))

    if scale == "bench":
        long = torch.device(device).type == "cuda"
        lengths = (4096, 1024, 2048, 512, 512) if long else (512, 128, 256, 64, 64)
        yield call(f"{sum(lengths)} tokens in {len(lengths)}", lengths, lengths, 8, 8, 64, window=(-1, 0))
        yield call(f"{sum(lengths)} tokens in {len(lengths)} grouped", lengths, lengths, 8, 2, 64, window=(-1, 0))
        return
    few, many = (5, 40, 1, 20), (129, 40, 70, 1)
    yield call("sequences", many, many)
    yield call("one sequence", (70,), (70,))
    yield call("causal", many, many, window=(-1, 0))
    yield call("causal, more keys", few, many, window=(-1, 0))
    yield call("causal, more queries", many, few, window=(-1, 0))
    yield call("window", many, many, window=(15, 7))
    yield call("grouped", few, many, 6, 2, window=(-1, 0))
    yield call("wide values", few, many, 2, 1, 16, 48)
    yield call("empty sequences", (0, 5, 0, 7), (3, 0, 0, 20))
    yield call("no sequences with queries", (0, 0), (3, 4))
    yield call("softcap", many, many, softcap=2.0)
    yield call("alibi", many, many, slopes=torch.rand(1, 2, device=device))
    yield call("alibi for each sequence", few, many, slopes=torch.rand(4, 2, device=device), window=(-1, 0))
    yield call("sinks", few, many, sinks=torch.randn(2, device=device))
    yield call("used keys", few, many, used=(100, 0, 70, 1), window=(20, 0))
    yield call("log-sum-exp", few, many, lse=True, window=(-1, 0))
    yield call("everything", few, many, 4, 2, 16, 8, sinks=torch.randn(4, device=device), softcap=2.0, lse=True,
               slopes=torch.rand(1, 4, device=device), used=(100, 0, 70, 1), window=(70, 9))
    yield _paged_sample(dtype, device)


def _paged_sample(dtype, device):
    pool = (torch.randn(9, 16, 2, 16, device=device).to(dtype) for _ in range(2))
    table = torch.randperm(9, device=device)[:8].view(2, 4)
    offsets, used = (torch.tensor(x, device=device, dtype=torch.int32) for x in ((0, 3, 4), (50, 17)))
    return Sample("pages", (torch.randn(4, 4, 16, device=device).to(dtype), *pool, None, None, offsets, None, used,
                            table, 3, 64, None, Options(0.0, False, 0.25, -1, 0)))


def cost(query, key, value, sinks, slopes, cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, num_splits,
         options) -> tuple[int, int]:
    pairs, read = 0, 0
    for _, queries, keys in sequences(key, cu_seq_q, cu_seq_k, seqused_k, block_table):
        count = queries.stop - queries.start
        length = keys.stop - keys.start if isinstance(keys, slice) else keys.numel()
        ranges = (seen_range(i, i + 1, count, length, options) for i in range(count))
        pairs += sum(max(0, min(end, length) - max(start, 0)) for start, end in ranges)
        read += length
    heads, widths = query.size(1), query.size(-1) + value.size(-1)
    moved = (query.size(0) * heads + read * key.size(-2)) * widths * query.element_size()
    return 2 * heads * pairs * widths, moved


op = Op("varlen_attn", reference=reference, torch=stock, fast=("triton", "native", "blocked"), exports=False,
        samples=samples, cost=cost, constants=(4,))
