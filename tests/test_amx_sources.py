"""The kernels that multiply pairs of bfloat16, by AMX or AVX512_BF16, on machines without: g++ compiles them against
`amx_emulation/tiles.h` and they must compute the right numbers; on machines with, the emulation must compute what the
processor does.

With --deep all samples run, under the address and undefined-behaviour sanitizers.
"""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EMULATION = Path(__file__).parent / "amx_emulation"
AVX512 = shlex.split("-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq")
PAIRS = {"avx512_bf16": "-DFASTLM_DOTS", "amx": "-DFASTLM_TILES"}
SOURCES = [("rnn", "avx512_bf16"), ("rnn", "amx"), ("quant", "amx"), ("product_tiles", "amx")]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

native = sys.modules.get("fastlm._native") or pytest.importorskip("fastlm._native")


def run(*commands, **environment):
    """Run commands side by side and return what they print."""
    started = [subprocess.Popen([str(word) for word in command], text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env=os.environ | environment) for command in commands]
    printed = [process.communicate(timeout=600)[0] for process in started]
    for process, text in zip(started, printed, strict=True):
        assert process.returncode == 0, text
    return "".join(printed)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory, request):
    """Build the extension with its products emulated, and return a function that runs `run.py` on it."""
    if native.isa != "avx512":
        pytest.skip("needs AVX-512: only the products are emulated")
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("emulation")
    sanitize = ["-g", *SANITIZE] if request.config.getoption("--deep") else []
    compiler = ["g++", "-std=c++17", "-fPIC", "-fopenmp"]
    python = ["-fvisibility=hidden", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    warnings = shlex.split("-Wall -Wextra -Werror -Wno-uninitialized -Wno-maybe-uninitialized")  # of GCC's intrinsics
    pairs = ["-O1", *warnings, *AVX512, "-include", EMULATION / "tiles.h", *sanitize]
    defines = ["-DFASTLM_GENERIC", "-DFASTLM_AVX512_BF16", "-DFASTLM_AMX", "-DFASTLM_EMULATED"]
    run(*([*compiler, *python, *defines, "-c", path, "-o", folder / f"python_{path.stem}.o"]
          for path in (ROOT / "csrc/isa.cpp", *(ROOT / "csrc/python").glob("*.cpp"))),
        *([*compiler, *pairs, f"-DFASTLM_ISA={isa}", PAIRS[isa], "-c", ROOT / f"csrc/cpu/{name}.cpp", "-o",
           folder / f"{name}_{isa}.o"] for name, isa in SOURCES),
        *([*compiler, "-DFASTLM_ISA=generic", "-c", path, "-o", folder / f"{path.stem}_generic.o"]
          for path in (ROOT / "csrc/cpu").glob("*.cpp")))
    run([*compiler, "-shared", *sanitize, *folder.glob("*.o"), "-o", folder / "_native.so"])
    libraries = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
                 for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    preload = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"} if sanitize else {}

    def call(*sample, script="run.py", **environment):
        return run([sys.executable, EMULATION / script, folder / "_native.so", *sample], PYTHONPATH=str(ROOT),
                   **preload, **environment)
    return call


def verdicts(printed):
    return {name: verdict for name, verdict in re.findall(r"^((?:lstm|gru|rnn) .*?): \w+ (.*)$", printed, re.M)}


# A row of tiles that is full, one that is not, and one number more; every way to walk through time.
SOME = ("T2 B16 H32", "T3 B17 H31", "T2 B33 H65", "tall packed", "batch first", "no sequences", "not a number",
        "outliers")


@pytest.mark.parametrize("isa", PAIRS)
def test_emulated_products_obey_the_error_rule(emulated, request, isa):
    deep = request.config.getoption("--deep")
    found = verdicts(emulated(*(() if deep else SOME), FASTLM_MAX_ISA=isa))
    assert {name: verdict for name, verdict in found.items() if verdict != "ok"} == {}
    kinds = {tuple(name.split()[:2]) for name in found}
    assert kinds == {(op, p) for op in ("lstm", "gru", "rnn") for p in ("bfloat16", "high", "medium")}
    assert len(found) > 250 if deep else len(found) == 9 * len(SOME)


def verdicts_of_products(emulated, **environment):
    if not native.vnni:
        pytest.skip("needs VNNI: what few rows are multiplied with is not emulated")
    return dict(line.split(": ", 1) for line in emulated(script="products.py", **environment).splitlines())


def test_emulated_tiles_multiply_large_matrices_and_quantized_weights(emulated):
    found = verdicts_of_products(emulated)
    assert len(found) == 16
    assert {name: verdict for name, verdict in found.items() if verdict != "ok"} == {}


@pytest.mark.parametrize("fault", ["row", "pair"])
def test_a_fault_in_a_tile_is_noticed(emulated, fault):
    found = verdicts_of_products(emulated, FASTLM_TILE_FAULT=fault)
    # Float32 and float16 multiply weights of four bits by vectors.
    assert {name for name, verdict in found.items() if verdict == "ok"} == {
        f"int4 {size} torch.{dtype}" for size in (32, 64, 128) for dtype in ("float32", "float16")}


@pytest.mark.parametrize("isa", PAIRS)
@pytest.mark.parametrize("fault", ["row", "pair"])
def test_a_fault_is_noticed(emulated, fault, isa):
    found = verdicts(emulated("T3 B17 H31", FASTLM_TILE_FAULT=fault, FASTLM_MAX_ISA=isa))
    assert len(found) == 9
    # float32 vectors run at "high" where there are no tiles.
    assert {name for name, verdict in found.items() if verdict == "ok"} == {
        name for name in found if isa != "amx" and " high " in name}


@pytest.mark.skipif(not native.pairs, reason="needs a processor with AVX512_BF16 or AMX")
@pytest.mark.parametrize("sample", ["T3 B17 H31", "hidden 129", "outliers"])
def test_emulation_is_what_the_processor_does(emulated, sample):
    """To the bit, in bfloat16: for float32 the emulated extension has the generic vectors besides."""
    real = run([sys.executable, EMULATION / "run.py", native.__file__, sample], PYTHONPATH=str(ROOT))
    found, expected = (re.findall("^.* bfloat16 .*$", printed, re.M)
                       for printed in (emulated(sample, FASTLM_MAX_ISA=native.pairs), real))
    assert len(found) == 3
    assert found == expected
