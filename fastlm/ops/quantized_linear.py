"""quantized_linear(x) = x·Ŵᵀ + b, where Ŵ is kept as integers of 8 or 4 bits and float32 scales.

With round to the nearest even integer and s = max|w| / most over the values that share a scale:

    int8          Ŵ[n, k] = s[n]·q[n, k], most = 127: one scale for each output
    int8_dynamic  the same Ŵ, and x̂[m, k] = t[m]·p[m, k] for x, t[m] = max_k|x[m, k]| / 127 when it is called
    int4          Ŵ[n, k] = s[n, k // group_size]·q[n, k], most = 7: one scale for each group of inputs

Rounding moves a value by at most half a scale, so that the distance to the product with the weight itself is at most

    int8          Σ_k |x[k]|·s[n] / 2
    int8_dynamic  Σ_k |x[k]|·s[n] / 2  +  Σ_k |Ŵ[n, k]|·t / 2
    int4          Σ_k |x[k]|·s[n, k // group_size] / 2

and `error_bound` adds what floating point may add to that. The gradient of x is that of x·Ŵᵀ: rounding x counts as
the identity. Weight and scale have none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.autograd import Differentiable, autocast, autocasts
from fastlm.dispatch import Op, Sample, at_once, forward_mode, in_graph, transformed
from fastlm.ops.tensors import FLOATS, accumulator, check_tensors

MODES = ("int8", "int8_dynamic", "int4")
GROUP_SIZES = (32, 64, 128)
CHUNK = 1 << 20  # values of the weight that are dequantized at a time: they stay in cache


@at_once(lambda input, weight, scale, bias=None, *, mode="int8", group_size=64:
         op.at_once(input, weight, scale, bias, mode, group_size))
def quantized_linear(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, mode: str = "int8",
                     group_size: int = 64) -> Tensor:
    """Compute `linear(input, Ŵ, bias)` with a weight from `quantize_weight`.

    Args:
        input: `[..., K]`, float32, bfloat16, float16 or float64.
        weight: int8 `[N, K]`, or for "int4" uint8 `[N, ceil(K / 2)]`: byte j holds k = 2j in its low four bits and
            k = 2j + 1 in its high ones, each as q + 8.
        scale: float32 `[N]`, or for "int4" `[N, ceil(K / group_size)]`. It has no gradient.
        bias: `[N]`, floating point.
        mode: "int8", "int8_dynamic" (rows of `input` are rounded to 8 bits too) or "int4".
        group_size: for "int4", how many inputs share a scale: 32, 64 or 128.

    Returns:
        `[..., N]` in the dtype of `input`; under autocast in autocast's. NaN and infinity spread as in the product
        with Ŵ, but that "int8_dynamic" makes NaN of a row that has either.

    Raises:
        TypeError: an argument that is no tensor, or of another dtype.
        RuntimeError: shapes or devices that do not fit together.
        ValueError: an unknown mode or group_size.
    """
    _check(input, weight, scale, bias, mode, group_size)
    (input,) = autocast(input.device.type, input)
    y = op(input.reshape(-1, input.shape[-1]), weight, scale.detach(), None if bias is None else bias.to(input.dtype),
           mode, group_size)
    return y.reshape(*input.shape[:-1], y.shape[-1])


def quantize_weight(weight: Tensor, *, mode: str = "int8", group_size: int = 64) -> tuple[Tensor, Tensor]:
    """Return the integers and float32 scales that `quantized_linear` takes for a weight `[N, K]`.

    A scale is never below the smallest normal float32, so a row or group of zeros stays zero. Values that share a
    scale with NaN or infinity become NaN.
    """
    _check_mode(mode, group_size)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise TypeError(f"quantize_weight: weight must be a floating-point tensor [N, K], got {_describe(weight)}")
    weight = weight.detach().float()
    if mode != "int4":
        values, scale = round_rows(weight)
        return values.to(torch.int8), scale.squeeze(1)
    rows, inputs = weight.shape
    groups = -(-inputs // group_size)
    padded = F.pad(weight, (0, groups * group_size - inputs)).view(rows * groups, group_size)
    values, scale = round_rows(padded, most=7)
    values = (values.view(rows, -1)[:, : inputs + inputs % 2] + 8).to(torch.uint8)
    return values[:, ::2] | values[:, 1::2] << 4, scale.view(rows, groups)


def round_rows(x: Tensor, most: int = 127) -> tuple[Tensor, Tensor]:
    """Return each row of x `[M, K]` as whole numbers up to `most`, in x's dtype, and its scale `[M, 1]`."""
    if x.shape[1] == 0:
        return x, x.new_full((x.shape[0], 1), torch.finfo(torch.float32).tiny)
    scale = (x.abs().amax(1, keepdim=True) / most).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).round().nan_to_num(nan=0), scale.where(scale.isfinite(), torch.nan)


