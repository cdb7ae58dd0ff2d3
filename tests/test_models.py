"""The three language models: one interface, the same numbers with either kind of layers, and honest sampling."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from fastlm.models import RNNLM, RNNConfig, TransformerConfig, TransformerLM, UnigramConfig, UnigramLM
from fastlm.models.language_model import sample
from fastlm.nn import QuantizedLinear

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 23
NAMES = ("unigram", "rnn", "gru", "lstm", "transformer")
NEURAL = NAMES[1:]


def build(name, layers="fastlm", **given):
    torch.manual_seed(1)
    if name == "unigram":
        model = UnigramLM(UnigramConfig(VOCAB, layers=layers))
        model.count(torch.randint(VOCAB, (500,)))
        return model
    if name == "transformer":
        sizes = dict(hidden_size=16, num_layers=2, num_heads=2, max_seq_len=12) | given
        return TransformerLM(TransformerConfig(VOCAB, layers=layers, **sizes))
    return RNNLM(RNNConfig(VOCAB, cell=name, layers=layers, **dict(hidden_size=16, num_layers=2) | given))


def tokens(batch=3, seq_len=9):
    return torch.randint(VOCAB, (batch, seq_len))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", ["fastlm", "stock"])
def test_interface(name, layers):
    model, x, y = build(name, layers), tokens(), tokens()
    logits = model.logits(x)
    assert logits.shape == (3, 9, VOCAB)
    torch.testing.assert_close(model(x), logits)
    torch.testing.assert_close(model.loss(x, y), F.cross_entropy(logits.flatten(0, 1), y.flatten()))
    out = model.generate(x, 5)
    assert out.shape == (3, 14)
    assert torch.equal(out[:, :9], x)


@pytest.mark.parametrize("name", NEURAL)
@pytest.mark.parametrize("tied", [True, False])
def test_layers_swap(name, tied):
    """The same seed gives the same weights, a state_dict loads both ways, and loss and gradients agree."""
    ours, stock = build(name, tied=tied), build(name, "stock", tied=tied)
    for key, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    stock.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)
    x, y = tokens(), tokens()
    losses = [model.loss(x, y) for model in (ours, stock)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (key, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", NEURAL)
def test_dropout_draws_the_same_masks(name):
    losses = []
    x, y = tokens(), tokens()
    for layers in ("fastlm", "stock"):
        model = build(name, layers, dropout=0.4, num_layers=2 if name == "transformer" else 1)
        torch.manual_seed(5)
        losses.append(model.loss(x, y))
    torch.testing.assert_close(*losses)
    model.eval()
    assert not torch.isclose(model.loss(x, y), losses[0]), "dropout did nothing"


@pytest.mark.parametrize("name", NEURAL)
@pytest.mark.parametrize("layers", ["fastlm", "stock"])
def test_causality(name, layers):
    """A token changes no logits before it, and all after it."""
    model, x = build(name, layers).eval(), tokens()
    changed = x.clone()
    changed[:, 4] = (x[:, 4] + 1) % VOCAB
    before, after = model.logits(x), model.logits(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=1e-5, atol=1e-6)
    assert (before[:, 4:] != after[:, 4:]).any(-1).all()


def test_positions_are_embedded_from_positions():
    """Of equal tokens, only the position tells one from the next; the embedding is not that of the token's id."""
    model = build("transformer").eval()
    logits = model.logits(torch.full((1, 8), 20))  # an id that is no position
    assert len(logits[0].unique(dim=0)) == 8
    model.positions.weight.data.zero_()
    logits = model.logits(torch.full((1, 8), 20))
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits), rtol=1e-4, atol=1e-5)


def test_transformer_refuses_a_long_sequence():
    with pytest.raises(ValueError, match="13 positions, expected at most max_seq_len, 12"):
        build("transformer").logits(tokens(1, 13))


# --- unigram -----------------------------------------------------------------------------------------------------


def test_unigram_counts():
    text = torch.randint(VOCAB, (1000,)) // 2
    model = UnigramLM(UnigramConfig(VOCAB, smoothing=0.5))
    for part in text.split(300):
        model.count(part)
    counts = Counter(text.tolist())
    assert model.counts.tolist() == [counts[i] for i in range(VOCAB)]
    expected = torch.tensor([(counts[i] + 0.5) / (1000 + 0.5 * VOCAB) for i in range(VOCAB)])
    torch.testing.assert_close(model.log_probabilities().exp(), expected)
    torch.testing.assert_close(model.loss(text[None], text[None]), -expected[text].log().mean())
    assert model.logits(text[None]).untyped_storage().nbytes() == 4 * VOCAB


