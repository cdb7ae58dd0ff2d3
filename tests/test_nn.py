"""Attention, softmax and losses beside torch.nn's: the same arguments, parameters, numbers, gradients and errors."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from parity import CELLS, DTYPES, combinations, hold, leaf, pair, run, tensors
from torch import Tensor, nn

import fastlm


@pytest.mark.parametrize("name", [*CELLS, "MultiheadAttention", "TransformerEncoderLayer"])
def test_autocast(name, device):
    """Under autocast each result has stock's dtype and a gradient in float32 reaches the parameters."""
    args = (8, 8) if name in CELLS else (8, 2)
    theirs, ours = pair(name, *args, device=device)
    if name not in CELLS:  # which drop nothing here, and cuDNN's backward wants training mode
        theirs.eval(), ours.eval()
    x = torch.randn(5, 3, 8, device=device)
    for dtype in (torch.bfloat16, torch.float16) if device == "cuda" else (torch.bfloat16,):
        with torch.autocast(device, dtype=dtype):
            outputs = [m(*([x] * (3 if name == "MultiheadAttention" else 1))) for m in (theirs, ours)]
        stock, found = (tensors(o) for o in outputs)
        assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in stock]
        torch.testing.assert_close(found[0], stock[0], rtol=0.05, atol=0.05)
        found[0].float().sum().backward()
        assert all(p.grad.dtype is torch.float32 for p in ours.parameters() if p.grad is not None)
        assert any(p.grad is not None for p in ours.parameters())


# --- attention -------------------------------------------------------------------------------------------------

MULTIHEAD = [("need_weights", False), ("average_attn_weights", False), ("key_padding_mask", "bool"),
             ("key_padding_mask", "float"), ("attn_mask", "bool"), ("attn_mask", "float"), ("attn_mask", "bool 3-D"),
             ("attn_mask", "float 3-D"), ("is_causal", True), ("add_bias_kv", True), ("add_zero_attn", True),
             ("kdim", 6), ("vdim", 10), ("batch_first", True), ("bias", False), ("dropout", 0.5), ("cross", True),
             ("unbatched", True), ("eval", True)]
CALL_OPTIONS = ("need_weights", "average_attn_weights", "key_padding_mask", "attn_mask", "is_causal")


def mask(kind, *shape):
    """Draw a mask that bars some keys, never the first; or numbers to add to the scores."""
    if kind.startswith("float"):
        return torch.randn(shape)
    barred = torch.rand(shape) < 0.4
    barred[..., 0] = False
    return barred


def multihead_case(options, device, dtype):
    """Return (stock, ours, call, leaves): float masks are leaves too, and so get gradients."""
    options = dict(options)
    asked = {k: options.pop(k) for k in CALL_OPTIONS if k in options}
    unbatched, eval_mode, cross = (options.pop(k, False) for k in ("unbatched", "eval", "cross"))
    theirs, ours = pair("MultiheadAttention", 8, 2, device=device, dtype=dtype, **options)
    for module in (theirs, ours):
        module.train(not eval_mode)
        for name in ("in_proj_bias", "out_proj.bias"):
            if module.in_proj_bias is not None:
                generator = torch.Generator().manual_seed(1)
                p = module.get_parameter(name)
                p.data.copy_(torch.randn(p.shape, generator=generator))
    target, widths = 4, (8, options.get("kdim", 8), options.get("vdim", 8))
    source = 5 if cross and not asked.get("is_causal") else target
    torch.manual_seed(2)
    batch = () if unbatched else (3,)
    lengths = ((target,), (source,), (source,))
    shapes = [(*batch, *n, w) if options.get("batch_first") else (*n, *batch, w)
              for n, w in zip(lengths, widths, strict=True)]
    inputs = [leaf(*shape, device=device, dtype=dtype) for shape in (shapes if cross else shapes[:1])]
    if not cross and widths != (8, 8, 8):
        inputs = [leaf(*shape, device=device, dtype=dtype) for shape in shapes]
    masks = {}
    if "key_padding_mask" in asked:
        masks["key_padding_mask"] = mask(asked.pop("key_padding_mask"), *batch, source)
    if asked.get("is_causal"):
        asked.pop("attn_mask", None)
        masks["attn_mask"] = torch.ones(target, source).triu(1).bool()
    elif "attn_mask" in asked:
        kind = asked.pop("attn_mask")
        rows = ((1 if unbatched else 3) * 2,) if kind.endswith("3-D") else ()
        masks["attn_mask"] = mask(kind, *rows, target, source)
    floats = [name for name, m in masks.items() if m.is_floating_point()]
    leaves = inputs + [masks[name].to(device, dtype).requires_grad_() for name in floats]

    def call(module, *leaves):
        given = {name: m.to(device) for name, m in masks.items()} | dict(
            zip(floats, leaves[len(inputs):], strict=True))
        qkv = leaves[: len(inputs)] if len(inputs) == 3 else leaves[:1] * 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stock deprecates masks of two types
            return module(*qkv, **given, **asked)

    return theirs, ours, call, leaves


