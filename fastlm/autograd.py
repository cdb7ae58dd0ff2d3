"""Make a pair of kernels one differentiable function: in eager, under functorch and in a compiled graph.

The kernels are registered with `torch.library`, one operator per direction, so that the compiler and
`torch.export` see two opaque nodes. Eager calls go through an `autograd.Function` instead, because operators
that register autograd break `torch.func.grad` and give silently zero forward-mode derivatives. The backward is
itself differentiable: its own backward differentiates the reference.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from fastlm.dispatch import transformed
from fastlm.flops import teach

_library = torch.library.Library("fastlm", "DEF")

ABSENT, FROZEN, NEEDED = -1, 0, 1  # what a slot of an operator's tensors holds


class Differentiable:
    """A forward and a backward kernel that autograd, functorch and the compiler can use.

    Args:
        name: the operators become `fastlm::<name>` and `fastlm::<name>_backward`.
        statics: schema of the arguments that are no tensors, such as "float dropout, bool causal".
        outputs: how many of the tensors that `forward` returns are results; the rest is saved for backward.
        forward: `forward(tensors, needs, *statics) -> list`; `tensors` may hold None, `needs` says whose gradients
            will be asked for; where no gradient is needed it should save nothing.
        fake: the same signature, returns empty tensors of the same shapes, dtypes and strides.
        backward: `backward(grads, saved, tensors, needs, *statics) -> list`: one contiguous gradient for each
            tensor, of its shape and dtype, None where `needs` is False.
        reference: `reference(tensors, *statics) -> sequence`: the results in twice-differentiable PyTorch.
        reads: how many of the results, the first ones, backward needs too; then they come first in its `saved`.
        keep: `keep(tensors, outputs, needs, *statics) -> list`: what backward and `reference` get in place of the
            tensors, to hold less memory until then: an output on which alone the gradients depend, `blank` for a
            tensor on which they do not.
        gradient: `gradient(grads, tensors, needs, *statics) -> list`: the backward in differentiable PyTorch, where
            what is kept is no argument of `reference`.
        borrowed: slot -> `source(grads, found) -> Tensor`: gradients that are upstream's or another slot's tensor,
            which no operator may return; `backward` is not asked for them.
        spends: backward takes one argument more, `spent`: whether nothing will read `saved` again, so that it may
            write into it and return it. Without that, what forward has made as large as a weight exists twice.
            Threads take turns at such a backward, as at nodes of C++.
    """

    def __init__(self, name: str, *, statics: str = "", outputs: int, forward: Callable, fake: Callable,
                 backward: Callable, reference: Callable | None = None, reads: int = 0,
                 keep: Callable | None = None, gradient: Callable | None = None,
                 borrowed: dict[int, Callable] | None = None, spends: bool = False):
        self.name, self.outputs, self.reference, self.gradient = name, outputs, reference, gradient
        self.keep, self.borrowed, self.spends = keep, borrowed or {}, spends
        self.reads = reads
        statics = f", {statics}" if statics else ""

        def run_forward(tensors, slots, *statics):
            return own(forward(_unpack(tensors, slots), [s == NEEDED for s in slots], *statics))

        def run_alone(tensors, *statics):
            return own(forward(tensors, (False,) * len(tensors), *statics))

        def run_backward(grads, saved, tensors, slots, *statics, spent=False):
            unpacked, needs = _unpack(tensors, slots), [s == NEEDED for s in slots]
            found = backward(list(grads), list(saved), unpacked, needs, *statics, *([spent] if spends else []))
            return [t.new_empty(0) if g is None else g.contiguous()
                    for g, t in zip(found, unpacked, strict=True) if t is not None]

        def fake_forward(tensors, slots, *statics):
            return fake(_unpack(tensors, slots), [s == NEEDED for s in slots], *statics)

        def fake_backward(grads, saved, tensors, slots, *statics):
            present = [s for s in slots if s != ABSENT]
            return [t.new_empty(t.shape if s == NEEDED else (0,)) for t, s in zip(tensors, present, strict=True)]

        self.run_alone = _labelled(f"fastlm::{name}", run_alone)
        self.run_forward = _labelled(f"fastlm::{name}", run_forward)
        self.run_backward = _labelled(f"fastlm::{name}_backward", run_backward)
        self.forward_op = _define(name, f"(Tensor[] tensors, int[] slots{statics}) -> Tensor[]",
                                  run_forward, fake_forward)
        self.backward_op = _define(
            f"{name}_backward", f"(Tensor[] grads, Tensor[] saved, Tensor[] tensors, int[] slots{statics}) -> Tensor[]",
            run_backward, fake_backward)
        torch.library.register_autograd(f"fastlm::{name}", self._compiled_backward,
                                        setup_context=self._compiled_setup, lib=_library)

    def __call__(self, tensors: Sequence[Tensor | None], *statics) -> Sequence[Tensor]:
        """Return the results of the forward kernel as a list of `outputs` tensors."""
        present = [t for t in tensors if t is not None]
        if torch.compiler.is_compiling():
            # What is exported may be trained by others: no guard will compare their inputs with today's. Torch 2.11
            # traces `is_exporting()` as True wherever it compiles, so the flag itself is read.
            slots = _slots(tensors, torch.is_grad_enabled(), assume=torch.compiler._is_exporting_flag)
            return self.forward_op(present, slots, *statics)[: self.outputs]
        if transformed():
            return _apply(_Forward, self, _slots(tensors, True, assume=True), statics, *present)[: self.outputs]
        if torch.is_grad_enabled() and any([t.requires_grad for t in present]):
            return _apply(_Forward, self, _slots(tensors, True), statics, *present)[: self.outputs]
        if plain(present):  # the shortest way: a stream calls for every token
            return self.run_alone(tensors, *statics)[: self.outputs]
        return self.watched(self.forward_op, present, _slots(tensors, False), *statics)[: self.outputs]

    def watched(self, op, *args):
        """Call an operator through torch's dispatcher, where modes see it."""
        teach(self)
        return op(*args)

    def kept(self, tensors, outputs, slots, statics):
        """Return what is saved in place of the tensors that are present."""
        if self.keep is None:
            return tensors
        found = self.keep(_unpack(tensors, slots), outputs, [s == NEEDED for s in slots], *statics)
        return [t for t in found if t is not None]

    def saved(self, output):
        """Return what backward gets of what `forward` returned."""
        return *output[: self.reads], *output[self.outputs:]

    def pull(self, grads, saved, tensors, slots, statics, spent=False):
        """Return the gradients of the tensors that are present, themselves differentiable where that is wanted."""
        if any(map(torch._C._functorch.is_legacy_batchedtensor, grads)):
            return _one_by_one(grads, lambda one: self.pull(one, saved, tensors, slots, statics))
        args = self, self.asked(slots), statics, len(grads), len(saved), *grads, *saved, *tensors
        # A transform that has ended leaves its wrappers.
        wrapped = any(map(torch._C._functorch.is_functorch_wrapped_tensor, args[5:]))
        once = not (wrapped or torch.is_grad_enabled() or transformed())
        return self.lend(grads, _Backward.run(*args, spent=spent) if once else _apply(_Backward, *args), slots)

    def lend(self, grads, found, slots):
        """Return the gradients of all tensors that need one, None for the others that are present."""
        places = [i for i, slot in enumerate(slots) if slot != ABSENT]
        found = list(found)
        for i, source in self.borrowed.items():
            if slots[i] == NEEDED:
                found[places.index(i)] = source(grads, found)
        return [g if slots[i] == NEEDED else None for g, i in zip(found, places, strict=True)]

    def asked(self, slots):
        """Return the slots for a backward kernel, which need not make what is borrowed."""
        return [FROZEN if i in self.borrowed and slot == NEEDED else slot for i, slot in enumerate(slots)]

    def _compiled_setup(self, ctx, inputs, output):
        tensors, ctx.slots, *ctx.statics = inputs
        ctx.count = len(tensors)
        ctx.save_for_backward(*self.kept(tensors, output, ctx.slots, ctx.statics), *self.saved(output))
        ctx.results = _kinds(output[: self.outputs])

    def _compiled_backward(self, ctx, grads):
        present = (slot for slot in ctx.slots if slot != ABSENT)
        if any(wanted and slot == FROZEN for wanted, slot in zip(ctx.needs_input_grad[0], present, strict=True)):
            raise RuntimeError(f"fastlm::{self.name}: an input needs a gradient now and needed none when the graph was "
                               "made: export it with gradients enabled")
        kept = ctx.saved_tensors  # once: a checkpoint unpacks them only once
        tensors, saved = kept[: ctx.count], kept[ctx.count:]
        grads = _no_none(grads, ctx.results)
        found = self.backward_op(grads, saved, tensors, self.asked(ctx.slots), *ctx.statics)
        return self.lend(grads, found, ctx.slots), *[None] * (1 + len(ctx.statics))


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(kernels, slots, statics, *tensors):
        if not plain(tensors):
            return tuple(kernels.watched(kernels.forward_op, tensors, slots, *statics))
        return tuple(kernels.run_forward(tensors, slots, *statics))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernels, ctx.slots, ctx.statics, *tensors = inputs
        ctx.set_materialize_grads(False)  # or autograd would make zeros for all that is saved
        ctx.results = _kinds(output[: ctx.kernels.outputs])
        ctx.mark_non_differentiable(*output[ctx.kernels.outputs:])
        kept = ctx.kernels.kept(tensors, output, ctx.slots, ctx.statics)
        ctx.save_for_backward(*kept, *ctx.kernels.saved(output))
        ctx.count = len(tensors)
        if ctx.kernels.spends:
            ctx.turn, ctx.freed, ctx.owned = threading.Lock(), False, _owns_saved()

    @staticmethod
    def backward(ctx, *grads):
        if not ctx.kernels.spends:
            return _Forward.pull(ctx, grads, False)
        with ctx.turn:  # Torch lets threads into a Function together, where one may write what the other reads.
            if ctx.freed:
                raise RuntimeError(f"fastlm::{ctx.kernels.name}: Trying to backward through the graph a second time: "
                                   "specify retain_graph=True the first time")
            ctx.freed = not torch._C._autograd._get_current_graph_task_keep_graph()
            return _Forward.pull(ctx, grads, ctx.freed and ctx.owned)

    @staticmethod
    def pull(ctx, grads, spent):
        kept = ctx.saved_tensors
        tensors, saved = kept[: ctx.count], kept[ctx.count:]
        grads = _no_none(grads, ctx.results)
        return None, None, None, *ctx.kernels.pull(grads, saved, tensors, ctx.slots, ctx.statics, spent)

    @staticmethod
    def vmap(info, in_dims, kernels, slots, statics, *tensors):
        return _loop(info, in_dims[3:], tensors, lambda *one: _Forward.apply(kernels, slots, statics, *one))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _Backward.run(*args, spent=False)  # vmap maps over it with what was saved once

    @staticmethod
    def run(kernels, slots, statics, n_grads, n_saved, *tensors, spent):
        grads, saved, inputs = tensors[:n_grads], tensors[n_grads: n_grads + n_saved], tensors[n_grads + n_saved:]
        if not plain(tensors):  # the compiler's operators must not return what they are given
            return tuple(kernels.watched(kernels.backward_op, grads, saved, inputs, slots, *statics))
        return tuple(kernels.run_backward(grads, saved, inputs, slots, *statics, spent=spent))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernels, ctx.slots, ctx.statics, ctx.n_grads, ctx.n_saved, *tensors = inputs
        ctx.save_for_backward(*tensors[: ctx.n_grads], *tensors[ctx.n_grads + ctx.n_saved:])

    @staticmethod
    def backward(ctx, *cotangents):
        kept = ctx.saved_tensors
        upstream, tensors = kept[: ctx.n_grads], kept[ctx.n_grads:]
        present = [s for s in ctx.slots if s != ABSENT]
        needed = [i for i, s in enumerate(present) if s == NEEDED]

        def merge(inputs):
            merged = list(tensors)
            for i, x in zip(needed, inputs, strict=True):
                merged[i] = x
            return _unpack(merged, ctx.slots)

        def first_order(upstream, *inputs):
            if ctx.kernels.gradient is not None:
                needs = [s == NEEDED for s in ctx.slots]
                return tuple(g for g in ctx.kernels.gradient(upstream, merge(inputs), needs, *ctx.statics)
                             if g is not None)
            return torch.func.vjp(lambda *x: tuple(ctx.kernels.reference(merge(x), *ctx.statics)), *inputs)[1](upstream)

        _, pull = torch.func.vjp(first_order, tuple(upstream), *(tensors[i] for i in needed))
        d_upstream, *d_inputs = pull(tuple(cotangents[i] for i in needed))
        d_tensors = [None] * len(tensors)
        for i, d in zip(needed, d_inputs, strict=True):
            d_tensors[i] = d
        return *[None] * 5, *d_upstream, *[None] * ctx.n_saved, *d_tensors

    @staticmethod
    def vmap(info, in_dims, kernels, slots, statics, n_grads, n_saved, *tensors):
        return _loop(info, in_dims[5:], tensors,
                     lambda *one: _Backward.apply(kernels, slots, statics, n_grads, n_saved, *one))


