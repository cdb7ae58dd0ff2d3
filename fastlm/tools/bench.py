"""Measure every op, module and model against stock PyTorch on this machine; report no speed without its numbers.

A row says which implementation ran, its time beside the best stock baseline's (interleaved, medians), its error
against float64 beside stock's own, and the peak memory of both. Where stock ran, the row reads "stock".
"""

import dataclasses
import functools
import itertools
import os
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
from fastlm.dispatch import CannotRun, build_report, explain
from fastlm.tools.suites import EVERYTHING, SUITES, Case, Goal, Subject, load

# FASTLM_MAX_ISA -> what caps torch and its libraries alike, so that a machine stands for one with fewer instructions.
CAPS = {isa: dict(zip(("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"), caps, strict=True))
        for isa, caps in {"generic": ("default", "SSE41", "SSE4_2"), "avx2": ("avx2", "AVX2", "AVX2"),
                          "avx512": ("avx512", "AVX512_CORE", "AVX512")}.items()}
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
MODELS = "unigram", "gru", "lstm", "transformer"  # what `curves` trains
SAME_LOSSES = 1e-4  # the largest relative difference between two loss curves that counts as agreement


@dataclass
class Row:
    """One measurement. Times are seconds, memory is bytes, `ratio` is the best baseline's time over our time.

    `goal` has the fields of `suites.Goal` that were set; `missed` names those that were not reached. `at_peak` is the
    ratio that a call would have that took `Subject.floor`: no more can be reached on this machine.
    """

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
    at_peak: float | None = None
    bytes_per_s: float | None = None
    goal: dict = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)


@dataclass
class Curve:
    """Losses of one model trained with stock and with fastlm layers from the same weights on the same batches.

    Tokens a second are of training, medians of steps, and of one text that each then generates.
    """

    model: str
    stock_losses: list[float]
    fastlm_losses: list[float]
    stock_tokens_per_s: float
    fastlm_tokens_per_s: float
    stock_generated_per_s: float
    fastlm_generated_per_s: float
    ran: dict[str, str] = field(default_factory=dict)

    @property
    def difference(self) -> float:
        """The largest relative difference between the two loss curves."""
        return max(abs(a - b) / abs(a) for a, b in zip(self.stock_losses, self.fastlm_losses, strict=True))


# --- measuring -------------------------------------------------------------------------------------------------


def measure_case(case: Case, device: str, seconds: float, compiled: bool = False) -> Iterator[Row]:
    """Check the numbers of one case, then yield a row for each of its modes; none where what is forced cannot run.

    With `compiled`, stock under torch.compile is a baseline too, where the subject says that this is sensible.
    """
    subject = case.build()
    subject.ours = ours = _forced(subject.ours, case.forced)
    if compiled and subject.compiled:
        subject.baselines["torch.compile"] = torch.compile(subject.baselines["torch"])
    leaves, _ = measure.leaves(subject.args, subject.constants)
    try:
        calls = explain(ours, *leaves)
    except CannotRun:
        return
    errors = subject.errors(calls[0].ran if calls else "torch")
    worst = max(errors, key=lambda e: e.ours / e.bound if e.bound else e.ours)
    for mode in case.modes:
        for module in subject.modules:
            module.train(mode == "training")
        # An implementation may take one of the modes only.
        calls = explain(_no_grad(ours) if mode == "forward" else ours, *leaves)
        ran = "+".join(sorted({c.ran for c in calls})) or "torch"
        goal = case.goals.get(mode)
        candidates, failed = _baselines(subject, mode)
        if ran != "torch" or subject.modules or subject.whole:  # a module is ours even where its ops run stock
            candidates["fastlm"] = step(ours, subject, mode)
        beside = goal is not None and goal.share is not None and subject.products
        if beside:
            candidates["peak"], flops, _ = measure.product(device, case.dtype)
        if case.fresh:
            times = measure.timings_apart({name: functools.partial(_call, case, mode, name, torch.get_num_threads())
                                           for name in candidates}, seconds)
        else:
            times = measure.timings(candidates, device, seconds)
        peak = times.pop("peak", None)
        found = times.get("fastlm", times["torch"])
        baselines = {name: time.median for name, time in times.items() if name != "fastlm"}
        baseline = min(baselines, key=baselines.get)
        row = Row(case.suite, case.name, case.case, str(case.dtype)[6:], mode, "stock" if ran == "torch" else ran,
                  {f"{c.op}/{name}": why for c in calls for name, why in c.declined.items()} | failed,
                  found.median, (found.low, found.high), baseline, times[baseline].median,
                  baselines, times[baseline].median / found.median, worst.ours, worst.stock, all(e.ok for e in errors))
        if subject.floor is not None:
            # Backward costs about two forwards: of a product's arithmetic, of an elementwise op's bytes.
            training = subject.training_floor or (lambda: 3 * subject.floor())
            row.peak_share = (training if mode == "training" else subject.floor)() / found.median
            if beside:
                row.peak_share *= measure.peaks(device, case.dtype)[0] * peak.median / flops
            row.at_peak = row.ratio / row.peak_share
        if subject.reads is not None:
            row.bytes_per_s = subject.reads / found.median
        if mode == "training" and ran != "torch" and not subject.whole:
            add_memory(row, case, device)
        if goal:
            hold(row, goal)
        yield row