@pytest.mark.parametrize("options", combinations(MULTIHEAD))
def test_multihead_attention(options, device):
    if device == "cuda" and "dropout" in options:
        pytest.skip("kernels on the GPU draw dropout masks of their own")
    hold(*multihead_case(options, device, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("options", combinations([o for o in MULTIHEAD if o[0] != "dropout"], 1))
def test_multihead_attention_dtypes(options, dtype, device):
    hold(*multihead_case({"need_weights": False} | options, device, dtype))


@pytest.mark.parametrize("options", combinations([o for o in MULTIHEAD if o[0] != "eval"], 1))
def test_multihead_attention_agrees_with_stocks_fast_path(options, device):
    """In eval without gradients stock runs a fused function of its own; ours runs it where nothing is masked."""
    theirs, ours, call, leaves = multihead_case(options | {"eval": True, "batch_first": True}, device, torch.float32)
    with torch.no_grad():
        for a, b in zip(tensors(call(ours, *leaves)), tensors(call(theirs, *leaves)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        found, = (call.op for call in fastlm.explain(call, ours, *leaves) if call.op != "linear")
        other = {"key_padding_mask", "attn_mask", "bias", "kdim", "vdim", "add_bias_kv", "add_zero_attn", "unbatched",
                 "is_causal", "cross"} & options.keys()
        names = ("softmax", "attention") if other or device == "cuda" else ("multihead_attention",)
        assert found in names, found


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"kdim": 6}, {"bias": False}, {"batch_first": True}],
                         ids=str)
def test_multihead_attention_parameters(options):
    made = []
    for module in (nn, fastlm.nn):
        torch.manual_seed(5)
        made.append(module.MultiheadAttention(8, 2, **options))
    assert repr(made[0]) == repr(made[1])
    assert list(made[0].state_dict()) == list(made[1].state_dict())
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("need_weights", [False, True])
def test_query_that_may_see_no_key(need_weights, device):
    """A fully masked row gives no output and no gradient; the weights that stock shows for it are NaN."""
    ours = fastlm.nn.MultiheadAttention(8, 2, bias=False, batch_first=True, device=device)
    x = leaf(2, 3, 8, device=device, dtype=torch.float32)
    barred = torch.zeros(2, 3, dtype=torch.bool, device=device)
    barred[1] = True
    output, _ = ours(x, x, x, key_padding_mask=barred, need_weights=need_weights)
    if need_weights:
        assert output[1].isnan().all()
    else:
        output.sum().backward()
        assert (output[1] == 0).all()
        assert (x.grad[1] == 0).all()
        assert ours.in_proj_weight.grad.isfinite().all()
    assert output[0].isfinite().all()


def bad_attention():
    x = torch.randn(4, 3, 8)
    yield "query", (x[0, 0],) * 3, {}
    yield "key", (x, x[0], x[0]), {}
    yield "query", (x[..., :6],) * 3, {}
    yield "key", (x, x, torch.randn(5, 3, 8)), {}
    yield "key", (x, x[:, :2], x[:, :2]), {}
    yield "key_padding_mask", (x,) * 3, {"key_padding_mask": torch.zeros(3, 5)}
    yield "key_padding_mask", (x,) * 3, {"key_padding_mask": torch.zeros(4)}
    yield "key_padding_mask", (x[:, 0],) * 3, {"key_padding_mask": torch.zeros(5)}
    yield "attn_mask", (x,) * 3, {"attn_mask": torch.zeros(4)}
    yield "attn_mask", (x,) * 3, {"attn_mask": torch.zeros(4, 5)}
    yield "attn_mask", (x,) * 3, {"attn_mask": torch.zeros(3, 4, 4)}
    yield "attn_mask", (x,) * 3, {"attn_mask": torch.zeros(4, 4, dtype=torch.int64)}
    yield "attn_mask", (x,) * 3, {"is_causal": True}


@pytest.mark.parametrize("case", list(bad_attention()), ids=lambda c: f"{c[0]} {list(c[2])}")
def test_multihead_attention_bad_inputs(case):
    name, qkv, options = case
    theirs, ours = pair("MultiheadAttention", 8, 2)
    with pytest.raises(Exception) as stock:
        theirs(*qkv, **options)
    with pytest.raises(stock.type, match=rf"MultiheadAttention.*{name}"):
        ours(*qkv, **options)


LAYER = [("norm_first", True), ("activation", "gelu"), ("activation", torch.tanh), ("batch_first", True),
         ("bias", False), ("dropout", 0.0), ("layer_norm_eps", 0.1), ("mask", "bool"), ("mask", "float"),
         ("padding", "bool"), ("padding", "float"), ("causal", True), ("unbatched", True), ("eval", True)]


def layer_case(options, device, dtype):
    options = dict(options)
    kind, padding, causal, unbatched, eval_mode = (
        options.pop(k, None) for k in ("mask", "padding", "causal", "unbatched", "eval"))
    theirs, ours = pair("TransformerEncoderLayer", 8, 2, 16, device=device, dtype=dtype, **options)
    theirs.train(not eval_mode), ours.train(not eval_mode)
    batch = () if unbatched else (3,)
    src = leaf(*((*batch, 4) if options.get("batch_first") else (4, *batch)), 8, device=device, dtype=dtype)
    given = {}
    if kind or causal:
        given["src_mask"] = torch.ones(4, 4).triu(1).bool() if causal else mask(kind, 4, 4)
        given["is_causal"] = bool(causal)
    if padding:
        given["src_key_padding_mask"] = mask(padding, *batch, 4)

    def call(module, src):
        cast = {k: m.to(src) if isinstance(m, Tensor) and m.is_floating_point() else m for k, m in given.items()}
        cast = {k: m.to(device) if isinstance(m, Tensor) else m for k, m in cast.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stock deprecates masks of two types
            return module(src, **cast)

    return theirs, ours, call, [src]


@pytest.mark.parametrize("options", combinations(LAYER))
def test_transformer_encoder_layer(options, device):
    if device == "cuda" and not options.get("eval"):
        options = options | {"dropout": 0.0}
    theirs, ours, call, leaves = layer_case(options, device, torch.float32)
    assert repr(ours) == repr(theirs)
    hold(theirs, ours, call, leaves)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = call(theirs, *leaves)
        torch.manual_seed(0)
        torch.testing.assert_close(call(ours, *leaves), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in fastlm.nn.__all__ if hasattr(nn, n)])
def test_arguments_are_there_to_be_read(name):
    """Of the class and of its forward: torch.nn's first, where it names them itself."""
    for part in ("__init__", "forward"):
        ours, theirs = (list(inspect.signature(getattr(getattr(space, name), part)).parameters.values())
                        for space in (fastlm.nn, nn))
        assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in ours)
        if not any(p.kind is p.VAR_KEYWORD for p in theirs):
            assert [(p.name, p.kind, p.default) for p in ours][:len(theirs)] == [
                (p.name, p.kind, p.default) for p in theirs]


