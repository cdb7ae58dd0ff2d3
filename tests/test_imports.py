"""The house's rules about who imports whom, and that fastlm works where Triton and the extension are missing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastlm

ROOT = Path(fastlm.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What each part may import, besides itself and the part above it that `fastlm/__init__.py` is.
ALLOWED = {
    "dispatch": set(),
    "flops": set(),
    "autograd": {"dispatch", "flops"},
    "ops": {"dispatch", "autograd"},
    "measure": {"dispatch", "ops"},
    "nn": {"ops", "dispatch", "autograd"},
    "models": {"nn", "ops", "dispatch", "autograd"},
}
ALLOWED["training"] = ALLOWED["tools"] = {*ALLOWED, "training", "tools"}
ALLOWED["cli"] = ALLOWED["__main__"] = {*ALLOWED, "cli"} - {"__main__"}


def imports(path):
    """Yield the full dotted name of each module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path):
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = part(path)
    parts = {p.name.removesuffix(".py") for p in ROOT.iterdir()}
    for name in imports(path):
        top = name.split(".")
        if top[0] == "fastlm" and len(top) > 1 and top[1] in parts and own != "__init__":
            assert top[1] == own or top[1] in ALLOWED[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_kernel_files_know_triton_and_the_extension(path):
    for name in imports(path):
        if name.split(".")[0] == "triton":
            assert part(path) == "ops", f"{path} imports {name}"
            assert path.stem.endswith("_triton"), f"{path} imports {name}"
        if name.startswith("fastlm._native"):
            assert part(path) == "ops", f"{path} imports {name}"
            assert path.stem.endswith("_native"), f"{path} imports {name}"


def test_implementations_do_not_import_one_another():
    """Files that end in _kernels_triton and _launch_triton are shared ones."""
    kernels = [p for p in FILES if part(p) == "ops" and re.search(
        r"(?<!_kernels)(?<!_launch)_(triton|native|blocked)$", p.stem)]
    names = {f"fastlm.ops.{p.stem}" for p in kernels}
    for path in kernels:
        assert names.isdisjoint(imports(path)), path


def test_no_torch_header_in_csrc():
    for path in (ROOT.parent / "csrc").rglob("*"):
        if path.is_file():
            for line in path.read_text().splitlines():
                assert not re.search(r"#\s*include.*(torch/|ATen|c10)", line), f"{path}: {line}"


def run(code, *flags):
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_is_light():
    """`import fastlm` loads torch alone: neither the compiler nor what the command line needs."""
    heavy = ("typer", "rich", "matplotlib", "jinja2", "tokenizers", "safetensors", "torch._dynamo", "torch._inductor")
    result = run(f"""
import sys, torch
heavy = [name for name in {heavy} if name not in sys.modules]
import fastlm
if torch.version.cuda is None:
    heavy.append("triton")
print([name for name in heavy if name in sys.modules])
""")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


BARE = """
import sys
sys.modules["triton"] = sys.modules["fastlm._native"] = None
import torch, fastlm
from fastlm import measure
for op in fastlm.ops.ALL:
    sample = next(s for s in op.samples("test", torch.float32, "cpu") if all(
        t.numel() for t in measure.floating(s.args)))
    results = {}
    for name in ("reference", "torch"):
        with fastlm.backend(name):
            results[name] = measure.differentiate(op, sample.args, constants=op.constants)
    for a, b in zip(*(r[0] for r in results.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    call, = fastlm.explain(op, *sample.args)
    assert call.op == op.name, call
    for name in ("triton", "native"):
        if name in op.implementations:
            assert op.implementations[name].run is None, (op, name)
            reason = op.implementations[name].cannot(*sample.args)
            assert reason, (op, name)
            if op.default.index(name) < op.default.index(call.ran):
                assert call.declined[name] == reason, call
    print(call)
"""


def test_works_without_triton_and_extension():
    """Every op's reference and stock run in a process that has neither, and explain gives both reasons."""
    result = run(BARE)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == len(fastlm.ops.ALL), result.stdout
