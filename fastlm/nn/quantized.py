"""QuantizedLinear: a linear layer whose weight is kept in 8 or 4 bits."""

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.ops.quantized_linear import quantize_weight


class QuantizedLinear(nn.Module):
    """Apply `x·Ŵᵀ + b` with a frozen weight of 8 or 4 bits; how far that is from `nn.Linear`: ops/quantized_linear.py.

    `state_dict` holds `weight` (integers), `scale` (float32) and `bias` in the layout that `ops.quantized_linear`
    documents, whatever the device. Gradients reach the input and the bias. `.half()` and the like leave scale as it is.

    Args:
        in_features: K.
        out_features: N.
        bias: add a bias `[N]`.
        mode: "int8", "int8_dynamic" or "int4".
        group_size: for "int4", inputs that share a scale: 32, 64 or 128.
        dtype: of the bias.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, mode: str = "int8",
                 group_size: int = 64, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.mode, self.group_size = in_features, out_features, mode, group_size
        zeros = torch.zeros(out_features, in_features, device=device)
        weight, scale = quantize_weight(zeros, mode=mode, group_size=group_size)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, mode: str = "int8", group_size: int = 64) -> "QuantizedLinear":
        """Quantize the weight of a linear layer and copy its bias.

        Raises:
            TypeError: `linear` is no nn.Linear.
            ValueError: an unknown mode or group_size.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"QuantizedLinear.from_linear: linear must be an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight.detach()
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, mode=mode, group_size=group_size,
                   device=weight.device, dtype=weight.dtype)
        made.weight, made.scale = quantize_weight(weight, mode=mode, group_size=group_size)
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        return made.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return `[..., out_features]` for an input `[..., in_features]`, in its dtype or autocast's.

        Raises:
            RuntimeError: the input has other than `in_features` features.
        """
        if input.shape[-1:] != (self.in_features,):  # a byte of int4 holds two: the weight's shape alone does not tell
            shape = list(input.shape)
            raise RuntimeError(f"QuantizedLinear: input has shape {shape}, expected {self.in_features} features")
        return ops.quantized_linear(input, self.weight, self.scale, self.bias, mode=self.mode,
                                    group_size=self.group_size)

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype is not scale.dtype:  # rounding the scales would change every weight
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.mode == "int4" else ""
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"mode={self.mode}{group}")
