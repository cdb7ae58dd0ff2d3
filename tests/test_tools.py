"""doctor, bench, report and profile: what they print is what happened."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm import measure
from fastlm.dispatch import Implementation
from fastlm.ops import ALL
from fastlm.tools import bench, doctor, report
from fastlm.tools.suites import EVERYTHING, SUITES, Case, Goal, Subject, load


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Let benchmarks measure the small samples of the tests, and no memory: it is measured in a fresh process."""
    for op in ALL:
        monkeypatch.setattr(op, "samples", functools.partial(_test_samples, op.samples))
    for least in ("LEAST", "LEAST_LOGITS"):  # below which stock runs
        monkeypatch.setattr(sys.modules["fastlm.ops.linear_cross_entropy"], least, 0)
    monkeypatch.setattr(bench, "add_memory", lambda row, case, device: None)
    monkeypatch.setattr(measure, "peaks", lambda device, dtype: (1e11, 1e10))


def _test_samples(samples, scale, dtype, device):
    return samples("test", dtype, device)


@pytest.fixture
def result():
    return bench.run(("ops",), only="linear_cross_entropy", seconds=0.01)


def test_doctor_has_a_row_for_every_implementation():
    rows = {c.name: c for c in doctor.implementations()}
    assert set(rows) == {f"{op.name} / {name}" for op in ALL for name in op.implementations}
    for op in ALL:
        running = [n for n in op.implementations if rows[f"{op.name} / {n}"].detail.startswith("runs by default")]
        assert running == [op.choose(next(iter(op.samples("bench", torch.float32, "cpu"))).args)[0]]


def test_doctor_says_why_and_how_to_mend(monkeypatch):
    op = next(op for op in ALL if "native" in op.implementations)
    missing = Implementation(None, cannot=lambda *args: "the C++ extension is missing: no compiler")
    monkeypatch.setitem(op.implementations, "native", missing)
    row = next(c for c in doctor.implementations() if c.name == f"{op.name} / native")
    assert row.state == "off"
    assert "no compiler" in row.detail
    assert "g++" in row.fix


@pytest.mark.parametrize(("venv", "files", "fix"), [
    (".venv", ["setup.py"], "make extension"),
    ("elsewhere", ["setup.py"], "pip install -e . in fastlm's source folder"),
    ("elsewhere", [], "pip install . in fastlm's source folder"),
])
def test_doctor_builds_the_extension_as_it_was_installed(tmp_path, monkeypatch, venv, files, fix):
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / venv))
    skipped = {"cuda": "no NVIDIA GPU visible when fastlm was built (FASTLM_CUDA=1 builds without one)"}
    for error, row, wanted in (("no C++ compiler", "extension", f"{fix} (needs g++ and python3-dev)"),
                               (None, "extension, cuda", f"FASTLM_CUDA=1 {fix}")):
        report = {"instruction_sets": [], "cuda": None, "skipped": skipped, "error": error}
        monkeypatch.setattr(doctor, "build_report", lambda report=report: report)
        assert next(c for c in doctor.environment() if c.name == row).fix == wanted


def test_doctor_reports_a_failed_build(monkeypatch):
    broken = {"instruction_sets": [], "cuda": None, "skipped": {}, "error": "the build failed: x\nerror: y\n"}
    monkeypatch.setattr(doctor, "build_report", lambda: broken)
    row = next(c for c in doctor.environment() if c.name == "extension")
    assert (row.state, row.detail) == ("missing", "error: y")


@pytest.mark.parametrize("cxx", ["no-such-compiler", "false"])
def test_a_broken_compiler_ends_no_installation(tmp_path, cxx):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    subprocess.run(command, cwd=Path(__file__).parents[1], env=os.environ | {"CXX": cxx}, check=True)
    assert json.loads((tmp_path / "fastlm/_build.json").read_text())["error"].startswith(f"'{cxx}' compiles no C++")


