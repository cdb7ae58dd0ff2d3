"""Linear: torch.nn's, through fastlm's op."""

from torch import Tensor, nn

from fastlm import ops


class Linear(nn.Linear):
    """Apply x Wᵀ + b, with the arguments of `torch.nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `[*, out_features]` for `input` `[*, in_features]`."""
        return ops.linear(input, self.weight, self.bias)
