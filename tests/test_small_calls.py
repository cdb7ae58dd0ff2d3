"""Small calls, which go to stock by a shortcut: they answer, refuse and choose as they would without it."""

import contextlib
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm import dispatch
from fastlm.dispatch import Op
from fastlm.tools.suites import load

SMALL = {
    "gelu": fastlm.ops.gelu, "swiglu": lambda x: fastlm.ops.swiglu(x, x),
    "softmax": lambda x: fastlm.ops.softmax(x, -1),
    "rms_norm": lambda x: fastlm.ops.rms_norm(x, (8,)), "linear": lambda x: fastlm.ops.linear(x, torch.ones(8, 8)),
    "attention": lambda x: fastlm.ops.scaled_dot_product_attention(*[x.view(1, 2, 2, 8)] * 3),
    "cross_entropy": lambda x: fastlm.ops.cross_entropy(x, torch.arange(4)),
    "dropout_add": lambda x: fastlm.ops.dropout_add(x, x, 0.5),
    "cell": fastlm.nn.LSTMCell(8, 4), "layer": lambda x: SMALL_LAYER(x.view(2, 2, 8))[0],
}
SMALL_LAYER = fastlm.nn.LSTM(8, 4)


@pytest.mark.parametrize("call", SMALL.values(), ids=SMALL)
def test_small_calls_end_a_checkpoint(call):
    """Nothing follows the call: a checkpoint's hook raises within it once all that is needed is there."""
    x = torch.randn(4, 8, requires_grad=True)

    def gradient(call):
        torch.manual_seed(0)
        out = call(x)
        return torch.autograd.grad((out[0] if isinstance(out, tuple) else out).sum(), x)[0]

    assert torch.equal(gradient(lambda x: checkpoint(call, x, use_reentrant=False)), gradient(call))


@pytest.mark.parametrize(("call", "error"), [
    (lambda x: fastlm.ops.linear_cross_entropy(x, x, torch.arange(4), labelsmoothing=0), TypeError),
    (lambda x: fastlm.ops.linear_cross_entropy(x, x, torch.arange(4), softcap=0.0), ValueError),
    (lambda x: fastlm.ops.linear_cross_entropy(x, x, torch.arange(4), label_smoothing=-0.1), RuntimeError),
    (lambda x: fastlm.ops.cross_entropy(x, torch.arange(4), label_smoothing=torch.nan), RuntimeError),
    (lambda x: fastlm.ops.dropout_add(x, x, 2, False), ValueError),
    (lambda x: fastlm.ops.rms_norm(x, (8,), torch.ones(8, dtype=torch.int64)), TypeError),
    (lambda x: fastlm.ops.add_rms_norm(x, x.long(), (8,)), TypeError),
    (lambda x: fastlm.nn.LSTMCell(8, 4)(x, (torch.zeros(4, 4).double(), torch.zeros(4, 4))), RuntimeError),
    (lambda x: fastlm.nn.RNN(8, 4)(x[None], torch.zeros(1, 1, 4)), RuntimeError),
    (lambda x: fastlm.nn.LSTM(8, 4)(x[None], (torch.zeros(1, 4, 4), torch.zeros(1, 1, 4))), RuntimeError),
    (lambda x: fastlm.nn.LSTM(8, 4)(x[None], (torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).double())), RuntimeError),
    (lambda x: torch.no_grad()(fastlm.ops.gru)(
        x, x.new_zeros(4, 64), [x.new_zeros(192, 8), x.new_zeros(192, 64)], False, 1, 0.0, False, False, False),
     RuntimeError),
    (lambda x: torch.no_grad()(fastlm.nn.RNNCell(8, 64))(x, [x.new_zeros(4, 64)]), AttributeError),
    (lambda x: torch.no_grad()(fastlm.ops.quantized_linear)(x, x.new_zeros(3, 8).char(), x.new_ones(4)), RuntimeError),
    (lambda x: torch.no_grad()(fastlm.ops.quantized_linear)(x, x.new_zeros(3, 8).char(), x.new_ones(3).double()),
     TypeError),
    (lambda x: torch.no_grad()(fastlm.ops.quantized_linear)(x, x.new_zeros(3, 8).char(), x.new_ones(3), mode="int3"),
     ValueError),
    (lambda x: fastlm.ops.linear_distillation(x, x.new_ones(9, 8), teacher_logits=x.new_ones(1, 9)), ValueError),
    (lambda x: fastlm.ops.linear_distillation(x, x.new_ones(9, 8), teacher_logits=x.new_ones(1, 4, 9)), ValueError),
    (lambda x: fastlm.ops.linear_distillation(x, x.new_ones(9, 8), teacher_logits=x.new_ones(4, 9),
                                              student_bias=x.new_ones(1)), ValueError),
    (lambda x: fastlm.ops.linear_distillation(x, x.new_ones(9, 8), teacher_logits=x.new_ones(4, 9), reduction="all"),
     ValueError),
    (lambda x: fastlm.ops.varlen_attn(*[x.view(4, 2, 4)] * 3, *[torch.tensor([0, 2, 4])] * 2, 1, 2), ValueError),
    (lambda x: fastlm.ops.varlen_attn(*[x.view(4, 2, 4)] * 3, *[torch.tensor([0, 3, 2, 4])] * 2, 3, 3), ValueError),
    (lambda x: fastlm.ops.varlen_attn(*[x.view(4, 2, 4)] * 3, *[torch.tensor([0.0, 4.0])] * 2, 4, 4), RuntimeError),
])
def test_small_calls_are_refused_like_others(call, error):
    with pytest.raises(error):
        call(torch.randn(4, 8))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_a_step_is_refused_as_stock_s(cell):
    """C++ tries a step before anything is checked: what it must not take goes on to the checks."""
    theirs, ours = getattr(torch.nn, cell)(5, 70), getattr(fastlm.nn, cell)(5, 70)
    ours.load_state_dict(theirs.state_dict())
    x, h = torch.randn(1, 3, 5), torch.randn(1, 3, 70)
    state = (lambda h: (h, h)) if cell == "LSTM" else (lambda h: h)
    calls = {"right": (x, state(h)), "features": (x[..., 1:], state(h)), "batch": (x, state(h[:, 1:])),
             "width": (x, state(h[..., 1:])), "layers": (x, state(h.repeat(2, 1, 1))), "dtype": (x.double(), state(h)),
             "a list": (x, [h]), "three": (x, (h, h, h)), "dtype of the state": (x, state(h.double())),
             "a negated view": (torch._neg_view(x), state(torch._neg_view(h))),
             "expanded": (x[:, :1].expand_as(x), state(h)), "a number": (x, 1.0),
             "no batch": (x[:, :0], state(h[:, :0])), "no step": (x[:0], state(h))}
    renamed = {"another input_size": "input_size", "another hidden_size": "hidden_size"}
    for what in (*calls, *renamed):
        args = calls.get(what, calls["right"])
        for module in (theirs, ours):
            module.input_size, module.hidden_size = 5, 70
            if what in renamed:
                setattr(module, renamed[what], 71)
        with torch.no_grad():
            try:
                expected = theirs(*args)
            except Exception as error:
                with pytest.raises(type(error)):
                    ours(*args)
            else:
                torch.testing.assert_close(ours(*args), expected, msg=lambda m, what=what: f"{what}: {m}")



