"""Softmax: torch.nn's, through fastlm's op."""

import warnings

from torch import Tensor, nn

from fastlm import ops


class Softmax(nn.Softmax):
    """Normalise to probabilities along `dim`, with the argument of `torch.nn.Softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return a tensor of the shape of `input`, which may have any."""
        dim = self.dim
        if dim is None:
            warnings.warn("Softmax without dim is deprecated: pass the dimension that sums to one", stacklevel=2)
            dim = 0 if input.dim() in (0, 1, 3) else 1
        return ops.softmax(input, dim)
