"""What torch.export makes of ours: for every size, and, where stock's can be exported so, of torch's own operators."""

import pytest
import torch
from torch.export import Dim, export

import fastlm
from fastlm import nn
from fastlm.ops import recurrent_rules


def targets(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def ours(program):
    return sorted(name for name in targets(program) if "fastlm" in name)


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("make", "shape"), [
    (lambda: nn.Linear(512, 512), (300, 512)),
    (lambda: nn.RMSNorm(512), (3000, 512)),
    (lambda: nn.LayerNorm(512), (3000, 512)),
    (lambda: nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True), (8, 64, 128)),
    (lambda: nn.SelfAttention(128, 4, num_kv_heads=2, rope=True), (8, 64, 128)),
], ids=["Linear", "RMSNorm", "LayerNorm", "TransformerEncoderLayer", "SelfAttention"])
def test_dense_layers_become_torch_s_operators_for_every_batch(make, shape, grad):
    module = make()
    with torch.set_grad_enabled(grad):
        program = export(module, (torch.randn(shape),), dynamic_shapes=({0: Dim("batch")},))
        assert not ours(program)
        for batch in (2, shape[0], shape[0] + 1):
            x = torch.randn(batch, *shape[1:])
            torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("hidden", [16, 256])
def test_recurrent_layers_keep_one_operator_for_every_length(cell, hidden):
    """Stock's are unrolled for one length."""
    module = getattr(nn, cell)(hidden, hidden, num_layers=2, bidirectional=True)
    x = torch.randn(20, 4, hidden)
    program = export(module, (x,), dynamic_shapes=({0: Dim("time"), 1: Dim("batch")},))
    exported = program.module()
    for steps, batch in ((2, 2), (20, 4), (33, 5)):
        x = torch.randn(steps, batch, hidden, requires_grad=True)
        found, expected = (first(m(x)) for m in (exported, module))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_become_torch_s_operators_where_that_is_asked(cell):
    module, x = getattr(nn, cell)(64, 64), torch.randn(20, 4, 64)
    with fastlm.backend("torch"):
        program = export(module, (x,))
    assert not ours(program)
    torch.testing.assert_close(first(program.module()(x)), first(module(x)))


def test_what_was_not_measured_here_is_not_exported(monkeypatch):
    monkeypatch.setattr(recurrent_rules, "unmeasured", lambda *args: "not yet measured on this CPU")
    assert not ours(export(nn.GRU(256, 256), (torch.randn(20, 4, 256),)))


def test_backend_asks_for_a_kernel_in_what_is_exported():
    module, x = nn.Linear(512, 512), torch.randn(300, 512)
    try:
        with fastlm.backend("native"):
            program = export(module, (x,))
    except fastlm.CannotRun:
        pytest.skip("the C++ extension is missing")
    assert ours(program) == ["fastlm.linear_native.default"]
