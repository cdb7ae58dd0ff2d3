"""Softmax: torch.nn's, through fastlm's op."""

from torch import Tensor, nn

from fastlm import ops


class Softmax(nn.Softmax):
    """Normalise to probabilities along `dim`, with the argument of `torch.nn.Softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return a tensor of the shape of `input`, which may have any."""
        return ops.softmax(input, self.dim)