def test_transformer_encoder_layer_parameters():
    made = []
    for module in (nn, fastlm.nn):
        torch.manual_seed(5)
        made.append(module.TransformerEncoderLayer(8, 2))
    assert list(made[0].state_dict()) == list(made[1].state_dict())
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(a, b)
    for other in (copy.deepcopy(made[1]), pickle.loads(pickle.dumps(made[1]))):
        assert type(other.self_attn) is fastlm.nn.MultiheadAttention
    meta = fastlm.nn.TransformerEncoderLayer(8, 2, device="meta").to_empty(device="cpu")
    meta.load_state_dict(made[0].state_dict())


class Adapted(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize("made", [Adapted, fastlm.nn.QuantizedLinear])
def test_parts_that_were_replaced_run_in_inference(made):
    """Stock's fused layer would read their weights and leave out what they do."""
    layer = fastlm.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    layer.linear1 = made(16, 32).eval()
    x = torch.randn(2, 5, 16)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_a_quantized_projection_of_attention():
    """It has no weight that a product could read, so it is called; in training, and where stock's layer is fused."""
    layer = fastlm.nn.TransformerEncoderLayer(64, 2, 32, batch_first=True, dropout=0.0)
    exact = copy.deepcopy(layer)
    layer.self_attn.out_proj = quantized = fastlm.nn.QuantizedLinear.from_linear(layer.self_attn.out_proj, "int4")
    weight = quantized(torch.eye(64)) - quantized.bias
    exact.self_attn.out_proj.weight.data = weight.T.contiguous()
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(layer(x), exact(x))
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), exact(x))


