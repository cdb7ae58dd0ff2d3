"""What `fastlm bench` measures: a file here is a suite and yields its cases; those with goals name what to reach.

`ops`, `modules` and `models` (whose training `bench.curves` compares) cover everything there is. The others hold one
family to the figures that the project set itself, shape by shape. `head` takes in quantized.py; liger.py is a baseline.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

import fastlm
from fastlm import measure
from fastlm.dispatch import Op
from fastlm.ops import ALL
from fastlm.tools.suites import liger

EVERYTHING = ("ops", "modules", "models")
FAMILIES = ("rnn-cpu", "rnn-cuda", "norms", "attention", "head", "small")
SUITES = EVERYTHING + FAMILIES
OPS = {op.name: op for op in ALL}


@dataclass(frozen=True)
class Goal:
    """What one row is to reach.

    Attributes:
        ratio: the best stock baseline's time over ours, at least.
        memory: our peak memory over eager stock's, at most.
        slack: seconds that we may take longer than stock whatever the ratio.
        share: of what the machine can do (`Subject.floor` over our time), at least.
        allowance: bytes that do not count as ours (a float32 gradient of a bfloat16 weight).
        means: name of a group of rows -> geometric mean of their ratios to reach.
    """

    ratio: float | None = None
    slack: float = 0.0
    memory: float | None = None
    share: float | None = None
    allowance: int = 0
    means: dict[str, float] = field(default_factory=dict)


@dataclass
class Subject:
    """Inputs, and functions of them that are compared.

    Attributes:
        args: a nest of tensors and other values.
        ours: called as `ours(*args)`; differentiable.
        baselines: name -> stock function of the same arguments; "torch" is eager PyTorch.
        errors: called with what ran, returns the errors of results and gradients (`measure.errors`).
        constants: positions of floating-point arguments without a gradient.
        floor: returns the fewest seconds that the machine could take for a forward pass.
        training_floor: the same for forward and backward; three times `floor` where None.
        products: the floor is the arithmetic of products: rows with a share of it to reach are held to a large product
            that is timed in turn with them, because a shared machine has another peak a minute later.
        reads: bytes that one call must read, where reading is what takes the time.
        modules: put into training mode or out of it before each measurement.
        compiled: whether stock under torch.compile is worth a comparison.
        whole: ours is a public function with all that it does around stock's, and timed where stock runs in it too.
        warm: touches the code and the thread pools of "ours" or "torch" on inputs too small to count, before memory
            is measured.
    """

    args: tuple
    ours: Callable
    baselines: dict[str, Callable]
    errors: Callable[[str], list[measure.Error]]
    constants: tuple[int, ...] = ()
    floor: Callable[[], float] | None = None
    training_floor: Callable[[], float] | None = None
    products: bool = False
    reads: int | None = None
    modules: tuple[torch.nn.Module, ...] = ()
    compiled: bool = False
    whole: bool = False
    warm: Callable[[str], object] = lambda which: None


@dataclass(frozen=True)
class Case:
    """One case of a suite. `build` makes its inputs only when they are wanted.

    `modes` are "forward" (without gradients) and "training" (forward and backward); `goals` has those of each mode;
    `fast` names the implementations that `fastlm bench --every` forces, one by one. In `fresh` cases, on the CPU, each
    candidate is timed in a process of its own, as a program that uses it alone: in one process malloc would keep for
    stock what others have freed, and have it keep (`ops.cpu.keep_freed_memory`).
    """

    suite: str
    name: str
    case: str
    dtype: torch.dtype
    build: Callable[[], Subject]
    modes: tuple[str, ...] = ("forward", "training")
    goals: dict[str, Goal] = field(default_factory=dict)
    fast: tuple[str, ...] = ()
    forced: str | None = None
    fresh: bool = False


def load(suite: str, device: str, dtypes: Sequence[torch.dtype] | None = None) -> Iterator[Case]:
    """Yield the cases of a suite on `device` ("cpu", "cuda"), of all its dtypes or of those given."""
    module = importlib.import_module(f"fastlm.tools.suites.{suite.replace('-', '_')}")
    return module.cases(device, dtypes)


def op_subject(op: Op, args: tuple, **options) -> Subject:
    """Compare an op with its stock call; `options` are further fields of the Subject."""
    def warm(which):
        tensor = measure.floating(args)[0]
        small = next(iter(op.samples("test", tensor.dtype, tensor.device))).args
        chosen = op.choose(args)[0] if which == "ours" else "torch"  # which the small one might not be
        measure.differentiate(op.implementations[chosen].run, small, constants=op.constants)

    options = dict(floor=functools.partial(measure.floor, op, args), compiled=op.compiled) | options
    return Subject(args, op, {"torch": op.implementations["torch"].run} | liger.baseline(op.name, args),
                   lambda ran: measure.errors(op, ran, args), op.constants, warm=warm, **options)


def pair(name: str, *args, **options) -> list[torch.nn.Module]:
    """Return torch.nn's module of this name and fastlm.nn's."""
    torch.manual_seed(0)
    return [getattr(namespace, name)(*args, **options) for namespace in (torch.nn, fastlm.nn)]


def apply(module, x):
    """Call a module whose result is one tensor."""
    return module(x)


def first(module, x):
    """Call a recurrent layer or an LSTM's cell."""
    return module(x)[0]


def attend(module, x):
    """Call a MultiheadAttention."""
    return module(x, x, x, need_weights=False)[0]


def module_subject(stock: torch.nn.Module, ours: torch.nn.Module, call: Callable, x: torch.Tensor,
                   **options) -> Subject:
    """Compare `call(ours, x)` with `call(stock, x)`, as functions of x and of the parameters.

    Both get stock's parameters; a module and its counterpart have them in the same order.
    """
    ours.load_state_dict(stock.state_dict())
    args = (x, list(stock.parameters()))
    run_ours, run_stock = _functional(ours, call), _functional(stock, call)
    return Subject(args, run_ours, {"torch": run_stock},
                   lambda ran: module_errors(args, run_ours, run_stock), modules=(ours, stock), **options)


def _functional(module, call):
    """Make `call(module, x)` a function of x and of the parameters, in the order of `module.parameters()`."""
    names = [name for name, _ in module.named_parameters()]

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return call(self.inner, x)

    outer = Call()

    def run(x, params):
        return torch.func.functional_call(outer, {f"inner.{n}": p for n, p in zip(names, params, strict=True)}, (x,))
    return run


def module_errors(args, ours, stock):
    """Return the errors of module functions as in `module_subject`, with stock's in float64 as the judge."""
    found, upstream, grads = measure.differentiate(ours, args)
    near, _, near_grads = measure.differentiate(stock, args, upstream)
    with fastlm.backend("torch"):
        exact, _, exact_grads = measure.differentiate(stock, measure.cast(args, torch.float64),
                                                      measure.cast(upstream, torch.float64))
    names = [f"result {i}" for i in range(len(found))] + [f"gradient {i}" for i in range(len(grads))]
    return measure.compare(names, found + grads, near + near_grads, exact + exact_grads)
