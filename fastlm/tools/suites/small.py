"""Small calls through the public functions and modules, where what Python does counts: none is to be slower than stock.

One measurement is some calls in a row and, in training, one backward pass through all of them. A call of Python takes
some time: three microseconds more than stock's count as none.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.ops.quantized_linear import dequantize_weight, quantize_weight
from fastlm.tools.suites import Case, Goal, Subject, apply, attend, first, module_errors, module_subject, pair

CALLS = 16
GOAL = Goal(ratio=0.95, slack=CALLS * 3e-6)
FORWARD = ("forward",)
ROWS = ((1, 64), (16, 256))
TOKENS = ((1, 1, 64), (1, 16, 256), (4, 16, 256))  # sequences, tokens, features
HEADS = ((1, 4, 1, 64), (1, 4, 16, 64), (4, 4, 16, 64))
STEPS = ((1, 1, 64), (1, 1, 256), (16, 1, 64), (16, 4, 256))  # steps, sequences, features


def cases(device: str, dtypes: Sequence[torch.dtype] | None = None) -> Iterator[Case]:
    for dtype in dtypes or (torch.float32,):
        for name, shapes, modes, make in OPS:
            for shape in shapes:
                yield _case(name, shape, modes, dtype, functools.partial(_op, make, shape, dtype, device))
        for name, form, shapes, arguments, options, call in MODULES:
            for shape in shapes:
                build = functools.partial(_module, name, arguments, options, call, shape, dtype, device)
                yield _case(name, shape, ("forward", "training"), dtype, build, form)


def _case(name, shape, modes, dtype, build, form=""):
    case = f"{form} {'x'.join(map(str, shape))}".strip()
    return Case("small", name, case, dtype, build, modes, dict.fromkeys(modes, GOAL))


# --- ops --------------------------------------------------------------------------------------------------------------


def _op(make, shape, dtype, device) -> Subject:
    """Compare a public function with stock's: `make(draw, *shape)` returns both and their arguments."""
    torch.manual_seed(0)
    ours, stock, args = make(lambda *size: torch.randn(size, device=device).to(dtype), *shape)
    return Subject(args, _often(ours), {"torch": _often(stock)}, lambda ran: module_errors(args, ours, stock),
                   whole=True)


def _often(fn):
    return lambda *args: [fn(*args) for _ in range(CALLS)]


def _classes(draw, rows, classes):
    return torch.arange(rows, device=draw(1).device) % classes


def _norm(ours, stock, *weights):
    def make(draw, rows, cols):
        return ours, stock, (draw(rows, cols), (cols,), *(draw(cols) for _ in weights))
    return make


def _added(ours, norm, *weights):
    def stock(x, residual, shape, *weights):
        x = x + residual
        return norm(x, shape, *weights), x

    def make(draw, rows, cols):
        return ours, stock, (draw(rows, cols), draw(rows, cols), (cols,), *(draw(cols) for _ in weights))
    return make


