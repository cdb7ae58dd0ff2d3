"""Activations: torch.nn's, and gated units, through fastlm's ops."""

from torch import Tensor, nn

from fastlm import ops


class Softmax(nn.Softmax):
    """Normalise to probabilities along `dim`, with the argument of `torch.nn.Softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return a tensor of the shape of `input`, which may have any."""
        return ops.softmax(input, self.dim)


class LogSoftmax(nn.LogSoftmax):
    """Return the logarithm of the probabilities along `dim`, with the argument of `torch.nn.LogSoftmax`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return a tensor of the shape of `input`, which may have any."""
        return ops.log_softmax(input, self.dim)


class GELU(nn.GELU):
    """Return x Φ(x), with the argument of `torch.nn.GELU`: `approximate` "none" or "tanh"."""

    def forward(self, input: Tensor) -> Tensor:
        """Return a tensor of the shape of `input`, which may have any."""
        return ops.gelu(input, self.approximate)


class SwiGLU(nn.Module):
    """Return silu(gate) ⊙ up, of two tensors or, as `torch.nn.GLU`, of the halves of one.

    Args:
        dim: the dimension that is halved where one tensor is given, the gate first.
    """

    def __init__(self, dim: int = -1):
        super().__init__()
        self.dim = dim

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """Return a tensor of the shape of `gate` and `up`, or where `up` is None of a half of `gate`."""
        return ops.swiglu(*_halves(self, gate, up))

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class GEGLU(nn.Module):
    """Return gelu(gate) ⊙ up, of two tensors or, as `torch.nn.GLU`, of the halves of one.

    Args:
        dim: the dimension that is halved where one tensor is given, the gate first.
        approximate: "none" or "tanh", as in `torch.nn.GELU`.
    """

    def __init__(self, dim: int = -1, approximate: str = "none"):
        super().__init__()
        self.dim, self.approximate = dim, approximate

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """Return a tensor of the shape of `gate` and `up`, or where `up` is None of a half of `gate`."""
        return ops.geglu(*_halves(self, gate, up), self.approximate)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, approximate={self.approximate!r}"


def _halves(module, gate, up):
    if up is not None:
        return gate, up
    if gate.size(module.dim) % 2:
        raise ValueError(f"{type(module).__name__}: dimension {module.dim} of the input has size "
                         f"{gate.size(module.dim)}, expected an even one")
    return gate.chunk(2, module.dim)