def dequantize_weight(weight: Tensor, scale: Tensor, in_features: int, *, mode: str = "int8", group_size: int = 64,
                      dtype: torch.dtype = torch.float32) -> Tensor:
    """Return Ŵ `[N, in_features]`."""
    if mode != "int4":
        return weight.to(dtype) * scale.to(dtype)[:, None]
    values = torch.stack((weight & 15, weight >> 4), -1).flatten(1)[:, :in_features].to(dtype) - 8
    groups = F.pad(values, (0, -in_features % group_size)).unflatten(1, (scale.shape[1], -1))
    return (groups * scale.to(dtype)[..., None]).flatten(1)[:, :in_features]


def error_bound(input: Tensor, weight: Tensor, scale: Tensor, *, mode: str = "int8", group_size: int = 64) -> Tensor:
    """Bound |quantized_linear(input, …) - input·Wᵀ| for the W `[N, K]` that was quantized, without bias.

    Args:
        input: `[M, K]`, finite, in the dtype of the call.

    Returns:
        `[M, N]` float64. To the bounds at the top of this file it adds (K + 8)·2⁻²³·Σ_k |x[k]·Ŵ[n, k]|, for scales and
        sums in float32 in any order, and the rounding of y to the dtype of `input`.
    """
    x, inputs = input.double(), input.shape[1]
    options = dict(mode=mode, group_size=group_size)
    dequantized = dequantize_weight(weight, scale, inputs, dtype=torch.float64, **options).abs()
    half = (scale.double()[:, None] if mode != "int4" else
            scale.double().repeat_interleave(group_size, 1)[:, :inputs]).expand_as(dequantized) / 2
    total = x.abs() @ dequantized.T
    bound = x.abs() @ half.T
    if mode == "int8_dynamic":
        row = round_rows(input.float())[1].double() / 2
        bound = bound + row * dequantized.sum(1)
        total = total + row * dequantized.sum(1)
    bound = bound + (inputs + 8) * 2.0**-23 * total
    return bound + 2 * torch.finfo(input.dtype).eps * (total + bound)


