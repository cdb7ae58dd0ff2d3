"""Measure every op, module and model against stock PyTorch on this machine; report no speed without its numbers.

A row says which implementation ran, its time beside the best stock baseline's (interleaved, medians), its error
against float64 beside stock's own, and the peak memory of both. Where stock ran, the row reads "stock".
"""

import functools
import itertools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import fastlm
from fastlm import measure
from fastlm.dispatch import build_report, explain
from fastlm.ops import ALL

SUITES = ("ops", "modules", "models")
SAME_LOSSES = 1e-4  # the largest relative difference between two loss curves that counts as agreement


@dataclass
class Row:
    """One measurement. Times are seconds, memory is bytes, `ratio` is the best baseline's time over our time."""

    suite: str
    name: str
    case: str
    dtype: str
    mode: str
    ran: str
    declined: dict[str, str]
    seconds: float
    spread: tuple[float, float]
    baseline: str
    baseline_seconds: float
    baselines: dict[str, float]
    ratio: float
    error: float
    stock_error: float
    within_rule: bool
    memory: int | None = None
    baseline_memory: int | None = None
    peak_share: float | None = None


@dataclass
class Curve:
    """Losses of one model trained with stock and with fastlm layers from the same weights on the same batches."""

    model: str
    stock_losses: list[float]
    fastlm_losses: list[float]
    stock_tokens_per_s: float
    fastlm_tokens_per_s: float
    ran: dict[str, str] = field(default_factory=dict)

    @property
    def difference(self) -> float:
        """The largest relative difference between the two loss curves."""
        return max(abs(a - b) / abs(a) for a, b in zip(self.stock_losses, self.fastlm_losses, strict=True))


@dataclass
class Case:
    """Something to measure: functions of `args`, differentiable, and how to run them through fastlm and stock."""

    suite: str
    name: str
    case: str
    dtype: torch.dtype
    args: tuple
    ours: Callable
    baselines: dict[str, Callable]
    errors: Callable[[str], list[measure.Error]]
    constants: tuple[int, ...] = ()
    floor: Callable[[], float] | None = None
    forced: str | None = None
    modules: tuple[torch.nn.Module, ...] = ()


# --- what is measured ------------------------------------------------------------------------------------------


def op_cases(device: str, dtypes, only: str = "", every: bool = False, compiled: bool = False) -> Iterator[Case]:
    """Yield a case for each op whose name contains `only`, each dtype and each benchmark sample.

    With `every`, yield one for each implementation that can take the sample, whatever is chosen by default. With
    `compiled`, stock under torch.compile is a baseline too, where the op says that this is sensible.
    """
    for op, dtype in itertools.product((op for op in ALL if only in op.name), dtypes):
        stock, compile_stock = op.implementations["torch"].run, compiled and op.compiled
        for sample in op.samples("bench", dtype, device):
            fast = [name for name in op.default if name != "torch" and
                    op.implementations[name].cannot(*sample.args) is None]
            for forced in (every and fast) or (None,):
                baselines = {"torch": stock} | ({"torch.compile": torch.compile(stock)} if compile_stock else {})
                yield Case("ops", op.name, sample.name, dtype, sample.args, _forced(op, forced), baselines,
                           functools.partial(_op_errors, op, sample.args), op.constants,
                           functools.partial(measure.floor, op, sample.args), forced)


def _forced(op, name):
    """Make `op` run the implementation called `name`, where there is a name."""
    def run(*args):
        with fastlm.backend(name):
            return op(*args)
    return run if name else op


def _op_errors(op, args, ran):
    return measure.errors(op, ran, args)


def modules(namespace, device, dtype):
    """Yield (name, case, module, input) for a namespace of modules, torch.nn or fastlm.nn; all seeds are the same."""
    def build(name, case, shape, *args, call=None, **kwargs):
        torch.manual_seed(0)
        module = getattr(namespace, name)(*args, **kwargs, device=device, dtype=dtype)
        x = torch.randn(shape, device=device).to(dtype)
        return name, case, module, call or (lambda m, x: m(x)[0]), x

    for cell in ("LSTM", "GRU", "RNN"):
        yield build(cell, "2 layers, both ways, T64 B16 H256", (64, 16, 256), 256, 256, 2, bidirectional=True)
    yield build("MultiheadAttention", "B4 T256 E256", (4, 256, 256), 256, 4, batch_first=True,
                call=lambda m, x: m(x, x, x, need_weights=False)[0])
    yield build("TransformerEncoderLayer", "B4 T256 E256", (4, 256, 256), 256, 4, 1024, dropout=0.0,
                batch_first=True, norm_first=True, call=lambda m, x: m(x))


