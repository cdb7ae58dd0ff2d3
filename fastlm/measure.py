"""Measure: the one timer, the error rule, peak memory, and what this machine can do at best."""

import contextlib
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fastlm
from fastlm.dispatch import Op


class Error(NamedTuple):
    """The distance of one result or gradient from float64, beside stock PyTorch's own distance.

    It passes when `ours` is at most `bound`: twice `stock` plus 4·eps·max|reference|.
    """

    what: str
    ours: float
    stock: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.bound


class Timing(NamedTuple):
    """Median, first and third quartile of the seconds that one call took."""

    median: float
    low: float
    high: float


# --- numbers ---------------------------------------------------------------------------------------------------


def differentiate(fn: Callable, args: tuple, upstream: list[Tensor] | None = None, *, constants: tuple = (),
                  seed: int = 0):
    """Run `fn` on fresh leaves of `args` and return (results, upstream gradients, gradients of the leaves).

    Args:
        fn: returns a tensor or a nest of tensors.
        args: a nest of tensors and other values.
        upstream: gradient of each floating result; drawn at random where None is given.
        constants: positions of arguments that have no gradient.
        seed: what `torch.manual_seed` is set to before the call, for dropout.

    Returns:
        Lists of the floating results, of their gradients, and of the gradients of every floating tensor in `args` but
        the constants (zeros for those that the results do not depend on).
    """
    args, wanted = leaves(args, constants)
    torch.manual_seed(seed)
    with torch.enable_grad():
        results = floating(fn(*args))
    if upstream is None:
        upstream = [torch.randn_like(r) for r in results]
    for i, (r, g) in enumerate(zip(results, upstream, strict=True)):
        if r.shape != g.shape:
            raise AssertionError(f"result {i} has shape {list(r.shape)}, its gradient {list(g.shape)}")
    return [r.detach() for r in results], upstream, pull_back(results, upstream, wanted)


