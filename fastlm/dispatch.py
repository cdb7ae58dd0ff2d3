"""Choose which implementation of an op runs, and say which one and why.

An op has up to five implementations: `reference` (the readable definition), `torch` (the best stock call)
and the fast ones, `triton`, `native` and `blocked`. The fast ones are tried in the order the op names them;
`torch` runs where none of them can, or where each of them is known to lose.
"""

import contextlib
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

NAMES = ("reference", "torch", "triton", "native", "blocked")

STATIC = frozenset({bool, int, float, str, type(None)})
PLAIN = (torch.Tensor, torch.nn.Parameter)  # types whose memory a kernel may read

# Plain module globals: a ContextVar breaks graph capture and a thread-local would be lost in autograd's threads.
_order: tuple[str, ...] = ()
_calls: list["Call"] | None = None


class Call(NamedTuple):
    """What one call of an op did: the implementation that ran, and why each earlier one did not."""

    op: str
    ran: str
    declined: dict[str, str]


class CannotRun(RuntimeError):
    """An implementation was asked for by name (`backend`) and cannot take the call; the message says why."""


class Sample(NamedTuple):
    """Named arguments for an op: what tests check and benchmarks time.

    `name` says which feature or shape it exercises, `args` are the op's positional arguments.
    """

    name: str
    args: tuple


class Implementation(NamedTuple):
    """One way to compute an op. `cannot` and `loses` read metadata only and return a reason or None.

    `at_once`, of C++ alone, is what a shortcut may call before all checks and choices, see `at_once` below.
    """

    run: Callable[..., Any]
    cannot: Callable[..., str | None] = lambda *args: None
    loses: Callable[..., str | None] = lambda *args: None
    accepts: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = ()
    at_once: Callable[..., Any] = lambda *args: None


class Op:
    """One operation: its definition, its implementations, its samples and its cost.

    Args:
        name: what `explain` and the benchmarks call it.
        reference: the definition in plain PyTorch, twice differentiable, exact in float64.
        torch: the best stock call: the fallback and the benchmark's baseline.
        fast: names of the fast implementations, in the order they are tried; `fastlm/ops/<files>_<fast>.py` hold them.
        samples: `samples(scale, dtype, device)` with scale "test" or "bench" yields `Sample`s.
        cost: `cost(*args)` returns (floating-point operations, fewest bytes moved) of one forward pass.
        constants: positions of floating-point arguments that have no gradient in stock PyTorch (class weights).
        compiled: whether benchmarks also compare with the stock call under torch.compile.
        exports: whether `torch.export` runs stock, which it can trace for all sizes: what is exported so runs where
            fastlm is not installed, and goes on to ONNX.
        files: what those files are called, where several ops share them; the op's own name where None.
    """

    def __init__(self, name, *, reference, torch, samples, cost, fast=(), constants=(), compiled=True,
                 exports=True, files=None):
        self.name, self.samples, self.cost = name, samples, cost
        self.constants, self.compiled, self.exports = constants, compiled, exports
        self.implementations = {f: _load(files or name, f) for f in fast}
        self.implementations["torch"] = Implementation(torch)
        self.implementations["reference"] = Implementation(reference)
        self.fast, self.default = tuple(fast), (*fast, "torch")
        self.at_once = self.implementations["native"].at_once if "native" in fast else None

    def __repr__(self):
        return f"Op({self.name!r}: {', '.join(self.implementations)})"

    def __call__(self, *args):
        ran, declined = self.choose(args)
        if _calls is not None:
            _calls.append(Call(self.name, ran, declined))
        return self.implementations[ran].run(*args)

    def choose(self, args) -> tuple[str, dict[str, str]]:
        """Return the implementation that takes this call, and the reasons of those that were asked before it."""
        wanted = [name for name in _order if name in self.implementations] if _order else []
        no_kernels = _mode() or _foreign(args)
        declined = {} if wanted else {name: f"{self.name} has no such implementation" for name in _order}
        for name in wanted or self._default_order():
            implementation = self.implementations[name]
            reason = None if name in ("torch", "reference") else no_kernels
            reason = reason or implementation.cannot(*args)
            if reason is None and not wanted:
                reason = self._loses(name, args)
            if reason is None:
                return name, declined
            declined[name] = reason
        reasons = "; ".join(f"{name}: {reason}" for name, reason in declined.items())
        raise CannotRun(f"{self.name}: backend{tuple(wanted)} was asked for and cannot run: {reasons}")

    def _default_order(self):
        """Return the default order; stock's operators that the compiler does not see into know no transform."""
        return (*self.fast, "reference") if not self.exports and in_graph() and transformed() else self.default

    def _loses(self, name, args):
        # Torch 2.11 traces `is_exporting()` as True wherever it compiles, so the flag itself is read.
        if torch.compiler._is_exporting_flag and self.exports and name != "torch":
            return "torch.export: what is exported holds torch's own operators"
        return self.implementations[name].loses(*args)


