"""pytest-benchmark over every op × benchmark sample × implementation, from the ops' own specifications.

    .venv/bin/python -m pytest benchmarks/bench_ops.py --benchmark-enable [-k lstm]

Groups put implementations of one case side by side; `extra_info` holds the error beside stock's, the peak memory and
what `fastlm.explain` says ran. A case whose numbers break the error rule fails and reports no time.
"""

import functools

import pytest
import torch

import fastlm
from fastlm import measure
from fastlm.ops import ALL
from fastlm.tools import bench
from fastlm.tools.suites import load


def cases():
    for op in ALL:
        for i, sample in enumerate(op.samples("bench", torch.float32, "meta")):
            for name in op.implementations:
                if name != "reference":
                    label = f"{op.name}-{sample.name}-{name}".replace(" ", "_")
                    yield pytest.param(op, i, name, id=label)


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize(("op", "index", "name"), list(cases()))
def test_op(benchmark, op, index, name, mode, device):
    case = [c for c in load("ops", device, [torch.float32]) if c.name == op.name][index]
    subject = case.build()
    if reason := op.implementations[name].cannot(*subject.args):
        pytest.skip(reason)
    default = fastlm.explain(op, *subject.args)[0].ran
    errors = measure.errors(op, name, subject.args)
    assert all(e.ok for e in errors), errors
    with fastlm.backend(name):
        step = bench.step(subject.ours, subject, mode)
        if torch.device(device).type == "cuda":  # pytest-benchmark sees host time only
            benchmark.extra_info["device_seconds"] = measure.timings({name: step}, device)[name].median
            step = functools.partial(_synchronised, step)
        benchmark.group = f"{op.name} {case.case} {mode}"
        benchmark.extra_info["ran"] = name
        benchmark.extra_info["error"] = max(e.ours for e in errors)
        benchmark.extra_info["stock_error"] = max(e.stock for e in errors)
        if benchmark.enabled and name in ("torch", default):
            benchmark.extra_info["peak_memory"] = measure.peak_memory(functools.partial(
                bench.memory_of, "ops", op.name, case.case, "float32", mode, device, None, name == "torch"), device)
        benchmark.pedantic(step, rounds=5 if benchmark.enabled else 1, warmup_rounds=1)


def _synchronised(step):
    step()
    torch.cuda.synchronize()
