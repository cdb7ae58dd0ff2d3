"""The recurrent language model: embedding → RNN, GRU or LSTM → softmax(W·h + b).

Mikolov et al., "Recurrent neural network based language model" (2010); dropout between layers only, as in
Zaremba et al., "Recurrent Neural Network Regularization" (2014).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.models.language_model import LanguageModel, check_config, check_sizes, namespace

CELLS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}


@dataclass
class RNNConfig:
    """Sizes of an RNNLM. `tied` makes the embedding the head's weight; embeddings are `hidden_size` wide."""

    vocab_size: int
    cell: str = "lstm"
    hidden_size: int = 256
    num_layers: int = 1
    dropout: float = 0.0
    tied: bool = True
    layers: str = "fastlm"


class RNNLM(LanguageModel):
    """Predict the next token from a hidden state that has read all tokens before it."""

    def __init__(self, config: RNNConfig):
        super().__init__()
        check_config("RNNLM", config, RNNConfig)
        if config.cell not in CELLS:
            raise ValueError(f"RNNLM: cell is {config.cell!r}, expected one of {', '.join(CELLS)}")
        check_sizes("RNNLM", vocab_size=config.vocab_size, hidden_size=config.hidden_size,
                    num_layers=config.num_layers)
        self.config = config
        self.embedding = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        torch.nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.dropout = torch.nn.Dropout(config.dropout)
        recurrent = getattr(namespace(config.layers), CELLS[config.cell])
        # Dropout inside the layer lies between its layers, so a single one must not have any.
        self.recurrent = recurrent(config.hidden_size, config.hidden_size, config.num_layers, batch_first=True,
                                   dropout=config.dropout if config.num_layers > 1 else 0.0)
        self.make_head(self.embedding, config.tied)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self._read(tokens, None)[0]

    def step(self, tokens: Tensor, state) -> tuple[Tensor, object]:
        hidden, state = self._read(tokens, state)
        return self.linear(hidden[:, -1], self.head_weight, self.head_bias), state

    def _read(self, tokens, state):
        hidden, state = self.recurrent(self.dropout(self.embedding(tokens)), state)
        return self.dropout(hidden), state