def test_rows_tell_what_ran_and_how_well(result):
    assert {row["mode"] for row in result["rows"]} == {"forward", "training"}
    for row in result["rows"]:
        assert row["ran"] in ("native", "blocked")
        assert row["within_rule"]
        assert row["seconds"] > 0
        assert row["ratio"] == pytest.approx(row["baseline_seconds"] / row["seconds"])


def test_linear_cross_entropy_never_holds_all_logits():
    """Peak memory beyond inputs and gradients is at most 0.4 of eager's; bytes, unlike times, are no noise."""
    key = ("ops", "linear_cross_entropy", "1024x512x50257", "float32", "training", "cpu", None)
    make = functools.partial(bench.memory_of, *key)
    ours, stock = (measure.peak_memory(functools.partial(make, stock)) for stock in (False, True))
    assert ours < 0.4 * stock


def note_process(path):
    """Make a Subject whose functions write down which process timed them."""
    def write(x):
        with open(path, "a") as file:
            print(os.getpid(), torch.get_num_threads(), file=file)
        return x
    return Subject((torch.ones(1),), write, {"torch": write}, lambda ran: [measure.Error("result", 0.0, 0.0, 0.0)],
                   whole=True)


def test_candidates_of_fresh_cases_are_timed_in_turn_each_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "calls"
    case = Case("rnn-cpu", "x", "y", torch.float32, functools.partial(note_process, path), ("forward",),
                fresh=True)
    (row,) = bench.measure_case(case, "cpu", 0.01)
    assert row.seconds > 0
    checked, *calls = [line.split() for line in path.read_text().splitlines()]
    assert checked[0] == str(os.getpid())
    timed = [process for process, threads in calls if process != checked[0]]
    assert {threads for _, threads in calls} == {str(torch.get_num_threads())}
    timed = timed[2:]  # the first two warm up, in whatever order
    assert len(timed) > 4
    assert timed[0] != timed[1]
    assert timed == timed[:2] * (len(timed) // 2)


def test_a_measuring_process_that_dies_is_named():
    with pytest.raises(RuntimeError, match=r"dies.*the measuring process died"):
        measure.timings_apart({"x": dies})


def dies():
    os._exit(1)


def test_a_share_to_reach_is_of_a_product_beside_it(monkeypatch):
    """Where that product is half as fast as the peak was, a call reaches twice the share of it."""
    subject = Subject((torch.ones(1),), lambda x: x, {"torch": lambda x: x},
                      lambda ran: [measure.Error("result", 0.0, 0.0, 0.0)], floor=lambda: 0.005, products=True,
                      whole=True)
    case = Case("rnn-cpu", "x", "y", torch.float32, lambda: subject, ("forward",), {"forward": Goal(share=0.8)})
    monkeypatch.setattr(measure, "product", lambda *_: (lambda: None, 1e9, ()))
    for seconds, share, missed in ((0.01, 0.5, ["share"]), (0.02, 1.0, [])):  # at the peak of 1e11 it is the first
        times = {"torch": 0.01, "fastlm": 0.01, "peak": seconds}
        monkeypatch.setattr(measure, "timings", lambda candidates, *_, times=times: {
            name: measure.Timing(times[name], times[name], times[name]) for name in candidates})
        (row,) = bench.measure_case(case, "cpu", 0.1)
        assert row.peak_share == pytest.approx(share)
        assert row.missed == missed


def test_a_stock_row_claims_nothing():
    rows = bench.run(("ops",), only="softmax", seconds=0.01)["rows"]
    assert {(row["ran"], row["ratio"]) for row in rows} == {("stock", 1.0)}


def test_a_kernel_with_wrong_numbers_is_reported(monkeypatch):
    op = next(op for op in ALL if op.name == "linear_cross_entropy")
    for name in ("native", "blocked"):
        real = op.implementations[name]
        monkeypatch.setitem(op.implementations, name, real._replace(run=lambda *a, real=real: real.run(*a) * 1.001))
    case = next(c for c in load("ops", "cpu") if c.name == op.name)
    row = next(iter(bench.measure_case(case, "cpu", 0.01)))
    assert not row.within_rule
    assert "FAILS" in report.cells(vars(row))[8]


def test_module_cases_agree_with_stock():
    for case in load("modules", "cpu"):
        if case.name in ("RNN", "TransformerEncoderLayer"):
            subject = case.build()
            calls = fastlm.explain(subject.ours, *subject.args)
            assert calls
            assert all(e.ok for e in subject.errors(calls[0].ran))


def test_goals_are_held_row_by_row_and_in_the_mean():
    goals = {"forward": Goal(1e9, share=0.0, means={"group": 0.5}),
             "training": Goal(1e-9, memory=0.3, means={"group": 0.5})}
    case = next(c for c in load("ops", "cpu") if c.name == "linear_cross_entropy")
    forward, training = bench.measure_case(dataclasses.replace(case, goals=goals), "cpu", 0.01)
    assert forward.missed == ["ratio"]
    assert training.missed == ["memory"]  # not measured here, so not shown
    training.memory, training.baseline_memory, training.missed = 20, 100, []
    bench.hold(training, goals["training"])
    assert training.missed == []
    (mean,) = bench.means([forward, training])
    assert mean == {"name": "group", "wanted": 0.5, "rows": 2, "least": min(forward.ratio, training.ratio),
                    "found": pytest.approx((forward.ratio * training.ratio) ** 0.5),
                    "at_peak": pytest.approx((forward.at_peak * training.at_peak) ** 0.5)}
    # At the floor's time the share is 1, and the ratio that many times what it is.
    assert forward.at_peak * forward.peak_share == pytest.approx(forward.ratio)
    assert f"MISSED (at peak: {forward.at_peak:.2f}×)" in report.cells(vars(forward))[7]


@pytest.fixture
def timed(monkeypatch):
    """A case of a module with two baselines, whose times are given, and a list of the modes that it was timed in."""
    module, modes, seconds = torch.nn.Dropout(), [], dict(torch=3.0, other=1.0, fastlm=2.0)
    subject = Subject((torch.randn(3),), lambda x: module(x), {"torch": torch.sin, "other": torch.cos},
                      lambda ran: [measure.Error("result", 0.0, 0.0, 1.0)], modules=(module,), whole=True)
    case = Case("ops", "sine", "small", torch.float32, lambda: subject)

    def timings(candidates, *_):
        modes.append(module.training)
        return {name: measure.Timing(*[seconds[name]] * 3) for name in candidates}

    monkeypatch.setattr(measure, "timings", timings)
    monkeypatch.setattr(bench, "load", lambda *_: [case])
    return case, modes


def test_the_best_baseline_counts(timed):
    for row in bench.measure_case(timed[0], "cpu", 0.01):
        assert row.baselines == {"torch": 3.0, "other": 1.0}
        assert (row.baseline, row.baseline_seconds, row.seconds, row.ratio) == ("other", 1.0, 2.0, 0.5)


def test_slack_forgives_a_ratio_up_to_so_many_seconds(timed):
    for slack, missed in ((0.0, ["ratio"]), (0.5, ["ratio"]), (1.5, [])):
        goals = {"forward": Goal(0.9, slack=slack)}
        (row,) = bench.measure_case(dataclasses.replace(timed[0], modes=("forward",), goals=goals), "cpu", 0.01)
        assert row.missed == missed


def test_modules_are_timed_in_their_mode(timed):
    case, modes = timed
    list(bench.measure_case(case, "cpu", 0.01))
    assert modes == [False, True]
    for mode in ("forward", "training"):
        bench._call(case, mode, "fastlm", torch.get_num_threads())()
        assert case.build().modules[0].training == (mode == "training")
    for mode in ("forward", "training"):
        bench.memory_of("ops", "sine", "small", "float32", mode, "cpu", None, stock=False)
        assert case.build().modules[0].training == (mode == "training")


def test_a_mean_is_met_from_what_is_wanted_on():
    for found, said in ((0.9, "MISSED"), (1.0, "met"), (1.1, "met")):
        mean = {"name": "group", "rows": 2, "least": 0.5, "found": found, "wanted": 1.0}
        assert report.mean_cells(mean)[-1] == f"≥1.00× {said}"


def test_every_forces_each_implementation_that_can_run():
    """What cannot run here yields no row: nothing is passed off as something else."""
    rows = bench.run(("ops",), only="log_softmax", seconds=0.01, every=True)["rows"]
    assert {row["ran"] for row in rows} == {"stock"}
    case = next(c for c in load("ops", "cpu") if c.name == "log_softmax")
    assert not list(bench.measure_case(dataclasses.replace(case, forced="triton"), "cpu", 0.01))


@pytest.mark.parametrize("suite", [s for s in SUITES if s != "models"])
def test_every_suite_names_its_cases_once(suite):
    cases = list(load(suite, "cpu"))
    assert len({(c.name, c.case, c.dtype) for c in cases}) == len(cases) > 0
    assert all(c.suite == suite for c in cases)
    assert all(set(c.goals) <= set(c.modes) for c in cases)
    if suite not in EVERYTHING:
        assert any(c.goals for c in cases)


def test_curves_agree_between_layers():
    for curve in bench.curves(2, "cpu"):
        assert len(curve.stock_losses) == 2
        assert curve.difference < 1e-4, curve
        assert min(curve.stock_generated_per_s, curve.fastlm_generated_per_s) > 0


def test_a_capped_machine_is_named_so_and_caps_both_sides(monkeypatch):
    monkeypatch.setenv("FASTLM_MAX_ISA", "avx2")
    for name in bench.CAPS["avx2"]:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="caps fastlm alone; for torch set ATEN_CPU_CAPABILITY=avx2 ONEDNN"):
        bench.capped()
    for name, value in bench.CAPS["avx2"].items():
        monkeypatch.setenv(name, value)
    device = bench._cpu_name()
    assert device.endswith(", both capped to AVX2")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", str(1 << 32))
    assert bench._cpu_name().endswith(", both capped to AVX2, freed memory kept")
    assert report._slug({"device": device, "threads": 2}).endswith("-avx2-2t")