def _baselines(subject, mode):
    """Return (name -> call of each baseline, name -> why it cannot make it); eager PyTorch's own errors are raised."""
    calls, failed = {}, {}
    for name, fn in subject.baselines.items():
        call = step(fn, subject, mode)
        if name != "torch":
            try:
                call()
            except Exception as error:
                failed[f"baseline {name}"] = str(error).splitlines()[0][:200] if str(error) else repr(error)
                continue
        calls[name] = call
    return calls, failed


def _call(case, mode, name, threads):
    """Return what is timed of a case on the CPU, made anew."""
    torch.set_num_threads(threads)
    if name == "peak":
        return measure.product("cpu", case.dtype)[0]
    subject = case.build()
    for module in subject.modules:
        module.train(mode == "training")
    return step(_forced(subject.ours, case.forced) if name == "fastlm" else subject.baselines[name], subject, mode)


def hold(row: Row, goal: Goal) -> None:
    """Write into the row what it was to reach, and what of that it missed."""
    row.goal = {name: value for name, value in dataclasses.asdict(goal).items() if value}
    memory = None if row.memory is None else (row.memory - goal.allowance) / max(row.baseline_memory, 1)
    found = {"ratio": row.ratio, "memory": memory, "share": row.peak_share}
    for name, value in found.items():
        wanted = row.goal.get(name)
        if name == "ratio" and goal.slack and row.seconds - row.baseline_seconds <= goal.slack:
            continue
        if wanted and (value is None or (value > wanted if name == "memory" else value < wanted)):
            row.missed.append(name)


def means(rows: list[Row]) -> list[dict]:
    """Return for each group with a goal the mean ratio found, wanted and at peak, the least, and how many rows."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        for name, wanted in row.goal.get("means", {}).items():
            groups.setdefault((name, wanted), []).append(row)
    return [{"name": name, "found": statistics.geometric_mean(r.ratio for r in group), "wanted": wanted,
             "at_peak": statistics.geometric_mean(r.at_peak for r in group) if all(r.at_peak for r in group) else None,
             "least": min(r.ratio for r in group), "rows": len(group)}
            for (name, wanted), group in groups.items()]


def _forced(fn, name):
    """Make `fn` run the implementation called `name` wherever there is one, where there is a name."""
    def run(*args):
        with fastlm.backend(name):
            return fn(*args)
    return run if name else fn


def _no_grad(fn):
    def run(*args):
        with torch.no_grad():
            return fn(*args)
    return run


def step(fn, subject: Subject, mode: str):
    """Return a function without arguments that runs `fn` once, on leaves made beforehand."""
    if mode == "forward":
        args = subject.args
        run = _no_grad(fn)
        return lambda: run(*args)
    args, leaves = measure.leaves(subject.args, subject.constants)
    leaves += getattr(fn, "parameters", ())  # of a module that is called as it is
    upstream = []  # made by the first call: what comes from the next layer is not what is timed

    def train():
        results = [r for r in measure.floating(fn(*args)) if r.requires_grad]
        upstream[:] = upstream or [torch.ones_like(r) for r in results]
        return results, torch.autograd.grad(results, leaves, upstream, allow_unused=True)
    return train


def memory_of(suite: str, name: str, case: str, dtype: str, mode: str, device: str, forced: str | None,
              stock: bool) -> Callable:
    """Make one case's inputs in a fresh process and return the function whose peak is wanted."""
    cases = load(suite, device, [getattr(torch, dtype)])
    subject = next(c for c in cases if (c.name, c.case) == (name, case)).build()
    subject.warm("torch" if stock else "ours")
    for module in subject.modules:
        module.train(mode == "training")
    return step(subject.baselines["torch"] if stock else _forced(subject.ours, forced), subject, mode)


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
    from fastlm.training.config import configure
    from fastlm.training.train import load_data

    return load_data(configure(seq_len=seq_len))


def curves(steps: int, device: str) -> Iterator[Curve]:
    """Train the language models for `steps` steps with stock and with fastlm layers, step by step in turn."""
    for model in MODELS:
        trainers = {layers: trainer(model, layers, device) for layers in ("stock", "fastlm")}
        calls = trainers["fastlm"].explain()
        trained = _medians([lambda run=run: run.step().item() for run in trainers.values()], steps)
        tokens = trainers["stock"].config.batch_size * trainers["stock"].config.seq_len
        losses = {layers: [loss.item() for loss in run.losses] for layers, run in trainers.items()}
        yield Curve(model, losses["stock"], losses["fastlm"], *(tokens / seconds for seconds in trained),
                    *_generation([run.model for run in trainers.values()], device),
                    {c.op: "stock" if c.ran == "torch" else c.ran for c in calls})