def _check_mode(mode, group_size):
    if mode not in MODES:
        raise ValueError(f"quantized_linear: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "int4" and group_size not in GROUP_SIZES:
        raise ValueError(f"quantized_linear: group_size must be 32, 64 or 128, got {group_size!r}")


def _check(input, weight, scale, bias, mode, group_size):
    _check_mode(mode, group_size)
    integer = torch.uint8 if mode == "int4" else torch.int8
    dtypes = dict(input=FLOATS, weight=(integer,), scale=(torch.float32,), bias=FLOATS)
    for name, tensor in zip(dtypes, (input, weight, scale, bias), strict=True):
        if name == "bias" and tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes[name]:
            wanted = " or ".join(str(d)[6:] for d in dtypes[name])
            raise TypeError(f"quantized_linear: {name} must be a {wanted} tensor, got {_describe(tensor)}")
    check_tensors("quantized_linear", dict(input=input, weight=weight, scale=scale, bias=bias), ("bias",))
    if input.dim() == 0 or weight.dim() != 2:
        raise RuntimeError("quantized_linear: expected input [..., K] and weight of two dimensions, "
                           f"got {list(input.shape)} and {list(weight.shape)}")
    inputs, outputs = input.shape[-1], weight.shape[0]
    shapes = dict(weight=(weight, [outputs, -(-inputs // 2) if mode == "int4" else inputs]),
                  scale=(scale, [outputs, -(-inputs // group_size)] if mode == "int4" else [outputs]),
                  bias=(bias, [outputs]))
    for name, (tensor, expected) in shapes.items():
        if tensor is not None and list(tensor.shape) != expected:
            raise RuntimeError(f"quantized_linear: {name} has shape {list(tensor.shape)}, expected {expected} "
                               f"for input {list(input.shape)} in mode {mode}")


def _describe(x):
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def reference(x, weight, scale, bias, mode, group_size):
    exact = accumulator(x.dtype)
    y = x.to(exact)
    if mode == "int8_dynamic":
        values, row_scale = round_rows(y.detach())
        y = values * row_scale + (y - y.detach())  # rounded, with the gradient of what was rounded
    y = y @ dequantize_weight(weight, scale, x.shape[1], mode=mode, group_size=group_size, dtype=exact).T
    return (y if bias is None else y + bias.to(exact)).to(x.dtype)


def forward(tensors, needs, mode, group_size):
    """Run the best of stock PyTorch: a kernel for integers where there is one, else dequantize and multiply."""
    x, weight, scale, bias = tensors
    if autocasts(x.device.type):  # which would round the dequantized weight to 16 bits
        with torch.autocast(x.device.type, enabled=False):
            return forward(tensors, needs, mode, group_size)
    if x.dtype is torch.float64 or not x.numel() or not weight.numel():
        return [reference(x, weight, scale, bias, mode, group_size)]
    kernel = stock_kernel(x, weight, mode)
    if kernel == "_int_mm":
        values, row_scale = round_rows(x.float())
        y = torch._int_mm(values.to(torch.int8), weight.t()).float().mul_(row_scale).mul_(scale)
    elif kernel == "_weight_int8pack_mm":  # the scales, in x's 16 bits, would cost accuracy
        y = torch._weight_int8pack_mm(_aligned(x), _aligned(weight), torch.ones_like(scale, dtype=x.dtype))
        y = y.float().mul_(scale)
    else:
        return [reference(x, weight, scale, bias, mode, group_size)]
    return [(y if bias is None else y.add_(bias)).to(x.dtype)]


def _aligned(t):
    """Return a contiguous tensor where that kernel, which dies elsewhere, can read it."""
    t = t.contiguous()
    return t if t.data_ptr() % 64 == 0 else t.clone()


def stock_kernel(x, weight, mode) -> str:
    """Name what stock PyTorch has for a call: "_int_mm", "_weight_int8pack_mm" or "linear" on the dequantized weight.

    On the CPU `_weight_int8pack_mm` dies in bfloat16 where K is no multiple of 16 and is 12 to 45 times slower in
    float32. The other kernels for integers want a packed weight, which would have to be made at each call:
    benchmarks/LOG.md 2026-11-23.
    """
    if mode == "int8_dynamic":
        multiple_of_8 = all(size % 8 == 0 for size in weight.shape)
        return "_int_mm" if not x.is_cuda or (x.shape[0] > 16 and multiple_of_8) else "linear"
    most_rows = {torch.bfloat16: 256, torch.float32: 1}.get(x.dtype, 0)  # unscaled sums would overflow float16
    if mode == "int8" and not x.is_cuda and x.shape[1] % 16 == 0 and x.shape[0] <= most_rows:
        return "_weight_int8pack_mm"
    return "linear"


def backward(grads, saved, tensors, needs, mode, group_size):
    """Compute the gradients of x and bias, dequantizing some rows of the weight at a time."""
    (dy,), (x, weight, scale, _) = grads, tensors
    dx = None
    if needs[0]:
        exact = accumulator(x.dtype)
        dx = torch.zeros(x.shape, dtype=exact, device=x.device)
        step = max(CHUNK // max(x.shape[1], 1), 1)
        for dy_part, *part in zip(dy.split(step, 1), weight.split(step), scale.split(step), strict=True):
            dx.addmm_(dy_part.to(exact), dequantize_weight(*part, x.shape[1], mode=mode, group_size=group_size,
                                                           dtype=exact))
        dx = dx.to(x.dtype)
    return [dx, None, None, dy.sum(0) if needs[3] else None]


def fake(tensors, needs, mode, group_size):
    x, weight, *_ = tensors
    return [x.new_empty(x.shape[0], weight.shape[0])]


def _reference(tensors, mode, group_size):
    return (reference(*tensors, mode, group_size),)


def differentiable(name, forward) -> Differentiable:
    """Make a forward kernel of (x, weight, scale, bias) and the shared backward one differentiable operator."""
    return Differentiable(name, statics="str mode, int group_size", outputs=1, forward=forward, fake=fake,
                          backward=backward, reference=_reference)


_stock = differentiable("quantized_linear_stock", forward)


def stock(x, weight, scale, bias, mode, group_size):
    if forward_mode() or (in_graph() and transformed()):
        return reference(x, weight, scale, bias, mode, group_size)
    return _stock((x, weight, scale, bias), mode, group_size)[0]


def samples(scale: str, dtype: torch.dtype, device: str):
    def sample(name, rows, inputs, outputs, mode, group_size=64, bias=True, x=None):
        weight = torch.randn(outputs, inputs, device="cpu" if device == "meta" else device)
        packed, scales = (t.to(device) for t in quantize_weight(weight, mode=mode, group_size=group_size))
        x = torch.randn(rows, inputs, device=device) if x is None else x
        b = torch.randn(outputs, device=device).to(dtype) if bias else None
        return Sample(name, (x.to(dtype), packed, scales, b, mode, group_size))

    if scale == "bench":
        for mode in MODES:
            for rows in (1, 16, 256):
                yield sample(f"{mode} {rows}x4096x4096", rows, 4096, 4096, mode, bias=False)
            if torch.device(device).type == "cuda":  # a token of a model of 70 billion: much longer than a launch
                yield sample(f"{mode} 1x8192x28672", 1, 8192, 28672, mode, bias=False)
        return
    for mode in MODES:
        yield sample(f"{mode} one row", 1, 256, 96, mode)
        yield sample(f"{mode} rows", 19, 256, 64, mode, bias=False)
        yield sample(f"{mode} odd sizes", 9, 333, 71, mode)
        yield sample(f"{mode} one output", 3, 65, 1, mode)
        yield sample(f"{mode} no rows", 0, 64, 8, mode)
    for group_size in (32, 128):
        yield sample(f"groups of {group_size}", 5, 300, 33, "int4", group_size)
    for mode in MODES:
        outliers = torch.randn(4, 200, device=device)
        outliers[:, 3] *= 100
        yield sample(f"{mode} outliers", 4, 200, 32, mode, x=outliers)
        yield sample(f"{mode} transposed", 7, 64, 16, mode, x=torch.randn(64, 7, device=device).t())


def cost(x, weight, scale, bias, mode, group_size) -> tuple[int, int]:
    rows, outputs = x.shape[0], weight.shape[0]
    moved = weight.numel() + 4 * scale.numel() + (x.numel() + rows * outputs) * x.element_size()
    return 2 * x.numel() * outputs, moved


op = Op("quantized_linear", reference=reference, torch=stock, fast=("triton", "native"), samples=samples, cost=cost,
        constants=(2,))