@pytest.mark.parametrize(("options", "message"), [
    (dict(suites=("nonsense",)), "ops, modules, models"),
    (dict(dtypes=["float7"]), "dtype is 'float7'"),
    (dict(dtypes=["int64"], only="log_softmax"), "dtype is 'int64'"),
    (dict(only="nonsense"), "no case.*contains 'nonsense'"),
])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bench.run(**options)


def test_report_is_self_contained(result, tmp_path):
    curve = {"model": "m", "stock_losses": [2.0, 1.0], "fastlm_losses": [2.0, 1.0], "difference": 0.0,
             "stock_tokens_per_s": 1.0, "fastlm_tokens_per_s": 2.0, "stock_generated_per_s": 4.0,
             "fastlm_generated_per_s": 12.0, "ran": {"lstm": "native"}}
    data, page = report.save(result | {"curves": [curve]}, tmp_path, "test")
    assert json.loads(data.read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "linear_cross_entropy" in text
    assert all(f"<td>{cell}</td>" in text for cell in ("1 → 2", "2.00×", "4 → 12", "3.00×"))
    assert not re.search(r'(src|href)="http', text)


def test_what_was_measured_survives_what_comes_after(tmp_path):
    kept = []

    def keep(result):
        kept.append(len(result["rows"]))
        report.save_partial(result, tmp_path, "test")

    result = bench.run(("ops",), only="log_softmax", seconds=0.01, keep=keep)
    assert kept == sorted(set(kept))
    assert kept[-1] == len(result["rows"])
    (partial,) = tmp_path.iterdir()
    assert json.loads(partial.read_text()) == json.loads(json.dumps(result))
    assert report.save(result, tmp_path, "test")[0].exists()
    assert not partial.exists()


def test_readme_is_filled_from_results(result, tmp_path):
    data = report.save(result, tmp_path, "test")[0]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n<!-- results: {data.name} -->\nold\n<!-- end of results -->\nafter\n")
    for _ in range(2):  # filling twice changes nothing
        report.update_readme(readme, tmp_path)
        text = readme.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
        groups = re.findall(r"^\| linear_cross_entropy \| f32 (?:forward|training) \| (\d+) \|", text, re.M)
        assert len(groups) == 2
        assert sum(map(int, groups)) == len(result["rows"])
    result["rows"][0]["goal"]["ratio"] = 1.5  # a row with a figure of its own gets a line of its own
    data.write_text(json.dumps(result))
    report.update_readme(readme, tmp_path)
    assert readme.read_text().count("≥1.50×") == 1
    readme.write_text(f"<!-- summary: {data.name} -->\n<!-- end of results -->\n")
    mean = r"\d+\.\d\d×( \(\d+\.\d\d–\d+\.\d\d\))?( \\\*)?"
    report.update_readme(readme, tmp_path)
    text = readme.read_text()
    assert "| what | f32 forward | f32 training |" in text
    assert re.search(rf"^\| linear_cross_entropy \| {mean} \| {mean} \|$", text, re.M), text
    for ran, found in (("forward", rf"stock \| {mean}"), ("training", "")):  # stock runs one mode, then both
        for row in result["rows"]:
            if row["mode"] == ran:
                row["ran"] = "stock"
        data.write_text(json.dumps(result))
        report.update_readme(readme, tmp_path)
        text = readme.read_text()
        assert bool(re.search(rf"^\| linear_cross_entropy \| {found} \|$", text, re.M)) == bool(found), text
        assert text.count("for: linear_cross_entropy.") == (not found)


def test_readme_runs(capsys):
    """Its Python from top to bottom, and what `explain` prints there."""
    readme = Path(__file__).parents[1].joinpath("README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)
    assert len(blocks) > 5
    names = {}
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out.startswith("op    ran")


def test_profile_compares_three_variants(tmp_path):
    x = torch.randn(64, 32, requires_grad=True)
    weight, target = torch.randn(500, 32, requires_grad=True), torch.randint(500, (64,))

    def step():
        return torch.autograd.grad(fastlm.ops.linear_cross_entropy(x, weight, target), (x, weight))
    found = fastlm.profile(step, trace=tmp_path / "new/trace.json")
    assert set(found.seconds) == {"fastlm", "stock", "reference"}
    assert found.calls[0].ran in ("native", "blocked")
    assert found.flops >= 3 * 2 * 64 * 32 * 500
    names = {o.name for o in found.operators["fastlm"]}
    assert "aten::mm" in names
    assert any(name.startswith("fastlm::linear_cross_entropy") for name in names)
    assert any(name.startswith("fastlm::linear_cross_entropy") and name.endswith("_backward") for name in names)
    assert json.loads((tmp_path / "new/trace.json").read_text())["traceEvents"]
    assert "GEMM peak" in str(found)


def test_profile_runs_nothing_where_its_trace_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for trace in (tmp_path, tmp_path / "file/trace.json"):
        with pytest.raises(OSError, match=str(tmp_path)):
            fastlm.profile(lambda: pytest.fail("it runs"), trace=trace)


def test_profile_of_a_module():
    from fastlm.tools.profile import target
    assert fastlm.profile(target("Linear")).flops > 0


def test_profile_of_an_unknown_name_lists_what_there_is():
    from fastlm.tools.profile import target

    with pytest.raises(ValueError, match=r"lstm.*LSTM.*TransformerLM"):
        target("nonsense")
