"""Profile a function beside stock PyTorch and the reference: operators by time, memory and FLOPs, and a trace."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm import measure
from fastlm.dispatch import Calls, explain

VARIANTS = {"fastlm": None, "stock": "torch", "reference": "reference"}


@dataclass
class Operator:
    """One operator's share of a run: seconds and bytes are its own, without what it calls; FLOPs are of products."""

    name: str
    calls: int
    seconds: float
    memory: int
    flops: int


@dataclass
class Profile:
    """What `profile` found. Printed, it is a table for each variant.

    Attributes:
        seconds: variant ("fastlm", "stock", "reference") -> median time of one call.
        operators: variant -> operators, the longest first.
        calls: which implementation ran in the variant "fastlm".
        flops: operations of the products in the reference, the work to be done, as `FlopCounterMode` counts them.
        peak: this machine's measured GEMM FLOP/s.
        trace: the Chrome/Perfetto trace of the variant "fastlm", or None.
    """

    seconds: dict[str, float]
    operators: dict[str, list[Operator]]
    calls: Calls
    flops: int
    peak: float
    trace: Path | None

    def __str__(self):
        lines = [str(self.calls), ""]
        for variant, operators in self.operators.items():
            seconds = self.seconds[variant]
            share = f", {self.flops / seconds / self.peak:.0%} of the GEMM peak" if self.flops else ""
            lines.append(f"{variant}: {seconds * 1e3:.3f} ms, {self.seconds['stock'] / seconds:.2f}x stock{share}")
            lines.append(f"  {'operator':42} {'calls':>6} {'ms':>9} {'MB':>9} {'MFLOP':>9}")
            lines += [f"  {o.name[:42]:42} {o.calls:6} {o.seconds * 1e3:9.3f} {o.memory / 1e6:9.2f} "
                      f"{o.flops / 1e6:9.1f}" for o in operators[:10]]
            lines.append("")
        if self.trace:
            lines.append(f"trace: {self.trace} (open in ui.perfetto.dev or chrome://tracing)")
        return "\n".join(lines)


def profile(fn: Callable, *args, device: str = "cpu", trace: str | Path | None = None, **kwargs) -> Profile:
    """Run `fn(*args, **kwargs)` through fastlm's choice, stock PyTorch and the reference, and compare.

    Args:
        fn: anything that calls fastlm's ops: an op, a module, a training step.
        device: where it runs: "cuda" adds the GPU's kernels.
        trace: file to write a Chrome trace of fastlm's run to.

    Raises:
        OSError: there can be no such file; nothing has run then.
    """
    if trace:
        Path(trace).parent.mkdir(parents=True, exist_ok=True)
        open(trace, "ab").close()  # PyTorch says nothing where it cannot write

    def variant(name):
        def run():
            if name is None:
                return fn(*args, **kwargs)
            with fastlm.backend(name):
                return fn(*args, **kwargs)
        return run

    runs = {label: variant(name) for label, name in VARIANTS.items()}
    calls = explain(runs["fastlm"])
    times = measure.timings(runs, device, seconds=0.5, rounds=20)
    operators = {label: _operators(run, device, trace if label == "fastlm" else None) for label, run in runs.items()}
    flops = sum(o.flops for o in operators["reference"])
    peak, _ = measure.peaks(device, torch.float32)
    return Profile({label: t.median for label, t in times.items()}, operators, calls, flops, peak,
                   Path(trace) if trace else None)


def _operators(run, device, trace) -> list[Operator]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.startswith("cuda") else [])
    with torch.profiler.profile(activities=activities, profile_memory=True) as prof:
        run()
    if trace:
        prof.export_chrome_trace(str(trace))
    with FlopCounterMode(display=False) as counter:
        run()
    flops = {str(op).replace(".", "::"): n for op, n in counter.get_flop_counts().get("Global", {}).items()}
    found = [Operator(e.key, e.count, (e.self_device_time_total or e.self_cpu_time_total) / 1e6,
                      e.self_device_memory_usage or e.self_cpu_memory_usage, flops.get(e.key, 0))
             for e in prof.key_averages()]
    return sorted(found, key=lambda o: -o.seconds)


def _training(subject) -> Callable[[], object]:
    """Return a training step by `backward`: FlopCounterMode cannot follow modules through `torch.autograd.grad`."""
    args, leaves = measure.leaves(subject.args, subject.constants)
    leaves += getattr(subject.ours, "parameters", ())

    def train():
        results = [r for r in measure.floating(subject.ours(*args)) if r.requires_grad]
        torch.autograd.backward(results, [torch.ones_like(r) for r in results])
        for leaf in leaves:
            leaf.grad = None
    return train


def target(name: str, device: str = "cpu") -> Callable[[], object]:
    """Return a training step of the op, module or model called `name`, as a function without arguments.

    Raises:
        ValueError: nothing is called that; the message lists what there is.
    """
    from fastlm.tools import bench
    from fastlm.tools.suites import load

    cases = [c for suite in ("ops", "modules") for c in load(suite, device, [torch.float32])]
    found = next((c for c in cases if c.name == name), None)
    if found is not None:
        return _training(found.build())
    models = {"UnigramLM": "unigram", "RNNLM": "lstm", "TransformerLM": "transformer"}
    if name in models:
        return bench.trainer(models[name], "fastlm", device).step
    names = {suite: ", ".join(dict.fromkeys(c.name for c in cases if c.suite == suite)) for suite in ("ops", "modules")}
    raise ValueError(f"profile: nothing is called {name!r}. Ops: {names['ops']}. Modules: {names['modules']}. "
                     f"Models: {', '.join(models)}.")