def pull_back(results: list[Tensor], upstream: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the gradients of `inputs`, zeros for those that no result depends on."""
    live = [(r, g) for r, g in zip(results, upstream, strict=True) if r.requires_grad]
    if not live or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    results, upstream = zip(*live, strict=True)
    return list(torch.autograd.grad(results, inputs, upstream, allow_unused=True, materialize_grads=True))


def errors(op: Op, name: str, args: tuple) -> list[Error]:
    """Hold implementation `name` of `op` to the error rule, on every result and every gradient.

    The judge is `op.reference` in float64; stock PyTorch at the dtype of `args` sets the bound. Where stock
    cannot take the call, the reference at that dtype stands in for it. In float64 the judge rounds as much as the
    judged, so there stock's error is what it is in float32, scaled by the ratio of the two epsilons.
    """
    ours = _stock(op, args) if name == "torch" else _run(op, name, args)
    stock = ours if name == "torch" else _stock(op, args, ours[1])
    exact = _run(op, "reference", cast(args, torch.float64), cast(ours[1], torch.float64))
    names = [f"result {i}" for i in range(len(ours[0]))] + [f"gradient {i}" for i in range(len(ours[2]))]
    found = compare(names, ours[0] + ours[2], stock[0] + stock[2], exact[0] + exact[2])
    if any(x.dtype is torch.float64 for x in floating(args)):
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        single = errors(op, "torch", cast(args, torch.float32))
        found = [e._replace(stock=max(e.stock, s.stock * ratio), bound=e.bound + 2 * s.stock * ratio)
                 for e, s in zip(found, single, strict=True)]
    return found


def compare(names, ours, stock, exact) -> list[Error]:
    """Apply the error rule to lists of tensors, name by name."""
    return [_error(*row) for row in zip(names, ours, stock, exact, strict=True)]


def cast(nest: Any, dtype: torch.dtype) -> Any:
    """Return the nest with its floating-point tensors converted to `dtype`."""
    return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, nest)


def leaves(args: tuple, constants: tuple = ()) -> tuple[tuple, list[Tensor]]:
    """Return `args` with fresh leaves for its floating tensors, but for the constants, and those leaves."""
    args = tuple(a if i in constants else pytree.tree_map(_leaf, a) for i, a in enumerate(args))
    return args, [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor) and x.requires_grad]


def floating(nest: Any) -> list[Tensor]:
    """Return the floating-point tensors of a nest, in order."""
    return [x for x in pytree.tree_leaves(nest) if isinstance(x, Tensor) and x.is_floating_point()]


def _run(op, name, args, upstream=None):
    with fastlm.backend(name):
        return differentiate(op, args, upstream, constants=op.constants)


def _stock(op, args, upstream=None):
    try:
        return _run(op, "torch", args, upstream)
    except (RuntimeError, NotImplementedError, TypeError):
        return _run(op, "reference", args, upstream)


def _leaf(x):
    if isinstance(x, Tensor) and x.is_floating_point():
        # detach keeps strides and storage: a kernel must see the layout that the sample has.
        return x.detach().requires_grad_()
    return x


def _error(what, ours, stock, exact):
    if ours.shape != exact.shape or ours.dtype != stock.dtype:
        raise AssertionError(f"{what}: {ours.dtype}{list(ours.shape)}, stock gives {stock.dtype}{list(stock.shape)}")
    if exact.numel() == 0:
        return Error(what, 0.0, 0.0, 0.0)
    scale = _largest(exact)
    distance, stock_distance = _distance(ours, exact), _distance(stock, exact)
    bound = 2 * stock_distance + 4 * torch.finfo(ours.dtype).eps * scale
    return Error(what, distance, stock_distance, bound)


def _largest(x: Tensor) -> float:
    """Return the largest finite magnitude. To pick out what is finite costs ten times as much: only where needed."""
    largest = x.abs().max().item()
    if math.isfinite(largest):
        return largest
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _distance(x: Tensor, exact: Tensor) -> float:
    """Return max|x - exact|; equal infinities and NaNs at the same places count as zero, else as infinity."""
    x = x.double()
    distance = (x - exact).abs()
    largest = distance.max().item()
    if math.isfinite(largest):  # then x and exact are finite everywhere
        return largest
    special = ~exact.isfinite()
    if not torch.equal(x[special].nan_to_num(nan=0.5), exact[special].nan_to_num(nan=0.5)):
        return float("inf")
    distance = distance[~special]
    return distance.nan_to_num(nan=torch.inf).max().item() if distance.numel() else 0.0


# --- time ------------------------------------------------------------------------------------------------------


def timings(candidates: dict[str, Callable[[], Any]], device: str = "cpu", seconds: float = 1.0,
            rounds: int = 200) -> dict[str, Timing]:
    """Time the candidates in turn, round after round, so that noise meets all of them alike.

    Args:
        candidates: name -> function without arguments.
        device: "cpu" reads the wall clock; "cuda" reads CUDA events: what the GPU takes. Before each call the L2 cache
            is flushed, and the GPU held back until the host has queued the call.
        seconds: time to spend on each candidate, at least three rounds.
        rounds: the most rounds.
    """
    for fn in candidates.values():
        fn()  # warm-up: allocations, code generation, page faults
    measure = _cpu_once
    if torch.device(device).type == "cuda":
        measure = functools.partial(_cuda_once, ahead=1.5 * max(_queueing(fn) for fn in candidates.values()))
    return _in_turn({name: functools.partial(measure, fn) for name, fn in candidates.items()}, seconds, rounds)


def timings_apart(makers: dict[str, Callable[[], Callable]], seconds: float = 1.0,
                  rounds: int = 200) -> dict[str, Timing]:
    """Time candidates in turn on the CPU, each in a process of its own, as two programs would run.

    In one process malloc keeps for one what another has freed, or has told it to keep.

    Args:
        makers: name -> function, known to pickle, that returns the function to be timed.
        seconds, rounds: as of `timings`.
    """
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(_fresh_process(_serve, make)) for name, make in makers.items()}
        for worker in workers.values():
            worker.recv()  # warm

        def measure(worker):
            worker.send(True)
            return worker.recv()
        found = _in_turn({name: functools.partial(measure, w) for name, w in workers.items()}, seconds, rounds)
        for worker in workers.values():
            worker.send(False)
        return found


def _serve(connection, make):
    fn = make()
    fn()
    connection.send(True)
    while connection.recv():
        time.sleep(0.005)  # threads of the one before still spin
        connection.send(_cpu_once(fn))


def _in_turn(measures, seconds, rounds):
    seen: dict[str, list[float]] = {name: [] for name in measures}
    spent = 0.0
    for i in range(rounds):
        start = time.perf_counter()
        for name, measure in measures.items():
            seen[name].append(measure())
        spent += time.perf_counter() - start
        if i >= 2 and spent > seconds * len(measures):
            break
    return {name: _summary(values) for name, values in seen.items()}


def _summary(values):
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)


def _cpu_once(fn):
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _queueing(fn):
    """Return the seconds that the host takes to queue a call."""
    torch.cuda.synchronize()
    return _cpu_once(fn)


def _cuda_once(fn, ahead):
    _l2_flush().zero_()
    torch.cuda._sleep(int(ahead * 2e9))  # cycles
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@functools.cache
def _l2_flush():
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


# --- memory ----------------------------------------------------------------------------------------------------


def peak_memory(make: Callable[[], Callable[[], Any]], device: str = "cpu") -> int:
    """Return the bytes that a call needs at its peak beyond its inputs and the results that it returns.

    On CUDA the allocator counts them. On the CPU it is the resident high-water mark of a fresh process (Linux), so
    `make` must be importable from a module: it makes the inputs and returns the function to call.
    """
    if torch.device(device).type == "cuda":
        call = make()
        gc.collect()  # what an earlier call left must not be freed by this one
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - _bytes(kept)
    return in_fresh_process(_resident_peak, make)


def in_fresh_process(fn: Callable, *args) -> Any:
    """Return `fn(*args)`, computed in a process of its own, in which nothing was allocated or freed before.

    The function, its arguments and what it returns must be known to pickle.
    """
    with _fresh_process(_send, fn, *args) as connection:
        return connection.recv()


def _send(connection, fn, *args):
    connection.send(fn(*args))


@contextlib.contextmanager
def _fresh_process(target, *args):
    """Run `target(connection, *args)` in a process of its own; give the other end of the connection, and wait."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    # The first torch.autograd.grad of a process imports sympy, 30 MB: not now.
    context.set_forkserver_preload(["fastlm", "torch.fx.experimental.symbolic_shapes"])
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *args))
    process.start()
    there.close()
    try:
        yield here
    except (EOFError, ConnectionError):
        raise RuntimeError(f"{args[0]}: the measuring process died; its error is above") from None
    finally:
        here.close()
        process.join()


