"""What the Triton files share: whether a launch is possible here, and how it is made.

It imports Triton where a kernel file does so for it; `plan` functions return (kernel, grid, arguments), which
tests/test_triton.py compiles without a GPU.
"""

import copy
import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.dispatch import STATIC
from fastlm.ops.gpu import unmeasured
from fastlm.ops.tensors import matmul_precision

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST = 1 << 20
MOST = 1024  # launches that are kept
_launches = {}


def cannot_here(x: Tensor) -> str | None:
    """Return why no kernel can take `x`."""
    if not (x.is_cuda or INTERPRETED):
        return "needs a GPU"
    return None if x.dtype in DTYPES else f"no kernel for {x.dtype}"


def loses(x: Tensor, *rest) -> str | None:
    """Return why a kernel that could run is not the default."""
    return unmeasured(x) if x.is_cuda else "interpreted"


def loses_below(x: Tensor, *rest) -> str | None:
    """Return the same for what only reads and writes: few numbers take the GPU less than Python takes to launch."""
    if x.is_cuda and x.numel() < LEAST:
        return f"below {LEAST} numbers the launch takes longer than the work"
    return loses(x)


def launch(plan: Callable, *args) -> None:
    """Run the (kernel, grid, arguments) of `plan(*args)` on the tensors' device, on PyTorch's current stream there.

    `args` are tensors, numbers, strings, None, and tuples of them. To plan, and Triton's look at every argument, take
    the host longer than many a kernel runs. So a launch is kept, without tensors, for calls that differ in nothing but
    where these lie: `plan` reads metadata only, and its arguments hold no tensors but those that it was given.
    """
    tensors, addresses = [], []
    key = [plan, matmul_precision("cuda")]
    _describe(args, key, tensors, addresses)
    device = tensors[0].get_device()
    key = (device, *key)
    found = _launches.get(key)
    with torch.cuda.device(device):
        if found is None:
            return _first(key, *plan(*_aliases(args, tensors := [])), tensors)
        run, values, places = found
        values = values.copy()
        for place, i, descriptor in places:
            values[place] = addresses[i] if descriptor is None else _moved(descriptor, tensors[i])
        run(*values)


def _describe(args, key, tensors, addresses):
    """Add to `key` what a launch depends on."""
    for x in args:
        kind = type(x)
        if kind in STATIC:
            key.append(x)
        elif issubclass(kind, tuple):
            _describe(x, key, tensors, addresses)
        else:
            at = x.data_ptr()
            tensors.append(x)
            addresses.append(x if INTERPRETED else at)
            key += x.shape, x.stride(), x.dtype, at % 16 == 0


def _aliases(args, tensors):
    """Return `args` with other Python objects for the tensors, of which one may be there twice; list these objects."""
    found = []
    for x in args:
        if isinstance(x, tuple):
            x = getattr(x, "_make", tuple)(_aliases(x, tensors))
        elif type(x) not in STATIC:
            tensors.append(x := x.detach())
        found.append(x)
    return found


def _first(key, kernel, grid, arguments, tensors):
    """Launch a kernel, and keep how."""
    run, values, places = _nothing, [], []
    if all(grid):
        compiled = kernel[grid](**arguments)
        if INTERPRETED:
            run = functools.partial(kernel[grid], **{k: v for k, v in arguments.items() if k not in kernel.arg_names})
        else:
            run = compiled[(*grid, 1, 1)[:3]]
        values = [arguments[name] for name in kernel.arg_names]
        numbers = {id(t): i for i, t in enumerate(tensors)}
        for place, value in enumerate(values):
            if type(value) not in STATIC:
                descriptor = _moved(value, None) if hasattr(value, "base") else None
                places.append((place, numbers[id(value if descriptor is None else value.base)], descriptor))
                values[place] = None
    if len(_launches) == MOST:
        _launches.clear()
    _launches[key] = run, values, places


def _nothing():
    """Run no program."""


def _moved(descriptor, tensor):
    """Return a descriptor of the copy engine for another tensor of the same shape and strides."""
    descriptor = copy.copy(descriptor)
    descriptor.base = tensor
    return descriptor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many blocks can run at once: an H100's number where nothing can be launched."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if device.type == "cpu" else 132


def concurrent(device: torch.device) -> bool:
    """Return whether programs run at the same time, so that one may wait for another: interpreted ones don't."""
    return device.type != "cpu" and not INTERPRETED


@functools.cache
def generation(device: torch.device) -> int:
    """Return ten times the compute capability of a GPU: a Hopper's where nothing can be launched."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return 90


def early(device: torch.device) -> bool:
    """Return whether a kernel can start before the one before it has ended, and wait for that where it has to."""
    return concurrent(device) and generation(device) >= 90


def like(t: Tensor) -> Tensor:
    """Return contiguous memory of the shape and dtype of `t`."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def adjacent(t: Tensor | None) -> Tensor | None:
    """Return `t` with the elements of its last dimension side by side, which costs a copy where they are not."""
    return t if t is None or t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous()
