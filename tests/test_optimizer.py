"""The optimizer of a training run: what it clips, and what decays."""

import pytest

from fastlm.training.config import configure
from fastlm.training.train import Trainer, load_data


@pytest.fixture
def make(tmp_path, one_thread):
    path = tmp_path / "text.txt"
    path.write_text("the cat sees a dog.\na dog hears the cat.\n" * 50, encoding="utf-8")

    def trainer(**given):
        config = configure("lstm", data=str(path), steps=12, batch_size=4, seq_len=8, hidden_size=16, vocab_size=50,
                           device="cpu", **given)
        return Trainer(config, load_data(config))

    return trainer


def test_gradients_are_clipped_together(make):
    """The first moments of AdamW are a tenth of the first step's gradients."""
    trainer = make(grad_clip=0.01)
    trainer.step()
    moments = [trainer.optimizer.state[p]["exp_avg"] for p in trainer.model.parameters()]
    assert sum(m.square().sum() for m in moments).sqrt() == pytest.approx(0.001, rel=1e-3)


def test_matrices_alone_decay(make):
    trainer = make(weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in trainer.model.parameters()] == [
        0.3 if p.dim() > 1 else 0.0 for p in trainer.model.parameters()]
    assert set(decay.values()) == {0.0, 0.3}
