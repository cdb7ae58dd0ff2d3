"""Attention: where SDPA takes the call not slower; where it builds a dense mask or all scores, faster and smaller.

On the CPU the stock call is SDPA, with a dense mask for what it lacks, or the formula where no mask can say it. On a
GPU compiled FlexAttention is a baseline too, for masks and changed scores.
"""

import functools
from collections.abc import Iterator, Sequence

import torch

from fastlm import measure
from fastlm.ops.attention_common import Options
from fastlm.tools.suites import OPS, Case, Goal, Subject, op_subject

CHECKED = 2048  # queries and keys of one head that are compared with float64; more would not fit into memory
NO_SLOWER = {"forward": Goal(ratio=0.95), "training": Goal(ratio=0.95)}
SMALL = {"training": Goal(memory=1 / 8)}


def _faster(ratio: float) -> dict[str, Goal]:
    return {"training": Goal(ratio=ratio)}


# name, features, (batch, heads, heads of keys, queries, keys, head size), goals
CPU = (
    ("dense", {}, (1, 8, 8, 2048, 2048, 64), NO_SLOWER),
    ("causal", dict(is_causal=True), (1, 8, 8, 2048, 2048, 64), NO_SLOWER),
    ("grouped", dict(is_causal=True), (1, 8, 2, 2048, 2048, 64), NO_SLOWER),
    ("window 256", dict(left=256, right=0), (1, 8, 8, 4096, 4096, 64), _faster(3)),
    ("8 documents", dict(documents=8), (1, 8, 8, 4096, 4096, 64), _faster(3)),
    ("learned bias", dict(bias=True), (1, 8, 8, 2048, 2048, 64), _faster(1.2)),
    ("dropout 0.1", dict(dropout_p=0.1), (1, 8, 8, 2048, 2048, 64), _faster(1.2)),
    ("softcap", dict(softcap=30.0), (1, 2, 2, 8192, 8192, 64), SMALL),
    ("ALiBi", dict(alibi=True), (1, 2, 2, 8192, 8192, 64), SMALL),
    ("sinks", dict(sinks=True), (1, 2, 2, 8192, 8192, 64), SMALL),
    ("decode", dict(), (1, 8, 2, 1, 16384, 64), {"forward": Goal(ratio=0.95)}),
    ("decode 4", dict(right=0), (1, 8, 2, 4, 16384, 64), {"forward": Goal(ratio=0.95)}),
)