def _masked_softmax(draw, rows, cols):
    mask = (torch.arange(cols) < max(1, cols // 2)).to(draw(1).device)

    def stock(x, mask):
        return x.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)
    return ops.masked_softmax, stock, (draw(rows, cols), mask)


def _rotary(draw, batch, heads, tokens, dim):
    def stock(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    angles = draw(tokens, dim // 2)
    return ops.rotary_embedding, stock, (draw(batch, heads, tokens, dim), angles.cos(), angles.sin())


def _attention(**options):
    def make(draw, *shape):
        return (functools.partial(ops.scaled_dot_product_attention, **options),
                functools.partial(F.scaled_dot_product_attention, **options), tuple(draw(*shape) for _ in range(3)))
    return make


def _masked_attention(draw, *shape):
    mask = torch.ones(shape[2], shape[2], dtype=torch.bool).tril().to(draw(1).device)
    return ops.scaled_dot_product_attention, F.scaled_dot_product_attention, (*(draw(*shape) for _ in range(3)), mask)


def _varlen(draw, batch, heads, tokens, dim):
    """Pack sequences of one length, which stock calls one by one."""
    offsets = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32)

    def ours(q, k, v):
        return ops.varlen_attn(q, k, v, offsets, offsets, tokens, tokens)

    def stock(q, k, v):
        parts = zip(*(x.transpose(0, 1).split(tokens, 1) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 1).transpose(0, 1)
    return ours, stock, tuple(draw(batch * tokens, heads, dim) for _ in range(3))


def _cross_entropy(draw, rows, classes):
    return ops.cross_entropy, F.cross_entropy, (draw(rows, classes), _classes(draw, rows, classes))


def _head(draw, rows, features, classes):
    def stock(x, weight, target):
        return F.cross_entropy(F.linear(x, weight), target)
    args = draw(rows, features), draw(classes, features) / features**0.5, _classes(draw, rows, classes)
    return ops.linear_cross_entropy, stock, args


def _distillation(draw, rows, features, classes):
    logits = draw(rows, classes)

    def ours(x, weight):
        return ops.linear_distillation(x, weight, teacher_logits=logits)

    def stock(x, weight):
        return F.kl_div(F.linear(x, weight).log_softmax(1), logits.log_softmax(1), reduction="batchmean",
                        log_target=True)
    return ours, stock, (draw(rows, features), draw(classes, features) / features**0.5)


def _quantized(mode):
    def make(draw, rows, inputs, outputs):
        packed, scale = quantize_weight(draw(outputs, inputs), mode=mode)
        full = dequantize_weight(packed, scale, inputs, mode=mode)
        return (lambda x: ops.quantized_linear(x, packed, scale, mode=mode), lambda x: F.linear(x, full.to(x.dtype)),
                (draw(rows, inputs),))
    return make


# name, shapes, modes, what makes (our function, stock's, arguments)
BOTH = ("forward", "training")
OPS = (
    ("softmax", ROWS, BOTH, lambda draw, *shape: (ops.softmax, torch.softmax, (draw(*shape), -1))),
    ("log_softmax", ROWS, BOTH, lambda draw, *shape: (ops.log_softmax, torch.log_softmax, (draw(*shape), -1))),
    ("masked_softmax", ROWS, BOTH, _masked_softmax),
    ("gelu", ROWS, BOTH, lambda draw, *shape: (ops.gelu, F.gelu, (draw(*shape),))),
    ("swiglu", ROWS, BOTH, lambda draw, *shape: (
        ops.swiglu, lambda gate, up: F.silu(gate) * up, (draw(*shape), draw(*shape)))),
    ("geglu", ROWS, BOTH, lambda draw, *shape: (
        ops.geglu, lambda gate, up: F.gelu(gate) * up, (draw(*shape), draw(*shape)))),
    ("rms_norm", ROWS, BOTH, _norm(ops.rms_norm, F.rms_norm, "weight")),
    ("layer_norm", ROWS, BOTH, _norm(ops.layer_norm, F.layer_norm, "weight", "bias")),
    ("add_rms_norm", ROWS, BOTH, _added(ops.add_rms_norm, F.rms_norm, "weight")),
    ("add_layer_norm", ROWS, BOTH, _added(ops.add_layer_norm, F.layer_norm, "weight", "bias")),
    ("dropout_add", ROWS, BOTH, lambda draw, *shape: (
        ops.dropout_add, lambda x, residual, p: residual + F.dropout(x, p), (draw(*shape), draw(*shape), 0.0))),
    ("rotary_embedding", HEADS, BOTH, _rotary),
    ("linear", ROWS, BOTH, lambda draw, rows, cols: (
        ops.linear, F.linear, (draw(rows, cols), draw(cols, cols), draw(cols)))),
    ("quantized_linear int8", ((1, 256, 256), (16, 256, 256)), FORWARD, _quantized("int8")),
    ("cross_entropy", ((1, 1000), (16, 1000)), BOTH, _cross_entropy),
    ("linear_cross_entropy", ((1, 64, 1000), (16, 256, 1000)), BOTH, _head),
    ("linear_distillation", ((1, 64, 1000), (16, 256, 1000)), BOTH, _distillation),
    ("attention", HEADS, BOTH, _attention()),
    ("attention causal", HEADS, BOTH, _attention(is_causal=True)),
    ("attention masked", HEADS, BOTH, _masked_attention),
    ("varlen_attn", HEADS[1:], BOTH, _varlen),
)


# --- modules ----------------------------------------------------------------------------------------------------------


class _Called:
    """A module called as it is, in its own parameters; of these, too, `bench.step` takes gradients."""

    def __init__(self, module, call):
        self.module, self.call, self.parameters = module, call, tuple(module.parameters())

    def __call__(self, x):
        return [self.call(self.module, x) for _ in range(CALLS)]


def _module(name, arguments, options, call, shape, dtype, device) -> Subject:
    stock, ours = (module.to(device, dtype) for module in pair(name, *arguments(*shape), **options))
    x = torch.randn(shape, device=device).to(dtype)
    checked = module_subject(stock, ours, call, x)
    return Subject((x,), _Called(ours, call), {"torch": _Called(stock, call)}, checked.errors, modules=(ours, stock),
                   whole=True)


def _attend_with_weights(module, x):
    return module(x, x, x)[0]


def _decode(module, x):
    return module(x, x)


def _loss(module, x):
    return module(x, torch.arange(len(x), device=x.device) % 100)


def _width(*shape):
    return shape[-1:]


def _square(*shape):
    return shape[-1], shape[-1]


def _of_heads(*shape):
    return shape[-1], 4


def _block(*shape):
    return shape[-1], 4, 4 * shape[-1]


# name, form, shapes of x, arguments of the constructor from them, its keywords, how to call it
LAYER = dict(dropout=0.0, batch_first=True)
MODULES = (
    ("Softmax", "", ROWS, lambda *shape: (-1,), {}, apply),
    ("GELU", "", ROWS, lambda *shape: (), {}, apply),
    ("RMSNorm", "", ROWS, _width, {}, apply),
    ("LayerNorm", "", ROWS, _width, {}, apply),
    ("Linear", "", ROWS, _square, {}, apply),
    ("CrossEntropyLoss", "", ((16, 1000),), lambda *shape: (), {}, _loss),
    *((f"{cell}Cell", "", ROWS, _square, {}, first if cell == "LSTM" else apply) for cell in ("RNN", "GRU", "LSTM")),
    *((cell, "", STEPS, _square, {}, first) for cell in ("RNN", "GRU", "LSTM")),
    ("MultiheadAttention", "", TOKENS, _of_heads, dict(batch_first=True), attend),
    ("MultiheadAttention", "weights", TOKENS, _of_heads, dict(batch_first=True), _attend_with_weights),
    ("TransformerEncoderLayer", "", TOKENS, _block, LAYER, apply),
    ("TransformerDecoderLayer", "", TOKENS, _block, LAYER, _decode),
)