def at_once(shortcut: Callable) -> Callable:
    """Let a function try `shortcut` first, for calls so small that to check them and to choose would cost more.

    `shortcut` takes the call as it came and returns the result where checks and choice could end nowhere else, else
    None. What it raises is not shown: the function finds the same, and says it in its own words. `explain`, `backend`,
    the compiler and `torch.jit.trace` see the choice itself.

    >>> @at_once(lambda x: torch.relu(x) if x.numel() < LEAST else None)
    ... def relu(x): ...
    """
    is_compiling, is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
    saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            # A hook on what is saved may raise, as a checkpoint's does when it has seen enough.
            if not _order and _calls is None and not is_compiling() and saving_hooks(True) is None and not is_tracing():
                try:
                    found = shortcut(*args, **kwargs)
                except Exception:
                    found = None
                if found is not None:
                    return found
            return function(*args, **kwargs)
        return call
    return decorate


def assume_constant(function: Callable) -> Callable:
    """Let the compiler call a function while it traces, and keep what that returns in the graph.

    This is `torch.compiler.assume_constant_result`, which would import the compiler.
    """
    function._dynamo_marked_constant = True
    return function


class backend:
    """Context manager: ops that have one of the named implementations must use it, in the order given, or raise.

    Ops that have none of them keep their default order. A measured reason not to run (`loses`) is overridden,
    a hard one (`cannot`) is not. Keep the backward of checkpointed code inside the `with`.

    >>> with fastlm.backend("triton"):
    ...     y = fastlm.ops.softmax(x, -1)
    """

    def __init__(self, *names: str):
        unknown = [name for name in names if name not in NAMES]
        if unknown or not names:
            raise ValueError(f"backend: expected one or more of {', '.join(NAMES)}, got {names}")
        self.names = names
        self.outer = []  # one object may be entered again inside itself

    def __enter__(self):
        global _order
        self.outer.append(_order)
        _order = self.names
        return self

    def __exit__(self, *exc):
        global _order
        _order = self.outer.pop()


def is_default() -> bool:
    """Tell whether no `backend` asks for an implementation by name."""
    return not _order


class Calls(list):
    """A list of `Call`s that prints as a table."""

    compiled = False

    def __str__(self):
        rows = [("op", "ran", "declined")]
        for call in self:
            reasons = [f"{name}: {reason}" for name, reason in call.declined.items()] or ["-"]
            rows += [(call.op, call.ran, reasons[0]), *(("", "", reason) for reason in reasons[1:])]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = ["  ".join((row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2])) for row in rows]
        if not self:
            lines = ["no fastlm op was called"]
        if self.compiled:
            lines.append("A compiled function dispatches while it is traced; explain ran it uncompiled, "
                         "which chooses alike.")
        return "\n".join(lines)

    __repr__ = __str__


def explain(fn: Callable[..., Any], *args, **kwargs) -> Calls:
    """Run `fn(*args, **kwargs)` once and return the `Call` of every fastlm op in it, in order.

    `fn` is anything callable: an op, a module, a training step. Printed, the result is a table.
    """
    global _calls
    outer, _calls = _calls, Calls()
    _calls.compiled = _is_compiled(fn)
    try:
        with _uncompiled():
            fn(*args, **kwargs)
        return _calls
    finally:
        _calls = outer


def traced() -> bool:
    """Tell whether a call is made by the compiler, or by `explain` of what was compiled."""
    return torch.compiler.is_compiling() or (_calls is not None and _calls.compiled)


def note(op: str, ran: str, declined: dict[str, str]) -> None:
    """Tell `explain` of a call that does not go through an Op."""
    if _calls is not None:
        _calls.append(Call(op, ran, declined))