def test_unigram_counts_no_negative_token():
    with pytest.raises(ValueError, match="tokens has -1, expected 0 to 22"):
        build("unigram").count(torch.tensor([3, -1]))


def test_unigram_without_smoothing_is_the_relative_frequency():
    model = UnigramLM(UnigramConfig(4, smoothing=0.0))
    model.count(torch.tensor([[0, 1], [1, 3]]))
    assert model.log_probabilities().exp().tolist() == pytest.approx([0.25, 0.5, 0, 0.25])
    drawn = model.generate(torch.tensor([[0]]), 200)
    assert 2 not in drawn


def test_unigram_refuses_foreign_tokens():
    with pytest.raises(ValueError, match="tokens has 9, expected 0 to 3"):
        UnigramLM(UnigramConfig(4)).count(torch.tensor([0, 9]))


@pytest.mark.parametrize("name", NAMES)
def test_loss_counts_no_ignored_target_and_refuses_foreign_ones(name):
    model, x = build(name).eval(), tokens()
    targets = tokens()
    targets[:, ::2] = -100
    expected = torch.nn.functional.cross_entropy(model.logits(x).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(x, targets), expected)
    for wrong in (-1, VOCAB):
        with pytest.raises(IndexError, match=str(wrong)):
            model.loss(x, torch.full_like(x, wrong))


# --- generation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_the_likeliest_token(name):
    """Token by token from the whole text, also where the Transformer has to forget its beginning."""
    model, x = build(name, **({} if name == "unigram" else {"dropout": 0.5})), tokens(2, 6)
    model.train()
    found = model.generate(x, 10, temperature=0)
    model.eval()
    for t in range(6, 16):
        context = found[:, max(0, t - 12):t] if name == "transformer" else found[:, :t]
        assert torch.equal(model.logits(context)[:, -1].argmax(-1), found[:, t])
    for row in range(2):
        assert torch.equal(model.generate(x[row:row + 1], 10, temperature=0), found[row:row + 1])


def test_a_model_with_quantized_layers_generates():
    model, x = build("transformer", hidden_size=64), tokens(2, 3)
    for module in list(model.blocks.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, torch.nn.Linear):
                setattr(module, name, QuantizedLinear.from_linear(part))
    found = model.eval().generate(x, 9, temperature=0)
    for t in range(3, 12):
        assert torch.equal(model.logits(found[:, :t])[:, -1].argmax(-1), found[:, t])


@pytest.mark.parametrize("name", ["rnn", "lstm", "transformer"])
def test_a_state_may_be_continued_twice(name):
    """As a search does that follows several texts."""
    model = build(name).eval()
    with torch.no_grad():
        _, state = model.step(tokens(2, 3), None)
        ends = [torch.full((2, 1), i) for i in (4, 5, 4)]
        first, other, again = (model.step(end, state) for end in ends)
        torch.testing.assert_close(again[0], first[0])
        assert not torch.allclose(other[0], first[0])
        torch.testing.assert_close(model.step(ends[1], first[1])[0], model.step(ends[1], again[1])[0])