def test_two_norms_of_another_eps():
    """Stock's fused layer takes one eps for both."""
    theirs, ours = pair("TransformerEncoderLayer", 8, 2, 16, batch_first=True)
    for layer in (theirs, ours):
        layer.eval().norm2.eps = 0.5
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_a_frozen_attention_leaves_the_gradients_of_the_rest():
    layer = fastlm.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layer.self_attn.requires_grad_(False)
    layer(torch.randn(3, 5, 8)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
        name for name, _ in layer.named_parameters() if not name.startswith("self_attn")}


@pytest.mark.parametrize("part", ["linear1", "self_attn", "norm2"])
def test_hooks_on_the_parts_of_a_layer_are_called_in_inference(part):
    layer, seen = fastlm.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), []
    getattr(layer, part).register_forward_hook(lambda *_: seen.append(part))
    with torch.no_grad():
        layer(torch.randn(3, 5, 8))
    assert seen == [part]


@pytest.mark.parametrize("name", ["torch", "blocked"])
@pytest.mark.parametrize("make", [
    lambda: (lambda mha: lambda x: mha(x, x, x, need_weights=False))(
        fastlm.nn.MultiheadAttention(8, 2, batch_first=True).eval()),
    lambda: fastlm.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()], ids=["attention", "layer"])