# Forward and backward of the dense rows are held together: backward takes about 2.5 times as long.
DENSE = {"forward": Goal(ratio=0.8), "training": Goal(ratio=3.5 / (1 / 0.8 + 2.5 / 0.55))}
GPU = (  # what takes FlexAttention's compiler first: time may run out
    *((f"{name} D{dim}", features, (4, 16, 16, 4096, 4096, dim), _faster(ratio)) for dim in (64, 128)
      for name, features, ratio in (
          ("learned bias", dict(bias=True), 2), ("softcap", dict(softcap=30.0), 1.2), ("ALiBi", dict(alibi=True), 1.2),
          ("causal ALiBi", dict(alibi=True, is_causal=True), 1.2), ("window 256", dict(left=256, right=0), 1.2),
          ("8 documents", dict(documents=8), 1.2), ("dropout 0.1", dict(dropout_p=0.1), 1.2))),
    *((f"decode D{dim}", {}, (16, 32, 8, 1, 16384, dim), {"forward": Goal(share=0.75)}) for dim in (64, 128)),
    *((f"causal D{dim}", dict(is_causal=True), (4, 16, 16, 4096, 4096, dim), DENSE) for dim in (64, 128)),
    *((f"dense D{dim}", {}, (max(1, 16384 // n), 16, 16, n, n, dim), DENSE)
      for n in (512, 1024, 2048, 4096, 8192, 16384) for dim in (64, 128)),
)

# name, queries of each sequence, keys of each, heads, heads of keys, window
VARLEN = (
    ("8 sequences", (1024, 128, 512, 64, 256, 1024, 32, 512), None, 8, 8, (-1, -1)),
    ("8 sequences, causal", (1024, 128, 512, 64, 256, 1024, 32, 512), None, 8, 2, (-1, 0)),
    ("decode 4 sequences", (1, 1, 1, 1), (4096, 1024, 16, 2048), 8, 2, (-1, 0)),
)


def cases(device: str, dtypes: Sequence[torch.dtype] | None = None) -> Iterator[Case]:
    gpu = torch.device(device).type == "cuda"
    for dtype in dtypes or ((torch.bfloat16,) if gpu else (torch.float32,)):
        for name, features, shape, goals in GPU if gpu else CPU:
            yield _case("attention", name, "x".join(map(str, shape)), dtype, goals,
                        functools.partial(_subject, features, shape, dtype, device))
        for name, queries, keys, heads, kv_heads, window in VARLEN:
            modes = {"forward": NO_SLOWER["forward"]} if max(queries) == 1 else NO_SLOWER
            yield _case("varlen_attn", name, f"{sum(queries)} tokens, {heads} heads", dtype, modes,
                        functools.partial(_packed, queries, keys or queries, heads, kv_heads, window, dtype, device))


def _case(op, name, case, dtype, goals, build) -> Case:
    return Case("attention", op, f"{name} {case}", dtype, build, modes=tuple(goals), goals=goals, fast=OPS[op].fast)


def _subject(features, shape, dtype, device) -> Subject:
    torch.manual_seed(0)
    op, args = OPS["attention"], _args(dict(features), shape, dtype, device)
    _, heads, kv_heads, queries, keys, dim = shape
    # Of dropout, whose masks differ, the numbers are compared where nothing is dropped.
    few = (1, heads // kv_heads, 1, min(queries, CHECKED), min(keys, CHECKED), dim)
    checked = _args(dict(features, dropout_p=0.0), few, dtype, device)
    subject = op_subject(op, args)
    subject.errors = lambda ran: measure.errors(op, ran, checked)
    flexible = not features.keys().isdisjoint({"softcap", "alibi", "left", "documents"})
    if torch.device(device).type == "cuda" and flexible:
        subject.baselines["FlexAttention"] = _flex(args)
    return subject


def _args(features, shape, dtype, device):
    """Return the op's arguments: `alibi`, `sinks`, `bias` and `documents` (how many) are tensors, the rest Options."""
    batch, heads, kv_heads, queries, keys, dim = shape
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    tensors = (torch.randn(batch, *size, dim, device=device).to(dtype) for size in sizes)
    mask = torch.randn(1, heads, queries, keys, device=device).to(dtype) if features.pop("bias", False) else None
    sinks = torch.randn(heads, device=device) if features.pop("sinks", False) else None
    slopes = 2.0 ** -torch.linspace(1, 8, heads, device=device)[None] if features.pop("alibi", False) else None
    documents = features.pop("documents", 0)
    ids = (None, None)
    if documents:
        ids = tuple((torch.arange(n, device=device) * documents // n).expand(batch, n) for n in (queries, keys))
    return *tensors, mask, sinks, slopes, None, *ids, Options(scale=dim**-0.5, **features)


def _packed(queries, keys, heads, kv_heads, window, dtype, device) -> Subject:
    torch.manual_seed(0)
    shapes = ((sum(queries), heads, 64), (sum(keys), kv_heads, 64), (sum(keys), kv_heads, 64))
    tensors = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    offsets = (torch.tensor([0, *n], device=device).cumsum(0).int() for n in (queries, keys))
    left, right = window
    return op_subject(OPS["varlen_attn"], (*tensors, None, None, *offsets, None, None, max(queries), max(keys), None,
                                           Options(scale=0.125, left=left, right=right)))


def _flex(args):
    """Return compiled FlexAttention as a function of the op's arguments; the block mask is made before, once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, _, _, _, slopes, _, ids, _, options = args

    def modified(score, b, h, i, j):
        if options.softcap:
            score = options.softcap * torch.tanh(score / options.softcap)
        return score if slopes is None else score - slopes[0, h] * (i - j).abs()

    def seen(b, h, i, j):
        found = i >= j if options.is_causal else i >= i
        if options.left >= 0:
            found = found & (i - j <= options.left) & (j - i <= options.right)
        return found if ids is None else found & (ids[b, i] == ids[b, j])

    masked = options.is_causal or options.left >= 0 or ids is not None
    blocks = create_block_mask(seen, query.size(0) if ids is not None else None, None, query.size(2), key.size(2),
                               device=query.device) if masked else None
    modify = modified if options.softcap or slopes is not None else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value, *rest: compiled(query, key, value, modify, blocks, scale=options.scale)
