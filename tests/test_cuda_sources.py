"""The CUDA sources, without a GPU: they compile for three GPU generations, without a spill and without a barrier that a
warp could come to in parts, and their kernels compute the right numbers.

For the last, g++ compiles the same sources against `cuda_emulation/cuda_runtime.h`, which runs every thread of every
block on the host in random order, under the address and undefined-behaviour sanitizers.
`pytest tests/test_cuda_sources.py -s` prints the registers of each kernel.
"""

import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlm import ops
from fastlm.ops import gpu, recurrent_cuda

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
EMULATION = Path(__file__).parent / "cuda_emulation"
TARGETS = re.findall(r'"(\w+)"', re.search(r"CUDA_TARGETS = (\[.*\])", (ROOT / "setup.py").read_text()).group(1))
FORMATS = ["float32", "float64", "tf32", "bfloat16", "float16"]
CELLS, GATES, SIZES = {"lstm": 0, "gru": 1, "tanh": 2, "relu": 3}, (4, 3, 1, 1), (4, 8, 4, 2, 2)
CHEAPEST, GRID, CLUSTER, PLANE = range(4)
# Multiprocessors, shared memory of a block, blocks of a cluster, clusters of a plane: A100, H100 (PCIe, SXM), B200, and
# a slice of an H100.
CHIPS = {"A100": (108, 163 << 10, 0, 0), "H100 PCIe": (114, 227 << 10, 16, 13), "H100": (132, 227 << 10, 16, 15),
         "B200": (148, 227 << 10, 16, 16), "slice": (16, 227 << 10, 8, 1)}
KERNELS = 8 + 6  # of a format by tensor cores: forward and backward on a grid
NARROW = 2 * 8 + 3 + 3 + 4  # besides, of one of 16 bits: forward with weights in registers, in clusters, on planes