def test_what_has_no_probability_adds_nothing_to_a_small_loss():
    """The shorter sum makes NaN of it and gives way to the definition."""
    x, weight, bias, logits = torch.randn(5, 16), torch.randn(40, 16), torch.randn(40), torch.randn(5, 40)
    logits[:, ::2] = -torch.inf
    masked = bias.masked_fill(torch.arange(40) % 4 == 0, -torch.inf)
    for student_bias in (bias, masked):
        args, found = (x.requires_grad_(), weight.requires_grad_()), []
        for name in ("torch", "reference"):
            with fastlm.backend(name):
                loss = fastlm.ops.linear_distillation(*args, student_bias=student_bias, teacher_logits=logits)
            found.append((loss, *torch.autograd.grad(loss, args)))
        loss = fastlm.ops.linear_distillation(*args, student_bias=student_bias, teacher_logits=logits)
        found.append((loss, *torch.autograd.grad(loss, args)))
        assert all(t.isfinite().all() for t in found[0])
        for other in found[1:]:
            torch.testing.assert_close(found[0], other)


def small_cases():
    for dtype in (torch.float32, torch.bfloat16):
        for case in load("small", "cpu", [dtype]):
            yield pytest.param(case, id=f"{case.name} {case.case} {str(dtype)[6:]}".replace(" ", "_"))


@contextlib.contextmanager
def raised_in_shortcuts():
    """List the exceptions that `at_once` hides."""
    found, outer = [], sys.gettrace()

    def trace(frame, event, what):
        if event == "exception" and frame.f_code.co_name == "call" and frame.f_code.co_filename == dispatch.__file__:
            found.append(what[1])
        return trace

    sys.settrace(trace)
    try:
        yield found
    finally:
        sys.settrace(outer)


def test_what_shortcuts_raise_is_hidden_and_seen_here():
    @dispatch.at_once(lambda x: x.nonsense)
    def same(x):
        return x

    with raised_in_shortcuts() as raised:
        assert same(3) == 3
    assert isinstance(raised[0], AttributeError)


@pytest.mark.parametrize("case", list(small_cases()))
def test_what_is_done_at_once_is_what_would_have_been_chosen(case, monkeypatch):
    subject, chosen, call = case.build(), [], Op.__call__

    def note(op, *args):
        chosen.append(op.name)
        return call(op, *args)

    def again(expected):
        torch.testing.assert_close(subject.ours(*subject.args), expected)

    monkeypatch.setattr(Op, "__call__", note)
    for mode in case.modes:
        for module in subject.modules:
            module.train(mode == "training")
        with torch.set_grad_enabled(mode == "training"):
            chosen.clear()
            with raised_in_shortcuts() as raised:
                found = subject.ours(*subject.args)
            assert not raised, raised  # such a call goes the long way, and nobody would know
            at_once = not chosen
            calls = fastlm.explain(again, found)
        if at_once:  # by torch, or in one call of C++
            kernels = ("lstm", "gru", "rnn", "quantized_linear", "linear")
            assert {c.ran for c in calls if c.op not in kernels} <= {"torch"}, calls