def test_a_named_backend_is_not_passed_by_in_inference(name, make):
    """Stock's fused functions are no implementation of attention: where one is asked for, it runs."""
    module, x = make(), torch.randn(3, 5, 8)
    with torch.no_grad():
        assert "attention" not in {call.op for call in fastlm.explain(module, x)}
        with fastlm.backend(name):
            assert {call.op: call.ran for call in fastlm.explain(module, x)}["attention"] == name


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["attention", "layer"])
def test_inside_torchs_encoder(nested, training, whole, device):
    """Our layer in nn.TransformerEncoder, and our attention in stock's layer: padding, masks, nested tensors."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, device=device)
    stock = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).train(training)
    if whole:
        other = fastlm.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, device=device)
    else:
        other = copy.deepcopy(layer)
        other.self_attn = fastlm.nn.MultiheadAttention(8, 2, batch_first=True, device=device)
    ours = nn.TransformerEncoder(other, 2, enable_nested_tensor=nested).train(training)
    assert ours.use_nested_tensor == stock.use_nested_tensor
    ours.load_state_dict(stock.state_dict())
    src = torch.randn(3, 5, 8, device=device)
    padding = torch.arange(5, device=device) >= torch.tensor([[5], [3], [2]], device=device)
    causal = nn.Transformer.generate_square_subsequent_mask(5, device=device)
    for options in ({}, {"src_key_padding_mask": padding}, {"mask": causal, "is_causal": True}, {"mask": causal}):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(ours(src, **options), stock(src, **options), rtol=1e-4, atol=1e-5)
    if whole:
        called = {call.op for call in fastlm.explain(ours, src)}
        assert called & {"attention", "transformer_encoder_layer"}, called


@pytest.mark.parametrize("module", ["MultiheadAttention", "TransformerEncoderLayer"])
def test_attention_compiled(module, device):
    torch._dynamo.reset()
    make = multihead_case if module == "MultiheadAttention" else layer_case
    masks = {"key_padding_mask": "bool", "attn_mask": "float"} if make is multihead_case else {"causal": True}
    _, ours, call, leaves = make(masks | {"dropout": 0.0}, device, torch.float32)
    expected = run(ours, call, leaves)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, call, leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


# --- softmax and losses ----------------------------------------------------------------------------------------


def same(found, expected):
    """Assert that stock ran, bit for bit; on a GPU, where a kernel may have, that the numbers are close."""
    if found.is_cuda:
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dim", [1, None])
@pytest.mark.filterwarnings("ignore:.*dim.*")
def test_softmax_compiled(dim, device):
    torch._dynamo.reset()
    x = leaf(2, 3, device=device, dtype=torch.float32)
    found = torch.compile(fastlm.nn.Softmax(dim), fullgraph=True, backend="aot_eager")(x)
    same(found, nn.Softmax(dim)(x))


@pytest.mark.parametrize("dim", [0, 1, -1, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:.*dim.*")
def test_softmax(dim, dtype, device):
    theirs, ours = nn.Softmax(dim), fastlm.nn.Softmax(dim)
    assert repr(ours) == repr(theirs)
    for shape in ((3, 4), (2, 3, 4), (2, 3, 4, 5)):
        hold(theirs, ours, lambda m, x: m(x), [leaf(*shape, device=device, dtype=dtype)])
        x = leaf(*shape, device=device, dtype=dtype)
        same(fastlm.ops.softmax(x, dim=dim), nn.functional.softmax(x, dim=dim))
    with pytest.raises(IndexError, match="softmax"):
        fastlm.nn.Softmax(2)(torch.randn(3, 4, device=device))


LOSS = [("weight", True), ("ignore_index", 2), ("reduction", "sum"), ("reduction", "none"), ("label_smoothing", 0.1),
        ("target", "probabilities"), ("dimensions", (5, 2))]


def loss_case(name, options, device, dtype):
    options = dict(options)
    kind, extra = options.pop("target", "classes"), options.pop("dimensions", ())
    classes, rows = 7, 6
    if options.get("options"):
        options["options"] = nn.LinearCrossEntropyOptions()
    if options.pop("weight", False):
        options["weight"] = torch.rand(classes, device=device, dtype=dtype)
    if kind == "probabilities":  # which stock refuses together with ignore_index
        options.pop("ignore_index", None)
    target = torch.randint(classes, (rows, *extra), device=device)
    if kind == "probabilities":
        target = torch.rand(rows, classes, *extra, device=device).to(dtype)
    if name == "CrossEntropyLoss":
        theirs, ours = nn.CrossEntropyLoss(**options), fastlm.nn.CrossEntropyLoss(**options)
        leaves = [leaf(rows, classes, *extra, device=device, dtype=dtype)]
    else:
        theirs, ours = pair(name, 4, classes, out_features=extra, device=device, dtype=dtype, **options)
        leaves = [leaf(rows, 4, device=device, dtype=dtype)]

    def call(module, x):
        return module(x, target.to(x.dtype) if target.is_floating_point() else target)

    return theirs, ours, call, leaves


@pytest.mark.parametrize("options", combinations(LOSS))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_cross_entropy_loss(options, dtype, device):
    hold(*loss_case("CrossEntropyLoss", options, device, dtype))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has no LinearCrossEntropyLoss")
@pytest.mark.parametrize("options", combinations([*LOSS, ("bias", True), ("options", "chunked")]))
@pytest.mark.filterwarnings("ignore:linear_cross_entropy")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_linear_cross_entropy_loss(options, dtype, device):
    theirs, ours, call, leaves = loss_case("LinearCrossEntropyLoss", options, device, dtype)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    hold(theirs, ours, call, leaves)


def test_linear_cross_entropy_loss_is_the_loss_of_the_logits(device):
    """Also where torch has no such module: the numbers of F.cross_entropy(F.linear(...))."""
    torch.manual_seed(5)
    linear = nn.Linear(4, 7, device=device)
    torch.manual_seed(5)
    ours = fastlm.nn.LinearCrossEntropyLoss(4, 7, bias=True, device=device)
    assert torch.equal(ours.linear.weight, linear.weight)
    x, target = torch.randn(6, 4, device=device), torch.randint(7, (6,), device=device)
    torch.testing.assert_close(ours(x, target), nn.functional.cross_entropy(linear(x), target))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert torch.equal(copied(x, target), ours(x, target))
    for wrong in ({"weight": torch.ones(3)}, {"label_smoothing": 1.5}):
        with pytest.raises(RuntimeError, match=f"LinearCrossEntropyLoss: {next(iter(wrong))}"):
            fastlm.nn.LinearCrossEntropyLoss(4, 7, **wrong)


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "LinearCrossEntropyLoss"])
def test_loss_compiled(name, device):
    torch._dynamo.reset()
    _, ours, call, leaves = loss_case(name, {}, device, torch.float32) if hasattr(nn, name) else (
        None, fastlm.nn.LinearCrossEntropyLoss(4, 7, device=device),
        lambda m, x: m(x, torch.arange(6, device=device)), [leaf(6, 4, device=device, dtype=torch.float32)])
    expected = run(ours, call, leaves)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, call, leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


# --- torch.jit.trace -------------------------------------------------------------------------------------------


TRACED = {"Linear": ((256, 512), (64, 256)), "RMSNorm": ((256,), (2048, 256)), "LSTMCell": ((256, 256), (4, 256)),
          "GRUCell": ((256, 256), (4, 256)), "LSTM": ((256, 256), (40, 4, 256)), "GRU": ((256, 256), (40, 4, 256)),
          "RNN": ((256, 256), (40, 4, 256)), "one step": ((256, 256), (1, 4, 256)), "few steps": ((3, 5), (10, 2, 3)),
          "TransformerEncoderLayer": ((256, 4), (40, 4, 256))}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", TRACED)
@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of shapes that are compared
def test_traced_by_jit(name, grad):
    """A trace sees torch's operators alone: it holds these, not the numbers that a kernel wrote."""
    args, shape = TRACED[name]
    layer = {"one step": "LSTM", "few steps": "GRU"}.get(name, name)
    module, x = getattr(fastlm.nn, layer)(*args).eval(), torch.randn(shape)
    other = torch.randn(2 * shape[0], *shape[1:])
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, (x,))
        torch.testing.assert_close(tensors(traced(other)), tensors(module(other)))
        assert all(call.ran == "torch" for call in fastlm.explain(torch.jit.trace, module, (x,), check_trace=False))
