"""Say what this machine has, what is missing and why, and what to do about it."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from fastlm.dispatch import build_report
from fastlm.ops import ALL

EXTRAS = {"typer": "cli", "rich": "cli", "safetensors": "cli", "tokenizers": "cli", "matplotlib": "report",
          "jinja2": "report", "pytest": "test"}
ROOT = Path(__file__).resolve().parents[2]  # a checkout, or site-packages


class Check(NamedTuple):
    """One line of the report: `state` is "ok", "off" (works without) or "missing"; `fix` is a command or empty."""

    name: str
    state: str
    detail: str
    fix: str = ""


def environment() -> list[Check]:
    """Check Python, PyTorch, the GPU, Triton, the compilers, the extension and the optional packages."""
    return [
        Check("Python", "ok", platform.python_version()),
        Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads, "
                             f"{torch.backends.cpu.get_cpu_capability()}"),
        _cuda(), _triton(), _compiler(), _nvcc(), *_extension(),
        *(_package(name, extra) for name, extra in EXTRAS.items()),
    ]


def implementations(device: str = "cpu") -> list[Check]:
    """Check each implementation of each op on `device`, in the order of trying, at a size of real models.

    Nothing is run: implementations choose by metadata. Without gradients, as in inference.
    """
    rows = []
    for op in ALL:
        size, args = next(iter(op.samples("bench", torch.float32, device)))
        chosen, _ = op.choose(args)
        for name, implementation in op.implementations.items():
            label = f"{op.name} / {name}"
            reason = implementation.cannot(*args)
            if name == chosen:
                rows.append(Check(label, "ok", f"runs by default: {size}"))
            elif reason:
                rows.append(Check(label, "off", reason, _fix(reason)))
            else:
                reason = implementation.loses(*args) or "on request"
                rows.append(Check(label, "off", f"{reason}; fastlm.backend({name!r}) runs it"))
    return rows


def _build():
    """Say how to build the extension where this fastlm is installed."""
    if Path(sys.prefix).resolve() == ROOT / ".venv":  # the one that make sets up
        return "make extension"
    return f"pip install {'-e ' if (ROOT / 'setup.py').exists() else ''}. in fastlm's source folder"


def _fix(reason):
    if "extension is missing" in reason:
        return f"{_build()} (needs g++ and python3-dev)"
    if "Triton is not installed" in reason:
        return "pip install triton"
    return ""


def _cuda():
    if torch.version.cuda is None:
        return Check("CUDA", "off", "this PyTorch was built without CUDA", "install a CUDA build of torch")
    if not torch.cuda.is_available():
        return Check("CUDA", "off", f"PyTorch has CUDA {torch.version.cuda}, but no GPU answers")
    major, minor = torch.cuda.get_device_capability()
    return Check("CUDA", "ok", f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}")


def _triton():
    if importlib.util.find_spec("triton") is None:
        return Check("Triton", "missing", "not installed", "pip install triton")
    from importlib.metadata import version

    state = f"{version('triton')}" + (", interpreting" if os.environ.get("TRITON_INTERPRET") == "1" else "")
    return Check("Triton", "ok", state)


def _compiler():
    found = next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    if found is None:
        return Check("C++ compiler", "missing", "none of g++, c++, clang++ is on PATH", "apt-get install g++")
    return Check("C++ compiler", "ok", _first_line([found, "--version"]))


def _nvcc():
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        return Check("nvcc", "off", "not found: no CUDA half of the extension", "install the CUDA toolkit")
    return Check("nvcc", "ok", _first_line([found, "--version"], last=True))


def _extension():
    report = build_report()
    if report["error"]:
        lines = [line for line in report["error"].splitlines() if line.strip()]
        telling = next((line for line in lines if "error" in line), lines[0])
        return [Check("extension", "missing", telling, f"{_build()} (needs g++ and python3-dev)")]
    native = next(op.implementations["native"] for op in ALL if "native" in op.implementations)
    if native.run is None:
        return [Check("extension", "missing", native.cannot(), f"{_build()} (needs g++ and python3-dev)")]
    rows = [Check("extension", "ok", "built for " + ", ".join(report["instruction_sets"]))]
    if report["cuda"]:
        rows.append(Check("extension, CUDA", "ok", ", ".join(f"sm_{t}" for t in report["cuda"])))
    rows += [Check(f"extension, {part}", "off", reason.splitlines()[0], f"FASTLM_CUDA=1 {_build()}"
                   if part == "cuda" and "FASTLM_CUDA" in reason else "")
             for part, reason in report["skipped"].items()]
    return rows


def _package(name, extra):
    if importlib.util.find_spec(name) is None:
        return Check(name, "off", "not installed", f"pip install 'fastlm[{extra}]'")
    return Check(name, "ok", f"for fastlm[{extra}]")


def _first_line(command, last=False):
    output = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    return (output[-1] if last else output[0]) if output else "says nothing"
