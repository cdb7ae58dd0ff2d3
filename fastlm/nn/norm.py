"""RMSNorm and LayerNorm: torch.nn's, through fastlm's ops, with the residual's addition where one is given."""

from torch import Tensor, nn

from fastlm import ops


class RMSNorm(nn.RMSNorm):
    """Divide by the root mean square over the last dimensions, with the arguments of `torch.nn.RMSNorm`."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the norm of `x` `[*, *normalized_shape]`; with a residual of that shape (norm of the sum, sum)."""
        if residual is None:
            return ops.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return ops.add_rms_norm(x, residual, self.normalized_shape, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Normalise to mean 0 and variance 1 over the last dimensions, with the arguments of `torch.nn.LayerNorm`."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the norm of `input` `[*, *normalized_shape]`; with a residual of that shape (norm of the sum, sum)."""
        if residual is None:
            return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return ops.add_layer_norm(input, residual, self.normalized_shape, self.weight, self.bias, self.eps)