def runs_stock(op: Op, why: str) -> None:
    """Tell `explain` that stock runs in place of an op, and why; raise CannotRun where `backend` asks for others."""
    if "torch" not in _order and any(name in op.implementations for name in _order):
        raise CannotRun(f"{op.name}: backend{_order} was asked for and cannot run: {why}")
    note(op.name, "torch", dict.fromkeys(op.fast, why))


def build_report() -> dict:
    """Return what setup.py wrote about the compiled extension: instruction sets, CUDA, and what is missing."""
    path = Path(__file__).with_name("_build.json")
    if path.exists():
        return json.loads(path.read_text())
    return {"instruction_sets": [], "cuda": None, "skipped": {}, "error": "fastlm was never built: pip install ."}


def _load(files: str, name: str) -> Implementation:
    """Import `fastlm/ops/<files>_<name>.py`; where its requirement is missing, return one that says so."""
    try:
        if name == "triton" and not triton_can_run():
            raise ImportError("this PyTorch has no CUDA (TRITON_INTERPRET=1 interprets kernels on the CPU)")
        module = importlib.import_module(f"fastlm.ops.{files}_{name}")
    except ImportError as error:
        if (error.name or "").startswith("fastlm.") and error.name != "fastlm._native":
            raise  # a fault of ours is no missing requirement
        reason = str(error)
        if name == "native" and "_native" in reason:
            reason = f"the C++ extension is missing: {build_report()['error'] or reason}"
        elif name == "triton" and error.name == "triton":
            reason = "Triton is not installed: pip install triton"
        return Implementation(run=None, cannot=lambda *args: reason)
    return Implementation(module.run, module.cannot, module.loses, frozenset(module.ACCEPTS), module.DTYPES,
                          getattr(module, "at_once", Implementation._field_defaults["at_once"]))


def triton_can_run() -> bool:
    """Tell whether a Triton kernel could be launched by this process, without importing Triton."""
    return torch.version.cuda is not None or os.environ.get("TRITON_INTERPRET") == "1"


def forward_mode() -> str | None:
    """Return why no kernel of ours runs while dual numbers are about (it has no such derivative), else None.

    In a graph the level is read twice: as the compiler knows it, which makes another graph once dual numbers come from
    outside, and as it is within what is traced.
    """
    dual = torch.autograd.forward_ad._current_level >= 0 or _dual()
    return "forward-mode differentiation (jvp, hessian)" if dual else None


def in_graph() -> bool:
    """Tell whether the compiler traces this, but not for an export."""
    return torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag


@assume_constant
def transformed() -> bool:
    """Tell whether a functorch transform or forward-mode differentiation is active, in a graph that is traced too."""
    return torch._C._functorch.peek_interpreter_stack() is not None or _dual()


@assume_constant
def _dual() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def _mode() -> str | None:
    """Return the reason why no kernel of ours runs: dual numbers, or a tracer that would record none of its work."""
    if torch.compiler.is_compiling():
        return forward_mode() or ("a transform of torch.func in a compiled graph" if transformed() else None)
    if torch._C._is_tracing():
        return "torch.jit.trace records torch's own operators alone"
    return forward_mode()


def _foreign(args) -> str | None:
    """Return the reason why no kernel of ours can read the tensors in `args`, which are on one device."""
    first, compiling = None, torch.compiler.is_compiling()
    for arg in args:
        if type(arg) in STATIC:
            continue
        for part in arg if isinstance(arg, list | tuple) else (arg,):
            if not isinstance(part, torch.Tensor):
                continue
            first = part if first is None else first
            if part.layout is not torch.strided or part.is_nested:
                return f"nested, or of layout {part.layout}: kernels read dense tensors"
            if not compiling and type(part) not in PLAIN and hasattr(type(part), "__tensor_flatten__"):
                return f"{type(part).__name__} is made of other tensors (sharded, quantized): it knows torch's ops"
    if first is None:
        return None
    if first.device.type not in ("cpu", "cuda"):
        return f"device {first.device.type}: fastlm has kernels for the CPU and NVIDIA GPUs only"
    return "ROCm: never measured there" if first.is_cuda and torch.version.hip else None


def _is_compiled(fn) -> bool:
    modules = fn.modules() if isinstance(fn, torch.nn.Module) else ()
    return hasattr(fn, "_torchdynamo_orig_callable") or any(
        type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in modules)


def _uncompiled():
    """Run what torch.compile made eagerly; where nothing was ever compiled, do not import the compiler for it."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