def _generation(models, device, tokens=64, rounds=5):
    """Return how many tokens of one text each model generates a second, in turn."""
    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    runs = [lambda model=model: model.eval().generate(start, tokens, temperature=0)[0, -1].item() for model in models]
    return [tokens / seconds for seconds in _medians(runs, rounds)]


def _medians(runs, rounds):
    """Return the median seconds of each function, which waits for the device itself, called in turn."""
    seconds = [[] for _ in runs]
    for _ in range(rounds):
        for run, found in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]


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
    name += f", both capped to {cap.upper()}" if (cap := capped()) else ""
    return name + (", freed memory kept" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "")  # glibc's, for both


def capped() -> str:
    """Return the instruction set that the environment caps fastlm and torch to, "" where it caps neither.

    Raises:
        ValueError: fastlm alone is capped: its times beside a wider torch's say nothing of any CPU.
    """
    cap = os.environ.get("FASTLM_MAX_ISA", "")
    if cap not in CAPS:
        return ""
    lacking = [f"{name}={value}" for name, value in CAPS[cap].items() if os.environ.get(name) != value]
    if lacking:
        raise ValueError(f"bench: FASTLM_MAX_ISA={cap} caps fastlm alone; for torch set {' '.join(lacking)} too")
    return cap


def _commit():
    root = Path(__file__).parents[2]
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return None
    dirty = subprocess.run(["git", "-C", str(root), "status", "--porcelain", "--", "fastlm", "csrc"],
                           capture_output=True, text=True)
    return found.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def run(suites=EVERYTHING, device: str = "cpu", dtypes=None, seconds: float | None = None, steps: int = 30,
        only: str = "", full: bool = False, every: bool = False,
        progress: Callable[[str, float], None] = lambda what, done: None,
        keep: Callable[[dict], object] = lambda result: None) -> dict:
    """Run suites and return a result: {"machine": …, "rows": [Row as dict], "means": …, "curves": [Curve as dict]}.

    Args:
        suites: any of `suites.SUITES`.
        seconds: time spent on each candidate of each row; where None is given 0.3, on a GPU, which is steadier, 0.05.
        steps: training steps of each model.
        dtypes: torch dtypes or their names; where none is given, each suite's own: float32, on a GPU bfloat16 and
            float16 too.
        only: measure rows whose name and case, "softmax 2048x1024", contain this.
        full: measure every benchmark sample, and stock under torch.compile; else the first two samples of each op.
        every: measure each implementation that can run, not only the one that is chosen by default.
        progress: called with what is measured next and the share that is done.
        keep: called after each case with the result so far: a later one may fail, or time may run out.
    """
    dtypes = check(suites, dtypes)
    seconds = seconds or (0.3 if device == "cpu" else 0.05)
    cases = [c for suite in suites if suite != "models" for c in _selected(suite, device, dtypes, only, full)]
    if not cases and (only or set(suites) != {"models"}):
        raise ValueError(f"bench: no case's name contains {only!r} in {', '.join(suites)}")
    progress("this machine's peaks", 0)
    result = {"machine": machine(device), "rows": [], "means": [], "curves": []}
    with_models = "models" in suites and not only
    jobs, done = len(cases) + 4 * len(MODELS) * with_models, 0
    if with_models:
        progress("training models with stock and with fastlm layers", 0)
        for curve in curves(steps, device):
            done += 4
            progress(f"trained {curve.model}", done / jobs)
            result["curves"].append(asdict(curve) | {"difference": curve.difference})
    rows = []
    for case in cases:
        progress(f"{case.name}, {case.case}", done / jobs)
        forced = [row for name in case.fast if every
                  for row in measure_case(dataclasses.replace(case, forced=name), device, seconds, full)]
        rows += forced or measure_case(case, device, seconds, full)
        done += 1
        result |= {"rows": [asdict(row) for row in rows], "means": means(rows)}
        keep(result)
    progress("done", 1.0)
    return result


def check(suites, dtypes=None) -> list[torch.dtype] | None:
    """Return the dtypes that are meant; raise ValueError where one of the names is no dtype's or no suite's."""
    unknown = set(suites) - set(SUITES)
    if unknown:
        raise ValueError(f"bench: unknown suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    return [_dtype(d) for d in dtypes or ()] or None


def _dtype(name):
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if dtype not in DTYPES:
        raise ValueError(f"bench: dtype is {name!r}, expected float32, bfloat16, float16 or float64")
    return dtype


def _selected(suite, device, dtypes, only, full):
    cases = (c for c in load(suite, device, dtypes) if only in f"{c.name} {c.case}")
    if suite != "ops" or full:
        return cases
    groups = itertools.groupby(cases, key=lambda c: (c.name, c.dtype))
    return itertools.chain.from_iterable(itertools.islice(group, 2) for _, group in groups)
