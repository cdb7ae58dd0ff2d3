"""The kernels of the instruction sets that this CPU does not choose: FASTLM_MAX_ISA makes a fresh process run them."""

import os
import subprocess
import sys

import pytest

import fastlm

native = pytest.importorskip("fastlm._native")

# Recurrent layers in all their types, which have code of their own; each other sample in one type, by turns.
PARITY = """
import torch
import fastlm._native as native
from fastlm import measure
from fastlm.ops import ALL
from tests.parity import keep_error_rule
from tests.test_ops import DTYPES, args_of
assert {isa!r} in (native.isa, native.pairs), native.isa
for op in ALL:
    if "native" not in op.implementations:
        continue
    recurrent, cannot = op.name in ("lstm", "gru", "rnn"), op.implementations["native"].cannot
    for turn, dtype in enumerate(DTYPES):
        for i, sample in enumerate(op.samples("test", dtype, "meta")):
            chosen = dtype is not torch.float16 if recurrent else i % len(DTYPES) == turn
            if chosen and cannot(*args_of(op, dtype, i, "cpu").args) is None:
                print(op.name, sample.name, dtype)
                keep_error_rule(lambda draw: measure.errors(op, "native", args_of(op, dtype, i, "cpu", draw).args))
"""


def run(code, isa):
    env = os.environ | {"FASTLM_MAX_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def sets_below():
    """Return the narrower instruction sets that were built: the widest is what all other tests run."""
    built = fastlm.dispatch.build_report()["instruction_sets"]
    return built[: built.index(native.pairs or native.isa)]


@pytest.mark.parametrize("isa", sets_below())
def test_capped_instruction_set(isa):
    done = run(PARITY.format(isa=isa), isa)
    assert done.returncode == 0, done.stdout[-80:] + done.stderr


def test_unknown_cap_is_refused():
    assert "FASTLM_MAX_ISA must be generic, avx2, avx512, avx512_bf16 or amx, got mmx" in run(
        "import fastlm._native", "mmx").stderr


def test_a_cpu_of_avx2_has_no_16_bit_arithmetic():
    code = "import fastlm._native as n; print(n.cpu, n.bf16_arithmetic, n.fp16_arithmetic, n.amx, n.vnni)"
    if "avx2" not in sets_below():
        pytest.skip("nothing to cap")
    assert run(code, "avx2").stdout.split() == ["avx2", *["False"] * 4]