def _apply(function, *args):
    """Call an autograd.Function without torch's look at the signature of `forward` at each call, which takes 50 µs."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(args))


def _owns_saved():
    """Tell whether nobody else holds what is saved now, as hooks may; a checkpoint's make it again for one use."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is None or getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def blank(tensor: Tensor) -> Tensor:
    """Return zeros of the tensor's shape, dtype and device in the memory of one number."""
    return tensor.new_zeros(()).expand(tensor.shape)


def autocasts(device_type: str) -> bool:
    """Tell whether autocast is on for the device; meta has none. Torch 2.11 can't trace `is_autocast_available`."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast floating tensors, but for float64, to the autocast dtype where autocast is on for the device."""
    if not autocasts(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t is None or not t.is_floating_point() or t.dtype is torch.float64 else t.to(dtype)
                 for t in tensors)


def _define(name, schema, run, fake):
    _library.define(name + schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"fastlm::{name}", fake, lib=_library)
    return getattr(torch.ops.fastlm, name).default


def _one_by_one(grads, pull):
    """Return what `pull` makes of each element of batched gradients (`torch.autograd.grad(is_grads_batched=True)`)."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batched = [torch._C._functorch.is_legacy_batchedtensor(g) for g in grads]
    whole = [torch._remove_batch_dim(g, level, 0, 0) if b else g for g, b in zip(grads, batched, strict=True)]
    count = next(len(g) for g, b in zip(whole, batched, strict=True) if b)
    found = zip(*(pull([g[i] if b else g for g, b in zip(whole, batched, strict=True)]) for i in range(count)),
                strict=True)
    return [None if one[0] is None else torch._add_batch_dim(torch.stack(one), 0, level) for one in found]


def _kinds(results):
    return [(r.shape, r.dtype, r.device) for r in results]


def _no_none(grads, results):
    """Return a gradient for each of the results whose shape, dtype and device are given: zeros where there is none."""
    return [torch.zeros(shape, dtype=dtype, device=device) if g is None else g
            for g, (shape, dtype, device) in zip(grads, results, strict=False)]


def _labelled(label, run):
    """Let the profiler see a kernel that is called without the dispatcher."""
    def labelled(*args, **options):
        if not torch.autograd._profiler_enabled():
            return run(*args, **options)
        with torch.profiler.record_function(label):
            return run(*args, **options)
    return labelled


def _slots(tensors, grad_enabled, assume=False):
    """Say of each tensor whether it is absent, frozen, or needs a gradient, which may also be assumed."""
    return [ABSENT if t is None
            else NEEDED if grad_enabled and t.is_floating_point() and (assume or t.requires_grad)
            else FROZEN for t in tensors]


def _unpack(tensors, slots):
    tensors = iter(tensors)
    return [None if slot == ABSENT else next(tensors) for slot in slots]


def own(tensors) -> list[Tensor]:
    """Return the tensors, views no longer marked as such: autograd forbids to change those in place."""
    return [t.detach() if t._is_view() else t for t in tensors]


def unwatched() -> bool:
    """Tell whether nothing but the numbers is asked of a call on the CPU: one call of C++ may then answer it."""
    return not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or transformed()
                or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled())


def mapped() -> bool:
    """Tell whether torch.func.vmap is active, at any level of the transforms that are."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def plain(tensors) -> bool:
    """Tell whether the tensors hold memory that a kernel can be given (not fake or meta, no subclass or tracer).

    Nor negated lazily, as `z.conj().imag` is: such numbers lie in memory with the wrong sign.
    """
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta and not t.is_neg() for t in tensors
    ) and torch._C._functorch.peek_interpreter_stack() is None


def _loop(info, in_dims, tensors, call):
    """Run `call` on each element of the vmapped batch and stack what it returns."""
    results = [call(*(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)))
               for i in range(info.batch_size)]
    stacked = tuple(torch.stack(r) for r in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