def _resident_peak(make):
    call = make()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again at what is resident now
    before = _status("VmRSS")
    kept = call()
    return max(0, _status("VmHWM") - before - _bytes(kept))


def _status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _bytes(nest):
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(nest) if isinstance(t, Tensor))


# --- what the machine can do -----------------------------------------------------------------------------------


@functools.cache
def peaks(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Return this machine's measured (GEMM FLOP/s at `dtype`, torch or ours, copy bytes/s, read plus written)."""
    multiply, flops, (a, b) = product(device, dtype)
    source = torch.empty((1 << 30) if torch.device(device).type == "cuda" else (64 << 20), dtype=torch.int8,
                         device=device)
    target = torch.empty_like(source)
    found = timings({"gemm": lambda: a @ b, "linear": multiply, "copy": lambda: target.copy_(source)}, device,
                    seconds=0.5)
    return flops / min(found["gemm"].low, found["linear"].low), 2 * source.numel() / found["copy"].low


def product(device: str, dtype: torch.dtype) -> tuple[Callable, int, tuple[Tensor, Tensor]]:
    """Return a product large enough to show the machine's peak: (call, its FLOPs, its factors)."""
    cuda = torch.device(device).type == "cuda"
    slow = not cuda and dtype.itemsize < 4 and torch.backends.cpu.get_cpu_capability() != "AVX512"
    n = 8192 if cuda else 512 if slow else 2048  # torch multiplies 16 bits at about 1 GFLOP/s there
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: fastlm.ops.linear(a, b), 2 * n**3, (a, b)


def floor(op: Op, args: tuple) -> float:
    """Return the roofline of one forward pass in seconds: its arithmetic or its bytes, whichever takes longer."""
    tensor = floating(args)[0]
    flops, moved = op.cost(*args)
    gemm, copy = peaks(tensor.device.type, tensor.dtype)
    return max(flops / gemm, moved / copy)
