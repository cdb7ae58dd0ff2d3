"""Let `torch.utils.flop_counter.FlopCounterMode` count our operators: for each, what it counts in the reference.

So a model of ours comes to what stock's does where that is made of products. (Torch 2.13 counts nothing of oneDNN's
LSTM and of SDPA's kernel for the CPU.)
"""

import functools

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def teach(kernels) -> None:
    """Tell the counters that are active what a `Differentiable`'s operators come to.

    Each has its own registry, made when it was; to enter our formulas before would mean to import Triton with it.
    """
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            for op, products in ((kernels.forward_op, _forward), (kernels.backward_op, _backward)):
                registry.setdefault(op._overloadpacket, functools.partial(_count, kernels.reference, products))


def _count(reference, products, *args, out_val):
    """Count on tensors without memory, or where a reference must read values, on what there is."""
    if reference is None:
        return 0  # an op of no products
    # A mode is called below autograd.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        try:
            return products(reference, "meta", *args)
        except RuntimeError:
            return products(reference, args[0][0].device, *args)


def _forward(reference, device, tensors, slots, *statics):
    with torch.no_grad():
        return _run(reference, _leaves(tensors, slots, device), *statics)[1]


def _backward(reference, device, grads, saved, tensors, slots, *statics):
    inputs = _leaves(tensors, slots, device)
    with torch.enable_grad():
        results, _ = _run(reference, inputs, *statics)
    live = [r for r in results if r.requires_grad]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not live or not wanted:
        return 0
    upstream = [torch.empty_like(r) for r in live]
    return _run(torch.autograd.grad, live, wanted, upstream, allow_unused=True)[1]


def _run(function, *args, **options):
    """Return the results, and the operations they took."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        results = function(*args, **options)
    return results, counter.get_total_flops()


def _leaves(tensors, slots, device):
    """Return the tensors by slot: leaves where a gradient is needed (1), None where one is absent (-1)."""
    tensors = iter(tensors)
    return [None if slot < 0 else next(tensors).detach().to(device).requires_grad_(slot == 1) for slot in slots]
