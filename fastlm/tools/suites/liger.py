"""liger-kernel as a baseline on a GPU, where it is installed: its functions with the arguments of our ops."""

import importlib.util
from collections.abc import Callable


def baseline(op: str, args: tuple) -> dict[str, Callable]:
    """Return {"Liger": a function of the op's canonical arguments}, or {} where Liger lacks it or is not installed."""
    if op not in CALLS or importlib.util.find_spec("liger_kernel") is None or not args[0].is_cuda:
        return {}
    from liger_kernel.transformers import functional

    call = CALLS[op](functional, args)
    return {"Liger": call} if call else {}


def _softmax(liger, args):
    plain = len(args) == 2 or args[2:] == (None, 1.0, False)
    return (lambda x, *_: liger.liger_softmax(x)) if plain else None


def _norm(liger, args):
    centred = args[6]
    if centred:
        return lambda x, residual, weight, bias, shape, eps, _: liger.liger_layer_norm(x, weight, bias, eps)
    # In place it would overwrite the upstream gradient.
    return lambda x, residual, weight, bias, shape, eps, _: liger.liger_rms_norm(x, weight, eps, in_place=False)


def _gated(liger, args):
    _, up, kind = args
    found = {"silu": liger.liger_swiglu, "gelu_tanh": liger.liger_geglu}.get(kind) if up is not None else None
    return found and (lambda gate, up, kind: found(gate, up))


def _cross_entropy(liger, args):
    return lambda x, target, *_: liger.liger_cross_entropy(x, target)  # the gradients take the place of the logits


def _linear_cross_entropy(liger, args):
    return lambda x, weight, target, *_: liger.liger_fused_linear_cross_entropy(x, weight, target)


def _distillation(liger, args):
    # beta = 0 is Liger's name of the forward divergence.
    return lambda student, weight, bias, teacher, teacher_weight, *_: liger.liger_fused_linear_jsd(
        student, weight, teacher, teacher_weight, jsd_beta=0.0)


CALLS = {"softmax": _softmax, "rms_norm": _norm, "layer_norm": _norm, "swiglu": _gated, "geglu": _gated,
         "cross_entropy": _cross_entropy, "linear_cross_entropy": _linear_cross_entropy, "distillation": _distillation}