@pytest.mark.parametrize("name", NEURAL)
def test_generation_under_autocast(name):
    model = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(tokens(2, 3), 4).shape == (2, 7)


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_recurrent_models_read_each_token_once(name):
    model, lengths = build(name), []
    model.recurrent.register_forward_hook(lambda module, args, out: lengths.append(args[0].size(1)))
    model.generate(tokens(2, 6), 5)
    assert lengths == [6, 1, 1, 1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_generator_decides(name):
    model, x = build(name), tokens()
    state = torch.get_rng_state()
    draws = [model.generate(x, 12, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was used"


def test_generation_leaves_modes_and_gradients_alone():
    model = build("lstm", dropout=0.3)
    model.train()
    model.recurrent.eval()
    modes = [module.training for module in model.modules()]
    stream = model.stream(tokens(), 3)
    next(stream)
    assert [module.training for module in model.modules()] == modes
    assert not next(stream).requires_grad
    with pytest.raises(ValueError, match="temperature"):
        model.generate(tokens(), 3, temperature=-1)
    assert [module.training for module in model.modules()] == modes


def allowed(logits, top_k, top_p):
    """Return the probabilities that top-k and top-p leave, by their definition."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = {i: logits[i].exp().item() for i in order}
    total, kept, mass = sum(weights.values()), {}, 0.0
    for i in order:
        if top_p is not None and mass >= top_p:
            break
        kept[i] = weights[i]
        mass += weights[i] / total
    return {i: w / sum(kept.values()) for i, w in kept.items()}


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (1, None), (4, None), (99, None), (None, 0.5), (None, 1e-9),
                                              (None, 1.0), (5, 0.7)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_top_k_and_top_p(top_k, top_p, temperature):
    logits = 2 * torch.randn(12)
    draws = sample(logits.expand(20_000, -1), temperature, top_k, top_p, torch.Generator().manual_seed(0))
    shares = {i: n / len(draws) for i, n in Counter(draws.tolist()).items()}
    expected = allowed(logits / temperature, top_k, top_p)
    assert set(shares) <= set(expected)
    for i, share in expected.items():  # five standard deviations
        assert abs(shares.get(i, 0) - share) <= 5 * (share * (1 - share) / len(draws)) ** 0.5 + 1e-9


@pytest.mark.parametrize("temperature", [1e-40, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.randn(50, VOCAB)
    assert torch.equal(sample(logits, temperature), logits.argmax(-1))


@pytest.mark.parametrize(("given", "message"), [
    ({"temperature": -0.1}, "temperature is -0.1, expected 0 or more"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_k": 0}, "top_k is 0, expected a whole number"),
    ({"top_k": 2.5}, "top_k is 2.5, expected a whole number"),
    ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ({"prompt": torch.tensor([[0, VOCAB]])}, "prompt has tokens 0 to 23, expected 0 to 22"),
    ({"prompt": torch.empty(1, 0, dtype=torch.int64)}, "prompt is empty"),
    ({"prompt": torch.tensor([1, 2])}, r"tokens is torch.int64\[2\], expected int64 \[B, T\]"),
    ({"prompt": torch.rand(1, 2)}, "tokens is torch.float32"),
])
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        build("lstm").generate(**{"prompt": torch.tensor([[0, 1]]), "max_new_tokens": 2} | given)


@pytest.mark.parametrize("name", NAMES)
def test_no_sequences(name):
    assert build(name).generate(torch.empty(0, 3, dtype=torch.int64), 2).shape == (0, 5)


@pytest.mark.parametrize(("model", "config"), [
    (UnigramLM, UnigramConfig), (RNNLM, RNNConfig), (TransformerLM, TransformerConfig)])
def test_what_is_no_configuration_is_a_type_error_that_names_it(model, config):
    with pytest.raises(TypeError, match=rf"^{model.__name__}: config is int, expected {config.__name__}: "):
        model(1000)


def test_bad_configurations():
    with pytest.raises(ValueError, match="layers is 'slow', expected one of fastlm, stock"):
        build("lstm", "slow")
    with pytest.raises(ValueError, match="cell is 'elman', expected one of rnn, gru, lstm"):
        RNNLM(RNNConfig(VOCAB, cell="elman"))
    with pytest.raises(ValueError, match="hidden_size is 10, expected a multiple of num_heads, 4"):
        TransformerLM(TransformerConfig(VOCAB, hidden_size=10, num_heads=4))
    with pytest.raises(ValueError, match="RNNLM: num_layers is 0, expected a whole number"):
        RNNLM(RNNConfig(VOCAB, num_layers=0))
    with pytest.raises(ValueError, match=r"TransformerLM: max_seq_len is 1\.5, expected a whole number"):
        TransformerLM(TransformerConfig(VOCAB, max_seq_len=1.5))
    for smoothing in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^UnigramLM: smoothing is {smoothing}, expected 0 or more$"):
            UnigramLM(UnigramConfig(VOCAB, smoothing=smoothing))
    with pytest.raises(ValueError, match=r"targets is torch.int64\[3, 8\], expected int64 \[3, 9\]"):
        build("gru").loss(tokens(), tokens(3, 8))
