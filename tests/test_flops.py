"""FlopCounterMode over our operators: what it counts in the reference, and over a model what it counts over stock's."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm import measure
from fastlm.models import RNNLM, RNNConfig, TransformerConfig, TransformerLM
from fastlm.ops import ALL

PRODUCTS = ("attention", "varlen_attn", "linear_cross_entropy", "distillation", "lstm", "gru", "rnn", "linear",
            "quantized_linear", "rms_norm")


def count(run, *args, **options):
    with FlopCounterMode(display=False) as counter:
        run(*args, **options)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["native", "blocked"])
@pytest.mark.parametrize("op", [op for op in ALL if op.name in PRODUCTS], ids=lambda op: op.name)
def test_operators_count_as_their_reference(op, name):
    """Every third sample, forward and backward, with and without gradients."""
    if name not in op.implementations or op.implementations[name].run is None:
        pytest.skip("no such implementation")
    for sample in list(op.samples("test", torch.float32, "cpu"))[::3]:
        found = {}
        if op.implementations[name].cannot(*sample.args):
            continue
        for variant in (name, "reference"):
            with fastlm.backend(variant):
                found[variant] = [count(op, *sample.args),
                                  count(measure.differentiate, op, sample.args, constants=op.constants)]
        assert found[name] == found["reference"], sample.name


def test_a_backward_alone():
    pytest.importorskip("fastlm._native")
    x, w = torch.randn(30, 20, requires_grad=True), torch.randn(9, 20)
    with fastlm.backend("native"):
        y = fastlm.ops.linear(x, w).sum()
    assert count(y.backward) == 2 * 30 * 20 * 9


@pytest.mark.parametrize("name", ["rnn", "gru", "transformer"])
def test_a_model_counts_as_stock(name):
    """Stock's attention by its formula: torch counts nothing of SDPA's kernel for the CPU."""
    pytest.importorskip("fastlm._native")
    tokens = torch.arange(40).view(2, 20)

    def total(layers, *backend):
        sizes = dict(vocab_size=70, hidden_size=32, num_layers=2, layers=layers)
        model = TransformerLM(TransformerConfig(**sizes, num_heads=2)) if name == "transformer" else RNNLM(
            RNNConfig(**sizes, cell=name))
        with fastlm.backend(*backend), sdpa_kernel(SDPBackend.MATH):
            return count(lambda: model.loss(tokens[:, :-1], tokens[:, 1:]).backward())

    assert total("fastlm", "native") == total("stock", "torch") > 0