def module_cases(device: str, dtypes) -> Iterator[Case]:
    """Yield a case for each module and dtype; its arguments are the input and the parameters."""
    for dtype in dtypes:
        pairs = zip(modules(torch.nn, device, dtype), modules(fastlm.nn, device, dtype), strict=True)
        for (name, case, stock, call, x), (_, _, ours, _, _) in pairs:
            ours.load_state_dict(stock.state_dict())
            args = (x, list(stock.parameters()))
            run_ours, run_stock = _functional(ours, call), _functional(stock, call)
            yield Case("modules", name, case, dtype, args, run_ours, {"torch": run_stock},
                       functools.partial(_module_errors, args, run_ours, run_stock), modules=(ours, stock))


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


def _module_errors(args, ours, stock, ran):
    found, upstream, grads = measure.differentiate(ours, args)
    near, _, near_grads = measure.differentiate(stock, args, upstream)
    with fastlm.backend("torch"):
        exact, _, exact_grads = measure.differentiate(stock, measure.cast(args, torch.float64),
                                                      measure.cast(upstream, torch.float64))
    names = ["result", *(f"gradient {i}" for i in range(len(grads)))]
    return measure.compare(names, found + grads, near + near_grads, exact + exact_grads)


# --- measuring -------------------------------------------------------------------------------------------------


def measure_case(case: Case, device: str, seconds: float) -> Iterator[Row]:
    """Check the numbers of one case, then yield its rows: forward, and training (forward and backward)."""
    leaves, _ = measure.leaves(case.args, case.constants)
    calls = explain(case.ours, *leaves)
    errors = case.errors(calls[0].ran if calls else "torch")
    worst = max(errors, key=lambda e: e.ours / e.bound if e.bound else e.ours)
    for mode in ("forward", "training"):
        for module in case.modules:
            module.train(mode == "training")
        # An implementation may take one of the modes only.
        calls = explain(_no_grad(case.ours) if mode == "forward" else case.ours, *leaves)
        ran = "+".join(sorted({c.ran for c in calls})) or "torch"
        candidates = {name: step(fn, case, mode) for name, fn in case.baselines.items()}
        if ran != "torch" or case.modules:  # a module is ours even where each of its ops runs stock
            candidates["fastlm"] = step(case.ours, case, mode)
        times = measure.timings(candidates, device, seconds)
        ours = times.get("fastlm", times["torch"])
        baseline = min(case.baselines, key=lambda name: times[name].median)
        row = Row(case.suite, case.name, case.case, str(case.dtype)[6:], mode, "stock" if ran == "torch" else ran,
                  {f"{c.op}/{name}": why for c in calls for name, why in c.declined.items()},
                  ours.median, (ours.low, ours.high), baseline, times[baseline].median,
                  {name: times[name].median for name in case.baselines},
                  times[baseline].median / ours.median, worst.ours, worst.stock, all(e.ok for e in errors))
        if case.floor is not None:
            # Backward costs about two forwards: of a product's arithmetic, of an elementwise op's bytes.
            row.peak_share = case.floor() * (3 if mode == "training" else 1) / ours.median
        if mode == "training" and ran != "torch":
            add_memory(row, case, device)
        yield row


def _no_grad(fn):
    def run(*args):
        with torch.no_grad():
            return fn(*args)
    return run


def step(fn, case, mode):
    """Return a function without arguments that runs `fn` once, on leaves made beforehand."""
    if mode == "forward":
        args = case.args
        run = _no_grad(fn)
        return lambda: run(*args)
    args, leaves = measure.leaves(case.args, case.constants)

    def train():
        results = [r for r in measure.floating(fn(*args)) if r.requires_grad]
        return results, torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results], allow_unused=True)
    return train


def memory_of(suite: str, name: str, case: str, dtype: str, mode: str, device: str, forced: str | None,
              stock: bool) -> Callable:
    """Make one case's inputs in a fresh process and return the function whose peak is wanted."""
    dtype = getattr(torch, dtype)
    cases = op_cases(device, [dtype], name, forced is not None) if suite == "ops" else module_cases(device, [dtype])
    found = next(c for c in cases if (c.name, c.case, c.forced) == (name, case, forced))
    for op in ALL if suite == "ops" else ():
        if op.name == name:  # touch code and thread pools, on inputs too small to count
            small = next(iter(op.samples("test", dtype, device))).args
            measure.differentiate(found.baselines["torch"] if stock else op, small, constants=op.constants)
    return step(found.baselines["torch"] if stock else found.ours, found, mode)


def add_memory(row: Row, case: Case, device: str) -> None:
    """Measure the peak memory of a row and of its stock baseline."""
    key = (row.suite, row.name, row.case, row.dtype, row.mode, device, case.forced)
    row.memory, row.baseline_memory = (
        measure.peak_memory(functools.partial(memory_of, *key, stock), device) for stock in (False, True))


def trainer(model: str, layers: str, device: str):
    """Return a `training.train.Trainer` of a model on the default corpus, with its default settings."""
    from fastlm.training.config import configure
    from fastlm.training.train import Trainer

    config = configure(model, layers=layers, device=device)
    return Trainer(config, _data(config.seq_len))