def reports(sources, targets, folder):
    """Yield (kernel, target, stack bytes, spill stores, spill loads, registers) as ptxas reports them."""
    generations = [flag for t in targets for flag in ("-gencode", f"arch=compute_{t},code=sm_{t}")]
    text = run(*(["nvcc", "-O3", "-std=c++17", "-Xptxas", "-v", *generations, "-c", source,
                  "-o", folder / f"{source.stem}.o"] for source in sources))
    assert "warning" not in text, text
    for name, target, *numbers in re.findall(
            r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers", text, re.S):
        yield name, target, *map(int, numbers)


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """Compile the bfloat16 kernels for Hopper, 15 seconds of one core, or with --deep all kernels for all targets.

    Returns ptxas' reports, the folder of the objects, the targets, and whether it was --deep.
    """
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    deep, folder = request.config.getoption("--deep"), tmp_path_factory.mktemp("objects")
    sources, targets = (SOURCES, TARGETS) if deep else ([s for s in SOURCES if s.stem == "rnn_bf16"], ["90a"])
    return list(reports(sources, targets, folder)), folder, targets, deep


def test_compiles_without_spills(compiled):
    kernels, _, targets, deep = compiled
    names = {name for name, *_ in kernels}
    assert len(names) == (3 * KERNELS + 2 * NARROW + 2 * (3 + 3) + 2 if deep else KERNELS + NARROW)
    assert sorted(k[:2] for k in kernels) == sorted((n, f"sm_{t}") for n in names for t in TARGETS if t in targets)
    for name, target, stack, stores, loads, registers in kernels:
        print(f"\n{target:8} {registers:4} registers  {name}", end="")
        # Two groups that take turns leave no register: some words of the widest tiles, on some generations.
        most = 96 if "Lb1ELi2EEENS0_7Forward" in name else 0
        assert max(stack, stores, loads) <= most, (name, target)


def parted(code):
    """Return the addresses of barriers and products that a warp may come to in parts.

    `code` maps addresses to instructions. Threads may part at a branch by a predicate of their own behind a BSSY, until
    they are where it says that they meet, or at a WARPSYNC; a BRA.DIV goes on where they are together.
    """
    found = set()
    for start, instruction in code.items():
        region = re.match(r"BSSY\S* (B\d+), 0x(\w+)", instruction)
        ways, seen = [(start + 16, False)] if region else [], set()
        while ways:
            way = address, apart = ways.pop()
            if way in seen or address == int(region[2], 16) or address not in code:
                continue
            seen.add(way)
            now = code[address]
            if apart and re.match(r"(@!?P\d+ )?(BAR|UCGABAR_\w+|[A-Z]MMA)\b", now):
                found.add(address)
            apart = apart and "WARPSYNC" not in now and "BRA.DIV" not in now
            if (jump := re.search(r"\bBRA\b.* 0x(\w+)", now)) and "BRA.DIV" not in now:
                apart = apart or now.startswith(("@P", "@!P"))
                ways.append((int(jump[1], 16), apart))
            if leaves := re.match(rf"(@!?P\d+)? ?BREAK\S* {region[1]}$", now):
                if leaves[1]:  # threads with the predicate leave for the region around, by the next branch or past it
                    at = next(a for a in itertools.count(address + 16, 16) if re.search(r"\bBRA\b|EXIT", code[a]))
                    branch = re.match(r"(@!?P\d+) BRA\b.* 0x(\w+)", code[at])
                    if branch and branch[1].replace("!", "") == leaves[1].replace("!", ""):
                        ways.append((at + 16 if branch[1] == leaves[1] else int(branch[2], 16), apart))
                    else:  # as if none left
                        ways.append((address + 16, apart))
            elif not re.match(r"BRA 0x|EXIT", now):
                ways.append((address + 16, apart))
    return found


def code_of(listing):
    return {int(address, 16): instruction.strip()
            for address, instruction in re.findall(r"/\*(\w{4,5})\*/\s+([^;]*);", listing)}


HUNG = """  /* GRU, 512 units, 64 sequences, at the end of a step: what waited for ever on an H200, shortened. */
    /*0000*/ BSSY B0, 0x60 ;
    /*0010*/ @!P1 BRA 0x40 ;
    /*0020*/ @P2 BRA 0x50 ;
    /*0030*/ STG.E.U16.STRONG.GPU desc[UR12][R36.64], R25 ;
    /*0040*/ @!P2 BAR.SYNC.DEFER_BLOCKING 0x0 ;
    /*0050*/ BSYNC B0 ;
    /*0060*/ EXIT ;
"""


def test_no_barrier_where_a_warp_is_apart(compiled):
    """ptxas 13.0 moves a barrier there where its condition is also one of the branch before: see Grid::put_all."""
    assert parted(code_of(HUNG)) == {0x40}
    assert parted(code_of(HUNG.replace("0x60", "0x40"))) == set()  # meeting before it
    tool = shutil.which("cuobjdump")
    if not tool and (triton := importlib.util.find_spec("triton")):
        tool = shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends/nvidia/bin")
    if not tool:
        pytest.skip("cuobjdump is not installed")
    kernels, folder, _, _ = compiled
    text = "".join(subprocess.check_output([tool, "-sass", path], text=True, stderr=subprocess.DEVNULL)
                   for path in folder.glob("*.o"))
    listings = [code_of(part) for part in text.split("Function : ")[1:]]
    assert len(listings) == len(kernels)
    assert sum("BAR.SYNC" in " ".join(code.values()) for code in listings) > len(listings) / 2
    assert [parted(code) for code in listings] == [set()] * len(listings)


def run(*commands, **environment):
    """Run commands side by side and return what they print."""
    started = [subprocess.Popen([str(word) for word in command], text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env={**os.environ, **environment}) for command in commands]
    printed = [process.communicate(timeout=1200)[0] for process in started]
    for process, text in zip(started, printed, strict=True):
        assert process.returncode == 0, text
    return "".join(printed)


def sanitizers():
    return [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libubsan.so", "libstdc++.so")]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Build the extension with its CUDA kernels emulated, and return a function that runs `run.py` on it."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("needs Linux on x86-64 and g++")
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("emulation")
    headers = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    compiler = ["g++", "-std=c++17", "-fPIC"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    python = ["-fvisibility=hidden", "-DFASTLM_GENERIC", "-DFASTLM_CUDA", *headers]
    jobs = [[*compiler, *python, "-c", path, "-o", folder / f"python_{path.stem}.o"]
            for path in (ROOT / "csrc/isa.cpp", *(ROOT / "csrc/python").glob("*.cpp"))]
    jobs += [[*compiler, "-DFASTLM_ISA=generic", "-fopenmp", "-c", path, "-o", folder / f"{path.stem}_cpu.o"]
             for path in (ROOT / "csrc/cpu").glob("*.cpp")]
    jobs += [[*compiler, "-DFASTLM_EMULATED", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *sanitize,
              f"-I{EMULATION}", "-x", "c++", "-c", path, "-o", folder / f"{path.stem}_cuda.o"] for path in SOURCES]
    run(*jobs)
    run(["g++", "-shared", "-fopenmp", *sanitize, *folder.glob("*.o"), "-o", folder / "_native.so"])

    def call(script, *arguments, **environment):
        return run([sys.executable, script, folder / "_native.so", *arguments], ASAN_OPTIONS="detect_leaks=0",
                   LD_PRELOAD=" ".join(sanitizers()), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **environment)
    return call


def verdicts(printed):
    return {name: verdict for name, verdict in re.findall(r"^((?:lstm|gru|rnn) .*?): (.*)$", printed, re.M)}


def test_emulated_kernels_obey_the_error_rule(emulated, request):
    """Forward and every gradient, and every tile of the 16-bit kernels was there."""
    deep = request.config.getoption("--deep")
    printed = emulated(EMULATION / "run.py", **({"FASTLM_DEEP": "1"} if deep else {}))
    found = verdicts(printed)
    assert {name: verdict for name, verdict in found.items() if verdict != "ok"} == {}
    assert len(found) == 3 * (7 + 2 * (7 + 2) + 3 * (1 + 2) + 2) + 2 + 6 + 3 + 2 * (8 + 2 + 1 + 6 + 1 + 1) + \
        (1 + 2 + 4 if deep else 0)
    assert len(re.findall("^exchanged", printed, re.M)) == 3
    kinds = re.findall(r"^tiles rnn_(\w+) (\w+) 3 (\d+) (\d) (\d) (\d)$", printed, re.M)
    ran = {kind[:4] for kind in kinds}
    assert ran >= {("forward", "grid", m, n) for m in "124" for n in "124" if m + n != "44"}, ran
    assert ran >= {("backward", "grid", m, n) for m, n in ("11", "12", "14", "21", "22", "41")}, ran
    assert ran >= {("backward", "plane", m, n) for m in "46" for n in "12"}, ran
    ran = {(way, m, warps) for way, exchange, m, _, warps, _ in kinds if exchange == "cluster"}
    assert ran == {(way, *kind) for way in ("forward", "backward") for kind in (("16", "4"), ("16", "8"), ("32", "8"))}
    ran = {(m, n) for way, exchange, m, n, _, abreast in kinds if exchange == "grid" and abreast == "2"}
    assert len(ran) > 3, ran


@pytest.mark.parametrize("omitted", ["FASTLM_EMULATED_BARRIERS", "FASTLM_EMULATED_WAITS"])
def test_emulation_notices_what_is_missing(emulated, omitted):
    """Without the barriers in a block, or without waiting for other blocks, the numbers are wrong."""
    found = verdicts(emulated(EMULATION / "run.py", "T2 B17 H33", **{omitted: "0"}))
    assert len(found) == 3 * 7 + 2 * 2
    assert "ok" not in found.values()


def test_what_is_published(tmp_path):
    """Every number is seen where it is published, none is taken for a place that is empty, and a wait has an end."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    run(["g++", "-O2", "-std=c++17", "-DFASTLM_EMULATED", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
         f"-I{EMULATION}", f"-I{ROOT / 'csrc/cuda'}", EMULATION / "publish.cpp", "-o", tmp_path / "publish"])
    run([tmp_path / "publish"])


# --- plans --------------------------------------------------------------------------------------------------------


def plans_of(emulated, folder, wanted):
    """Return `rnn_plan` of each (layer, backward, chip)."""
    (folder / "wanted.json").write_text(json.dumps(wanted))
    return json.loads(emulated(EMULATION / "plans.py", folder / "wanted.json").splitlines()[-1])


def test_plans_on_a_grid(emulated, tmp_path):
    """Every unit has one owner, every sequence one team at a time, and all of it fits the chip."""
    layers = list(itertools.product(CELLS, FORMATS, (1, 3, 16, 17, 64, 500), (1, 7, 33, 256, 650, 1024, 2048), (1, 2)))
    wanted = [((CELLS[cell], FORMATS.index(form), batch, hidden, directions, GRID), backward, chip)
              for cell, form, batch, hidden, directions in layers for backward in (False, True)
              for chip in CHIPS.values()]
    plans = plans_of(emulated, tmp_path, wanted)
    for (layer, backward, chip), plan in zip(wanted, plans, strict=True):
        _, number, batch, hidden, directions, _ = layer
        tensor_core = FORMATS[number] not in ("float32", "float64")
        if plan is None:
            assert hidden > 256 or chip == CHIPS["slice"], layer
            continue
        gates, size, sequences = GATES[layer[0]], SIZES[number], 8 * plan["n_tiles"]
        assert plan["exchange"] == GRID and plan["ranks"] == 0
        # Slice s owns units s·units ≤ u < (s + 1)·units that there are: none is left over, and none has no work.
        assert (plan["slices"] - 1) * plan["units"] < hidden <= plan["slices"] * plan["units"]
        assert plan["units"] * (1 if backward else gates) <= 16 * plan["m_tiles"]
        assert plan["units"] * sequences <= 2 * 256
        assert (plan["groups"] - 1) * sequences < batch <= plan["groups"] * sequences
        assert plan["blocks"] == directions * plan["teams"] * plan["slices"] <= chip[0]
        assert 1 <= plan["teams"] <= plan["groups"] <= plan["teams"] * plan["turns"]
        assert plan["depth"] == plan["row"] == -(-hidden // 32) * 32 * (gates if backward else 1)
        assert plan["held"] == (not backward and size == 2 and hidden <= 1024)
        assert plan["abreast"] == (2 if plan["held"] and plan["teams"] < plan["groups"] else 1)
        weights = 16 * plan["m_tiles"] * (plan["depth"] * size + (0 if tensor_core else 16))
        sums = 8 * sequences * (16 * plan["m_tiles"] + 4) * max(4, size)
        assert plan["shared"] == weights + sums <= chip[1]
        assert plan["workspace"] == directions * plan["groups"] * sequences * plan["row"] * size


def test_plans_of_clusters(emulated, tmp_path):
    """A team is one cluster of one direction and group; all that a warp multiplies with has a place."""
    layers = list(itertools.product((0, 1, 2), (2, 3, 4), (1, 8, 9, 17, 64, 500), (1, 33, 256, 257, 512, 513), (1, 2)))
    wanted = [((*layer, CLUSTER), backward, CHIPS[chip]) for layer in layers for backward in (False, True)
              for chip in ("A100", "H100", "slice")]
    for (layer, backward, chip), plan in zip(wanted, plans_of(emulated, tmp_path, wanted), strict=True):
        cell, number, batch, hidden, directions, _ = layer
        if plan is None:
            assert cell == 2 or SIZES[number] == 4 or hidden > 32 * min(chip[2], 16)
            continue
        assert plan["exchange"] == CLUSTER and plan["units"] == 4 * plan["warps"]
        assert hidden <= plan["depth"] == 16 * plan["m_tiles"]
        assert plan["slices"] == plan["ranks"] == -(-hidden // plan["units"]) <= min(chip[2], 16)
        assert plan["teams"] == plan["groups"] == -(-batch // 8)
        assert plan["blocks"] == directions * plan["teams"] * plan["slices"]
        assert plan["workspace"] == 0
        received = plan["warps"] * (128 * plan["slices"] + 256) if backward else 256 * plan["m_tiles"]
        assert 128 + 2 * received <= plan["shared"] <= chip[1] < 2 * plan["shared"]


def test_plans_of_planes(emulated, tmp_path):
    """Every unit has a place in a row and in a column, and clusters are no more than the chip holds."""
    layers = list(itertools.product((0, 1, 2), (2, 3, 4), (1, 8, 9, 64, 500), (1, 33, 256, 650, 768, 1024), (1, 2)))
    wanted = [((*layer, PLANE), True, CHIPS[chip]) for layer in layers for chip in ("A100", "H100")]
    for (layer, _, chip), plan in zip(wanted, plans_of(emulated, tmp_path, wanted), strict=True):
        cell, number, _, hidden, directions, _ = layer
        if plan is None:
            assert cell == 2 or SIZES[number] == 4 or not chip[3] or directions == 2
            continue
        assert plan["exchange"] == PLANE and plan["ranks"] == 8 and plan["slices"] % 8 == 0
        assert plan["units"] * plan["slices"] >= hidden > plan["units"] * (plan["slices"] - 8)
        assert plan["units"] * 8 <= 16 * plan["m_tiles"]
        assert plan["depth"] == plan["row"] == -(-plan["slices"] // 8 * plan["units"] // 32) * 32 * GATES[cell]
        assert plan["blocks"] == plan["teams"] * plan["slices"] <= 8 * chip[3]
        assert plan["groups"] <= plan["teams"] * plan["turns"]
        assert plan["workspace"] == plan["groups"] * 8 * 8 * plan["n_tiles"] * plan["depth"] * 2
        assert plan["shared"] <= chip[1] < 2 * plan["shared"]


def test_cheapest_plan(emulated, tmp_path):
    """The one that is taken costs no more than any that may be asked for."""
    layers = list(itertools.product((0, 1), (3,), (1, 16, 64), (64, 256, 512, 1024), (1, 2)))
    wanted = [((*layer, exchange), backward, CHIPS["H100"]) for layer in layers for backward in (False, True)
              for exchange in (CHEAPEST, GRID, CLUSTER, PLANE)]
    plans = plans_of(emulated, tmp_path, wanted)
    for cheapest, *others in zip(plans[::4], plans[1::4], plans[2::4], plans[3::4], strict=True):
        assert cheapest["cost"] == min(plan["cost"] for plan in others if plan)


# The fastest of an LSTM in bfloat16 on an H200, where it was by 5 % or more (26 November 2026).
FASTEST = {False: {(256, 1): CLUSTER, (256, 16): CLUSTER, (256, 64): CLUSTER, (512, 1): CLUSTER, (512, 16): CLUSTER,
                   (512, 64): GRID, **dict.fromkeys(itertools.product((650, 768, 1024), (1, 16, 64)), GRID)}}
FASTEST[True] = FASTEST[False] | {(650, 1): PLANE, (768, 1): PLANE, (768, 16): PLANE, (1024, 1): PLANE}


def test_fastest_plan(emulated, tmp_path):
    """Estimates choose what was measured to be the fastest, forward and backward."""
    wanted = [((cell, 3, batch, hidden, 1, CHEAPEST), backward, CHIPS["H100"]) for cell in (0, 1)
              for backward, rows in FASTEST.items() for hidden, batch in rows]
    found = {(cell, backward, hidden, batch): plan["exchange"] for ((cell, _, batch, hidden, *_), backward, _), plan in
             zip(wanted, plans_of(emulated, tmp_path, wanted), strict=True)}
    for (cell, backward, *shape), exchange in found.items():
        if backward and tuple(shape) in ((650, 16), (1024, 16)):  # nearly the same
            continue
        assert exchange == FASTEST[backward][tuple(shape)], (cell, backward, shape)


def test_plans_of_models(emulated, tmp_path):
    """What benchmarks hold the kernels to: 16 bits at H ≤ 1024 have a plan on an H100, in two turns at most."""
    wanted = [((CELLS[cell], FORMATS.index("bfloat16"), batch, hidden, 1, GRID), backward, CHIPS["H100"])
              for cell in ("lstm", "gru") for batch in (1, 16, 64) for hidden in (256, 512, 650, 768, 1024)
              for backward in (False, True)]
    for (layer, backward, _), plan in zip(wanted, plans_of(emulated, tmp_path, wanted), strict=True):
        print(layer, "backward" if backward else "forward", plan)
        assert 2 * plan["teams"] >= plan["groups"]


# --- reasons ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_reason_on_a_gpu(name, monkeypatch):
    """A CUDA call says why it runs stock: how the extension was built, or else that nobody has run it on such a GPU."""
    op = next(op for op in ops.ALL if op.name == name)
    if op.implementations["native"].run is None:
        pytest.skip(op.implementations["native"].cannot())
    with FakeTensorMode(allow_non_fake_inputs=True):
        sample = next(iter(op.samples("test", torch.float32, "cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=8))
    monkeypatch.setattr(gpu, "_asked", lambda device: (8, 0))
    ran, declined = op.choose(sample.args)
    expected = recurrent_cuda.missing(sys.modules["fastlm._native"]) or (
        "not yet run on a GPU of compute capability 8.0")
    assert (ran, declined) == ("torch", {"native": expected})


def test_reasons_against_cuda(monkeypatch):
    monkeypatch.setattr(recurrent_cuda, "build_report", lambda: {"skipped": {"cuda": "nvcc not found"}})
    assert recurrent_cuda.missing(SimpleNamespace()) == "the extension was built without CUDA: nvcc not found"

    def with_driver(version):
        return SimpleNamespace(cuda=SimpleNamespace(built_version=13000, driver_version=lambda: version))

    assert "driver is for CUDA 12" in recurrent_cuda.missing(with_driver(12080))
    assert "no NVIDIA driver" in recurrent_cuda.missing(with_driver(0))
    assert recurrent_cuda.missing(with_driver(13010)) is None
