"""The CUDA sources, without a GPU: they compile for three GPU generations, and their kernels compute the right numbers.

For the second, g++ compiles the same sources against `cuda_emulation/cuda_runtime.h`, which runs every thread of every
block on the host in random order, under the address and undefined-behaviour sanitizers.
`pytest tests/test_cuda_sources.py -s` prints the registers of each kernel.
"""

import os
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
from fastlm.ops import recurrent_kernels

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
EMULATION = Path(__file__).parent / "cuda_emulation"
TARGETS = re.findall(r'"(\w+)"', re.search(r"CUDA_TARGETS = (\[.*\])", (ROOT / "setup.py").read_text()).group(1))
REGISTERS = 128  # a thread: two blocks of 256 threads fit a multiprocessor's 65536
SHARED_MEMORY = 48 << 10  # a block, without asking for more


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(source, tmp_path):
    generations = [flag for t in TARGETS for flag in ("-gencode", f"arch=compute_{t},code=sm_{t}")]
    report = run(["nvcc", "-O3", "-std=c++17", "--threads", "0", "-Xptxas", "-v", *generations,
                  "-c", source, "-o", tmp_path / "kernels.o"])
    assert "warning" not in report, report
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill "
                         r"stores, (\d+) bytes spill loads.*?Used (\d+) registers.*?(\d+) bytes smem", report, re.S)
    names = {name for name, *_ in kernels}
    assert names
    assert sorted(k[:2] for k in kernels) == sorted((n, f"sm_{t}") for n in names for t in TARGETS), report
    for name, target, *numbers in kernels:
        stack, stores, loads, registers, shared = map(int, numbers)
        print(f"\n{target:8} {registers:4} registers {shared / 1024:5.1f} KiB shared  {name}", end="")
        assert (stack, stores, loads) == (0, 0, 0), name
        assert registers <= REGISTERS, name
        assert shared <= SHARED_MEMORY, name


def run(*commands, **environment):
    """Run commands side by side and return what they print."""
    started = [subprocess.Popen([str(word) for word in command], text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env={**os.environ, **environment}) for command in commands]
    printed = [process.communicate(timeout=600)[0] for process in started]
    for process, text in zip(started, printed, strict=True):
        assert process.returncode == 0, text
    return "".join(printed)


def sanitizers():
    return [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libubsan.so", "libstdc++.so")]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Build the extension with its CUDA kernels emulated, and return a function that runs `run.py` on it."""
    if not sys.platform.startswith("linux") or not shutil.which("g++"):
        pytest.skip("needs Linux and g++")
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("emulation")
    headers = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    compiler = ["g++", "-std=c++17", "-fPIC"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    python = ["-fvisibility=hidden", "-DFASTLM_GENERIC", "-DFASTLM_CUDA", *headers]
    jobs = [[*compiler, *python, "-c", ROOT / "csrc/bindings.cpp", "-o", folder / "bindings.o"]]
    jobs += [[*compiler, "-DFASTLM_ISA=generic", "-fopenmp", "-c", path, "-o", folder / f"{path.stem}_cpu.o"]
             for path in (ROOT / "csrc/cpu").glob("*.cpp")]
    jobs += [[*compiler, "-O1", "-g", "-Wall", "-Wextra", "-Werror", *sanitize, f"-I{EMULATION}", "-x", "c++",
              "-c", path, "-o", folder / f"{path.stem}_cuda.o"] for path in SOURCES]
    run(*jobs)
    run(["g++", "-shared", "-fopenmp", *sanitize, *folder.glob("*.o"), "-o", folder / "_native.so"])

    def call(*sample, **environment):
        return run([sys.executable, EMULATION / "run.py", folder / "_native.so", *sample],
                   ASAN_OPTIONS="detect_leaks=0", LD_PRELOAD=" ".join(sanitizers()), PYTHONPATH=str(ROOT),
                   **environment)
    return call


def verdicts(printed):
    return {name: verdict for name, verdict in re.findall(r"^((?:lstm|gru|rnn) .*?): (.*)$", printed, re.M)}


def test_emulated_kernels_obey_the_error_rule(emulated):
    found = verdicts(emulated())
    assert {name: verdict for name, verdict in found.items() if verdict != "ok"} == {}
    assert len(found) == 3 * 14 + 2


def test_emulation_notices_a_missing_barrier(emulated):
    found = verdicts(emulated("T2 B17 H33", FASTLM_EMULATED_BARRIERS="0"))
    assert len(found) == 3
    assert "ok" not in found.values()


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_reason_on_a_gpu(name, monkeypatch):
    """A CUDA call says why it runs stock: how the extension was built, or else that nobody has run it there."""
    op = next(op for op in ops.ALL if op.name == name)
    if op.implementations["native"].run is None:
        pytest.skip(op.implementations["native"].cannot())
    with FakeTensorMode(allow_non_fake_inputs=True):
        sample = next(iter(op.samples("test", torch.float32, "cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9))
    ran, declined = op.choose(sample.args)
    expected = recurrent_kernels.cuda_missing(sys.modules["fastlm._native"]) or "not yet run on a GPU"
    assert (ran, declined) == ("torch", {"native": expected})


def test_reasons_against_cuda(monkeypatch):
    monkeypatch.setattr(recurrent_kernels, "build_report", lambda: {"skipped": {"cuda": "nvcc not found"}})
    assert recurrent_kernels.cuda_missing(SimpleNamespace()) == "the extension was built without CUDA: nvcc not found"

    def with_driver(version):
        return SimpleNamespace(cuda=SimpleNamespace(built_version=13000, driver_version=lambda: version))

    assert "driver is for CUDA 12" in recurrent_kernels.cuda_missing(with_driver(12080))
    assert "no NVIDIA driver" in recurrent_kernels.cuda_missing(with_driver(0))
    assert recurrent_kernels.cuda_missing(with_driver(13010)) is None
