"""What `attention` and `varlen_attn` share: options, checks of arguments, who sees whom, and kernels as functions."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.autograd import Differentiable
from fastlm.ops.tensors import accumulator

# Samples of `attention` and of `varlen_attn` that no implementation for the CPU may refuse.
ACCEPTS = {
    "length 1", "length 127", "length 128", "length 129", "causal", "causal, more keys", "causal, more queries",
    "cross", "grouped", "one key head", "head size 1", "head size 3", "head size 80", "head size 128", "head size 256",
    "wide values", "scale", "negative scale", "outliers", "boolean mask", "shared mask", "key padding", "additive mask",
    "learned bias", "float32 bias", "minus infinity", "causal and mask", "causal and bias", "window",
    "window, more keys", "window, more queries", "causal at the last key", "softcap", "alibi", "alibi for each row",
    "sinks", "key lengths", "documents", "unordered documents", "log-sum-exp", "log-sum-exp of nothing",
    "everything dropped", "everything", "no rows", "no queries", "no keys", "lengths before heads", "transposed",
    "expanded keys"}
PACKED_ACCEPTS = {
    "sequences", "one sequence", "causal", "causal, more keys", "causal, more queries", "window", "grouped",
    "wide values", "empty sequences", "no sequences with queries", "softcap", "alibi", "alibi for each sequence",
    "sinks", "used keys", "log-sum-exp", "everything", "pages"}


class Options(NamedTuple):
    """What is no tensor in a call of attention."""

    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float = 1.0
    left: int = -1
    right: int = -1
    softcap: float = 0.0  # 0: none
    return_lse: bool = False


# --- who sees whom ---------------------------------------------------------------------------------------------


def relative(rows: Tensor, cols: Tensor, queries: int, keys: int, key_lengths: Tensor | None) -> Tensor:
    """Return i + Sk - Sq - j of the queries i in `rows` `[M]` and the keys j in `cols` `[N]`: `[B or 1, 1, M, N]`.

    Sk is `keys`, or each row's own length where `key_lengths` `[B]` are given.
    """
    if key_lengths is None:
        return (rows[:, None] + (keys - queries) - cols)[None, None]
    return rows[:, None] + (key_lengths[:, None, None, None] - queries) - cols


def visible(rows: Tensor, cols: Tensor, queries: int, keys: int, key_lengths: Tensor | None, query_ids: Tensor | None,
            key_ids: Tensor | None, options: Options) -> Tensor | None:
    """Return which keys of `cols` `[N]` each query of `rows` `[M]` may see, `[B or 1, 1, M, N]`; None means all.

    Causality, window, lengths `[B]` and ids `[B, Sq]` and `[B, Sk]` count; the mask that the caller gave does not.
    """
    masks = []
    if options.is_causal:
        masks.append((cols <= rows[:, None])[None, None])
    if options.left >= 0 or options.right >= 0:
        ahead = relative(rows, cols, queries, keys, key_lengths)
        if options.left >= 0:
            masks.append(ahead <= options.left)
        if options.right >= 0:
            masks.append(ahead >= -options.right)
    if key_lengths is not None:
        masks.append(cols < key_lengths[:, None, None, None])
    if query_ids is not None:
        masks.append(query_ids[:, None, rows, None] == key_ids[:, None, None, cols])
    return functools.reduce(torch.logical_and, masks) if masks else None


def simplest(options: Options, queries: int, keys: int, key_lengths: Tensor | None = None) -> Options:
    """Return the options with a causality and a window that bar the same keys, with as little as does it."""
    is_causal, left, right = options.is_causal, options.left, options.right
    if left >= keys - 1:
        left = -1
    if right >= queries - 1:
        right = -1  # so of one query, which sees all
    if right == 0 and queries == keys and key_lengths is None:
        is_causal, right = True, -1
    return options._replace(is_causal=is_causal, left=left, right=right)


def seen_range(first: int, last: int, queries: int, length: int, options: Options) -> tuple[int, int]:
    """Return the range [start, end) of keys outside of which no query of [first, last) sees any, documents aside.

    `length` is how many keys the row has. Where nothing is seen, end ≤ start.
    """
    start, end, ahead = 0, length, length - queries
    if options.is_causal:
        end = min(end, last)
    if options.right >= 0:
        end = min(end, last + ahead + options.right)
    if options.left >= 0:
        start = max(start, first + ahead - options.left)
    return start, end


# --- arguments -------------------------------------------------------------------------------------------------


def check_window(window_size, op: str) -> tuple[int, int]:
    """Return (left, right) of a window, or raise."""
    if not isinstance(window_size, tuple | list) or len(window_size) != 2 or not all(
            isinstance(x, int | torch.SymInt) and x >= -1 for x in window_size):
        raise ValueError(f"{op}: window_size is {window_size}, expected two integers (left, right), each -1 "
                         "(unbounded) or more")
    return tuple(min(x, 1 << 40) if type(x) is int else x for x in window_size)  # sums of positions fit in 64 bits


def check_softcap(softcap: float | None, op: str) -> float:
    """Return the cap of the scores, 0 for none, or raise."""
    if softcap is not None and not 0 <= check_number("softcap", softcap, op) < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}, expected a positive number, or None")
    return float(softcap or 0)


def check_scale(scale: float | None, dim: int, op: str) -> float:
    """Return the factor of the scores of heads of size `dim`, or raise."""
    return max(dim, 1) ** -0.5 if scale is None else check_number("scale", scale, op)


def check_number(name: str, x, op: str, kind: type = float) -> float | int:
    """Return `x` as a float, or as an int, or raise."""
    try:
        return kind(x)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} must be a number, got {x!r}") from None


def check_floats(name: str, x, query: Tensor, shapes: tuple, op: str) -> Tensor | None:
    """Return `x` in float32, or float64 where it or `query` is that, if it fits one of the shapes, or raise."""
    if x is None:
        return None
    _check_tensor(name, x, query, shapes, op)
    if not x.is_floating_point():
        raise RuntimeError(f"{op}: {name} is {x.dtype}, expected floating point")
    return x if x.dtype is torch.float64 else x.to(accumulator(query.dtype))


def check_integers(name: str, x, query: Tensor, shapes: tuple, op: str) -> Tensor | None:
    """Return `x` if it holds integers and fits one of the shapes, or raise; None passes."""
    if x is None:
        return None
    _check_tensor(name, x, query, shapes, op)
    if x.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"{op}: {name} is {x.dtype}, expected torch.int32 or torch.int64")
    return x


def _check_tensor(name, x, query, shapes, op):
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
    if x.device != query.device:
        raise RuntimeError(f"{op}: {name} is on {x.device}, query is on {query.device}")
    if not any(x.shape == shape for shape in shapes):  # `in` does not know the compiler's symbols
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise RuntimeError(f"{op}: {name} has shape {list(x.shape)}, expected {expected}")


# --- kernels for the CPU as differentiable functions -----------------------------------------------------------


def differentiable(name: str, forward: Callable, backward: Callable, reference: Callable,
                   like_query: bool = False) -> Callable:
    """Return `call(tensors, options)`, which returns the output, with the log-sum-exp if the options ask for it.

    Between forward and backward a query that sees nothing has a log-sum-exp of +∞: exp(s - lse) is 0.

    Args:
        name: of the operators, see `Differentiable`.
        forward: `forward(tensors, options, out, lse)` fills the results.
        backward: `backward(tensors, options, saved, grads, needs) -> list`: the gradients of the first tensors, None
            where `needs` is False; the others are constants. `saved` and `grads` are each a pair for (out, lse).
        reference: `reference(tensors, options)` returns output and log-sum-exp, -∞ where nothing is seen.
        like_query: whether the output lies in memory as the query does, as SDPA's on the CPU: where the heads of a
            token are side by side there, they are here. Else it is contiguous.
    """

    def fake(tensors, needs, *options):
        query, _, value, *_ = tensors
        dims = range(query.dim() - 1)
        order = sorted(dims, key=query.stride, reverse=True) if like_query else dims
        out = torch.empty_permuted((*query.shape[:-1], value.size(-1)), (*order, query.dim() - 1), dtype=query.dtype,
                                   device=query.device)
        return [out, query.new_empty(query.shape[:-1], dtype=accumulator(query.dtype))]

    def run_forward(tensors, needs, *options):
        found = fake(tensors, needs, *options)
        forward(tensors, Options(*options), *found)
        return found

    def run_backward(grads, saved, tensors, needs, *options):
        found = backward(tensors, Options(*options), saved, grads, needs)
        # Only functorch and exporting ask for gradients of constants, such as slopes.
        rest = tensors[len(found):], needs[len(found):]
        found = [*found, *(torch.zeros_like(t) if need else None for t, need in zip(*rest, strict=True))]
        return [None if g is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True)]

    def run_reference(tensors, *options):
        out, lse = reference(tensors, Options(*options)._replace(return_lse=True))
        return out, lse.masked_fill(lse == -torch.inf, torch.inf)

    function = Differentiable(
        name, statics="float dropout_p, bool is_causal, float scale, int left, int right, float softcap, "
        "bool return_lse", outputs=2, forward=run_forward, fake=fake, backward=run_backward, reference=run_reference,
        reads=2)

    def call(tensors, options):
        out, lse = function(tensors, *options)
        return (out, lse.masked_fill(lse == torch.inf, -torch.inf)) if options.return_lse else out

    return call
