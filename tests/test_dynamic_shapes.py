"""A compiled graph serves every batch and every length: no op or layer may turn a size that varies into a constant."""

import pytest
import torch

import fastlm
from fastlm import nn, ops

WIDTH, CLASSES, ROWS = 64, 100, 48


def draw(*shape):
    return torch.randn(*shape, requires_grad=True)


def qkv(heads=2, rows=24):
    return draw(2, 4, rows, 16), draw(2, heads, rows, 16), draw(2, heads, rows, 16)


def rows(*tensors):
    """Mark the first dimension of each as one that varies."""
    return [(t, (0,)) for t in tensors]


def attention(**options):
    q, k, v = qkv(4)
    named = {name: t for name, t in options.items() if isinstance(t, torch.Tensor)}

    def call(q, k, v, *tensors):
        return ops.scaled_dot_product_attention(q, k, v, **options | dict(zip(named, tensors, strict=True)))
    return call, [(t, (0, 2)) for t in (q, k, v)] + [(t, ()) for t in named.values()]


def varlen():
    q, k, v = (draw(ROWS, 4, 16) for _ in range(3))
    offsets = torch.tensor([0, 20, ROWS], dtype=torch.int32)
    return (lambda q, k, v, cu: ops.varlen_attn(q, k, v, cu, cu, 28, 28, window_size=(-1, 0))), rows(q, k, v, offsets)


def recurrent(cell, dtype=torch.float32, **options):
    def make():
        layer = getattr(nn, cell)(WIDTH, WIDTH, **options).to(dtype)
        return layer, [(draw(20, 6, WIDTH).to(dtype).detach().requires_grad_(), (0, 1))]
    return make


def head(call, *others, **options):
    def make():
        x, weight = draw(ROWS, WIDTH), draw(CLASSES, WIDTH)
        varying = [t() for t in others]
        return (lambda x, w, *rest: call(x, w, *rest, **options)), [*rows(x), (weight, ()), *rows(*varying)]
    return make


def on_rows(call, count, *fixed):
    def make():
        return call, [(draw(4, ROWS, WIDTH), (0, 1)) for _ in range(count)] + [(t(), ()) for t in fixed]
    return make


def layer(make_layer, count=1):
    def make():
        return make_layer(), [(draw(4, 12, WIDTH), (0, 1)) for _ in range(count)]
    return make


def weight():
    return draw(WIDTH)


def targets():
    return torch.randint(CLASSES, (ROWS,))


def distil(x, w, logits):
    return ops.linear_distillation(x, w, teacher_logits=logits)


CASES = {
    **{cell: recurrent(cell) for cell in ("LSTM", "GRU", "RNN")},
    **{f"{cell} in two layers, both ways": recurrent(cell, num_layers=2, bidirectional=True, batch_first=True)
       for cell in ("LSTM", "GRU", "RNN")},
    **{f"{cell} in bfloat16": recurrent(cell, torch.bfloat16) for cell in ("LSTM", "GRU", "RNN")},
    "projected LSTM": recurrent("LSTM", proj_size=16),
    "linear": layer(lambda: nn.Linear(WIDTH, WIDTH)),
    "linear_cross_entropy": head(ops.linear_cross_entropy, targets),
    "linear_cross_entropy of each row": head(ops.linear_cross_entropy, targets, reduction="none"),
    "linear_distillation": head(distil, lambda: torch.randn(ROWS, CLASSES)),
    "cross_entropy": lambda: (ops.cross_entropy, rows(draw(ROWS, CLASSES), targets())),
    "rms_norm": on_rows(lambda x, w: ops.rms_norm(x, (WIDTH,), w), 1, weight),
    "layer_norm": on_rows(lambda x, w: ops.layer_norm(x, (WIDTH,), w), 1, weight),
    "add_rms_norm": on_rows(lambda x, r, w: ops.add_rms_norm(x, r, (WIDTH,), w)[0], 2, weight),
    "add_layer_norm": on_rows(lambda x, r, w: ops.add_layer_norm(x, r, (WIDTH,), w)[0], 2, weight),
    "softmax": on_rows(lambda x: ops.softmax(x, -1), 1),
    "masked_softmax": lambda: (ops.masked_softmax, rows(draw(ROWS, CLASSES), torch.rand(ROWS, CLASSES) > 0.3)),
    "swiglu": on_rows(ops.swiglu, 2),
    "geglu": on_rows(lambda a, b: ops.geglu(a, b, "tanh"), 2),
    "gelu": on_rows(ops.gelu, 1),
    "dropout_add": on_rows(lambda x, r: ops.dropout_add(x, r, 0.1, True), 2),
    "rotary_embedding": lambda: (ops.rotary_embedding, [(draw(3, 2, 10, 16), (0, 2)), *rows(
        torch.randn(10, 8), torch.randn(10, 8))]),
    "attention, causal": lambda: attention(is_causal=True),
    "attention, window and softcap": lambda: attention(window_size=(7, 0), softcap=5.0),
    "attention, slopes and sinks": lambda: attention(alibi_slopes=torch.rand(4), sinks=draw(4)),
    "attention, dropout": lambda: attention(dropout_p=0.1),
    "varlen_attn": varlen,
    "MultiheadAttention": layer(lambda: nn.MultiheadAttention(WIDTH, 4, batch_first=True), 3),
    "TransformerEncoderLayer": layer(lambda: nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=True)),
    "TransformerDecoderLayer": layer(lambda: nn.TransformerDecoderLayer(WIDTH, 4, 128, batch_first=True), 2),
    "SelfAttention": layer(lambda: nn.SelfAttention(WIDTH, 4, num_kv_heads=2, rope=True)),
}


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("order", [(), ("native", "blocked", "torch")], ids=["by default", "kernels"])
@pytest.mark.parametrize("case", CASES)
def test_no_size_becomes_a_constant(case, order, grad):
    call, marked = CASES[case]()
    torch._dynamo.reset()
    for tensor, dims in marked:
        torch._dynamo.mark_dynamic(tensor, list(dims))  # the compiler raises where it makes a constant of one
    compiled = torch.compile(lambda *args: call(*args), fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        if order:
            with fastlm.backend(*order):
                found = compiled(*(t for t, _ in marked))
        else:
            found = compiled(*(t for t, _ in marked))
        if grad:
            (found[0] if isinstance(found, tuple) else found).float().sum().backward()