@functools.cache
def _data(seq_len):
    from fastlm.training.config import RunConfig
    from fastlm.training.data import build_tokenizer, load_corpus, tokenize

    corpus = load_corpus(RunConfig.data)
    return tokenize(corpus, build_tokenizer(RunConfig.tokenizer, corpus.train, RunConfig.vocab_size), seq_len)


def curves(steps: int, device: str) -> Iterator[Curve]:
    """Train the three language models for `steps` steps with stock and with fastlm layers, step by step in turn."""
    for model in ("unigram", "lstm", "transformer"):
        trainers = {layers: trainer(model, layers, device) for layers in ("stock", "fastlm")}
        calls = trainers["fastlm"].explain()
        seconds = {layers: [] for layers in trainers}
        for _ in range(steps):
            for layers, run in trainers.items():
                start = time.perf_counter()
                run.step().item()  # waits for the device
                seconds[layers].append(time.perf_counter() - start)
        tokens = trainers["stock"].config.batch_size * trainers["stock"].config.seq_len
        losses = {layers: [loss.item() for loss in run.losses] for layers, run in trainers.items()}
        rates = {layers: tokens / statistics.median(s) for layers, s in seconds.items()}
        yield Curve(model, losses["stock"], losses["fastlm"], rates["stock"], rates["fastlm"],
                    {c.op: "stock" if c.ran == "torch" else c.ran for c in calls})


# --- a whole run -----------------------------------------------------------------------------------------------


def machine(device: str) -> dict:
    """Return what a result needs to be compared with another: versions, device, threads, commit, date, peaks."""
    cuda = torch.device(device).type == "cuda"
    dtypes = (torch.float32, torch.bfloat16)
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(), "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(),
        "torch": torch.__version__, "fastlm": fastlm.__version__, "extension": build_report()["instruction_sets"],
        "commit": _commit(), "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "peaks": {str(d)[6:]: dict(zip(("flops", "bytes_per_s"), measure.peaks(device, d), strict=True))
                  for d in dtypes},
    }


def _cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name


def _commit():
    root = Path(__file__).parents[2]
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return None
    dirty = subprocess.run(["git", "-C", str(root), "status", "--porcelain", "--", "fastlm", "csrc"],
                           capture_output=True, text=True)
    return found.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def run(suites=SUITES, device: str = "cpu", dtypes=None, seconds: float = 0.6, steps: int = 30,
        only: str = "", full: bool = False, every: bool = False,
        progress: Callable[[str, float], None] = lambda what, done: None) -> dict:
    """Run suites and return a result: {"machine": …, "rows": [Row as dict], "curves": [Curve as dict]}.

    Args:
        suites: any of "ops", "modules", "models".
        seconds: time spent on each candidate of each row.
        steps: training steps of each model.
        dtypes: torch dtypes or their names; float32 where none is given, on a GPU bfloat16 and float16 too.
        only: measure rows whose name contains this.
        full: measure every benchmark sample, and stock under torch.compile; else the first two samples of each op.
        every: measure each implementation that can run, not only the one that is chosen by default.
        progress: called with what is measured next and the share that is done.
    """
    unknown = set(suites) - set(SUITES)
    if unknown:
        raise ValueError(f"bench: unknown suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    dtypes = [_dtype(d) for d in dtypes or ()] or (
        [torch.bfloat16, torch.float16, torch.float32] if torch.device(device).type == "cuda" else [torch.float32])
    progress("this machine's peaks", 0)
    result = {"machine": machine(device), "rows": [], "curves": []}
    cases = list(_selected(suites, device, dtypes, only, full, every))
    if not cases and (only or set(suites) != {"models"}):
        raise ValueError(f"bench: the name of no op or module contains {only!r}")
    with_models = "models" in suites and not only
    jobs, done = len(cases) + 12 * with_models, 0
    if with_models:
        progress("training models with stock and with fastlm layers", 0)
        for curve in curves(steps, device):
            done += 4
            progress(f"trained {curve.model}", done / jobs)
            result["curves"].append(asdict(curve) | {"difference": curve.difference})
    for case in cases:
        progress(f"{case.name}, {case.case}", done / jobs)
        result["rows"] += [asdict(row) for row in measure_case(case, device, seconds)]
        done += 1
    progress("done", 1.0)
    return result


def _dtype(name):
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"bench: dtype is {name!r}, expected float32, bfloat16, float16 or float64")
    return dtype


def _selected(suites, device, dtypes, only, full, every):
    if "ops" in suites:
        cases = op_cases(device, dtypes, only, every, full)
        for _, group in itertools.groupby(cases, key=lambda c: (c.name, c.dtype, c.forced)):
            yield from itertools.islice(group, None if full else 2)
    if "modules" in suites:
        yield from (c for c in module_cases(device, dtypes) if only in c.name)
