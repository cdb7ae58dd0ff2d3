"""Build fastlm._native with ninja: one C++ object per instruction set, CUDA where there is a GPU.

Nothing here needs torch, and nothing that is missing fails the install: what was built and why the rest
was not is written to fastlm/_build.json, where `fastlm doctor` and `fastlm.explain` read it.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-DFASTLM_DOTS"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-DFASTLM_TILES"]
PAIRS = {"avx512_bf16": AVX512_BF16, "amx": AMX}  # multiply pairs of bfloat16
INSTRUCTION_SETS = {"avx2": AVX2, "avx512": AVX512, **PAIRS}
# Sources that do, and how; all others run their AVX-512 code there.
PAIRED = {"rnn": PAIRS, "quant": ["amx"], "product_tiles": ["amx"]}
CUDA_TARGETS = ["80", "90a", "100a"]


class Unavailable(Exception):
    """The extension, or its CUDA half, cannot be built on this machine."""


def find_cxx():
    name = os.environ.get("CXX") or next((n for n in ("g++", "c++", "clang++") if shutil.which(n)), None)
    if name is None:
        raise Unavailable("no C++ compiler on PATH (looked for g++, c++, clang++)")
    cxx = shlex.split(name)
    if not accepts(cxx, []):
        raise Unavailable(f"{name!r} compiles no C++: set the environment variable CXX to a compiler that does")
    return cxx


def find_nvcc():
    """Return the path of nvcc where the CUDA half should be built, else raise with the reason."""
    wanted = os.environ.get("FASTLM_CUDA")
    if wanted == "0":
        raise Unavailable("FASTLM_CUDA=0")
    cuda_bin = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=cuda_bin)
    if nvcc is None:
        raise Unavailable("nvcc not found on PATH nor in CUDA_HOME")
    if wanted != "1" and not any(Path("/dev").glob("nvidia[0-9]*")):
        raise Unavailable("no NVIDIA GPU visible when fastlm was built (FASTLM_CUDA=1 builds without one)")
    return nvcc


def accepts(cxx, flags):
    try:
        probe = subprocess.run([*cxx, *flags, "-x", "c++", "-c", "-", "-o", os.devnull],
                               input="int main() {}", text=True, capture_output=True)
    except OSError:  # no such command
        return False
    return probe.returncode == 0


class NinjaBuild(build_ext):
    """Write build.ninja and run it; setuptools alone has no flags per file."""

    def build_extension(self, ext):
        report = {"instruction_sets": [], "cuda": None, "skipped": {}, "error": None}
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.build_native(target, report)
        except (Unavailable, ImportError) as reason:  # pybind11 or ninja may be missing too
            report["error"] = str(reason)
            target.unlink(missing_ok=True)
            print(f"fastlm: native extension not built: {reason}", file=sys.stderr)
        (target.parent / "_build.json").write_text(json.dumps(report, indent=1) + "\n")

    def copy_extensions_to_source(self):
        """Copy the report beside the sources too, and never leave a stale binary there."""
        super().copy_extensions_to_source()
        binary = self.get_ext_filename("fastlm._native")
        built = Path(self.build_lib)
        if not (built / binary).exists():
            (ROOT / binary).unlink(missing_ok=True)
        shutil.copy(built / "fastlm" / "_build.json", ROOT / "fastlm" / "_build.json")

    def build_native(self, target, report):
        if sys.platform not in ("linux", "darwin"):
            raise Unavailable(f"{sys.platform} is not supported")
        cxx = find_cxx()
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise Unavailable("Python.h not found: install python3-dev")
        try:
            nvcc = find_nvcc()
        except Unavailable as reason:
            report["skipped"]["cuda"] = str(reason)
            nvcc = None
            if os.environ.get("FASTLM_CUDA") == "1":
                print(f"fastlm: CUDA kernels not built: {reason}", file=sys.stderr)
        if nvcc:
            try:
                return self.ninja(target, cxx, nvcc, report)
            except Unavailable as reason:  # CUDA trouble must not cost the CPU kernels
                report["skipped"]["cuda"] = str(reason)
                print(f"fastlm: CUDA kernels not built: {reason}", file=sys.stderr)
        self.ninja(target, cxx, None, report)

    def ninja(self, target, cxx, nvcc, report):
        import pybind11
        from ninja import BIN_DIR, ninja_syntax

        # A fixed place, unlike pip's fresh temporary folders: the objects survive for the next build.
        # Extra flags have their own, so that a sanitizer's objects and the usual ones do not replace each other.
        extra = "-flags" if os.environ.get("FASTLM_CXXFLAGS") or os.environ.get("FASTLM_LDFLAGS") else ""
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{self.plat_name}{extra}"
        folder.mkdir(parents=True, exist_ok=True)
        headers = folder / "pybind11"
        headers.unlink(missing_ok=True)
        headers.symlink_to(pybind11.get_include())
        openmp = ["-fopenmp"] if accepts(cxx, ["-fopenmp"]) else []
        sets = {"generic": []}
        for name, flags in INSTRUCTION_SETS.items():
            if accepts(cxx, flags):
                sets[name] = flags
            else:
                report["skipped"][name] = f"{shlex.join(cxx)} does not accept {shlex.join(flags)}"
        defines = [f"-DFASTLM_{name.upper()}" for name in sets] + (["-DFASTLM_CUDA"] if nvcc else [])
        common = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall",
                  *openmp, *shlex.split(os.environ.get("FASTLM_CXXFLAGS", ""))]
        link = ["-shared", *openmp, *shlex.split(os.environ.get("FASTLM_LDFLAGS", ""))]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]

        with open(folder / "build.ninja", "w") as file:
            writer = ninja_syntax.Writer(file)
            writer.rule("cxx", f"{shlex.join(cxx)} -MMD -MF $out.d {shlex.join(common)} $flags -c $in -o $out",
                        depfile="$out.d", deps="gcc", description="CXX $out")
            writer.rule("link", f"{shlex.join([*cxx, *link])} $in -o $out", description="LINK $out")
            if nvcc:
                self.cuda_rules(writer, cxx, nvcc, openmp)
            objects = []

            def compile_object(rule, source, name, flags):
                objects.append(name)
                # shlex.join quotes for the shell, ninja needs its own escape for $.
                writer.build(name, rule, str(source), variables={"flags": shlex.join(flags).replace("$", "$$")})

            include = ["-isystem", sysconfig.get_path("include"), "-isystem", str(headers)]
            compile_object("cxx", ROOT / "csrc/isa.cpp", "isa.o", ["-O1", *defines])
            for source in sorted((ROOT / "csrc/python").glob("*.cpp")):
                compile_object("cxx", source, f"python_{source.stem}.o", ["-O1", *defines, *include])
            for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
                for name, flags in sets.items():
                    if name not in PAIRS or name in PAIRED.get(source.stem, ()):
                        compile_object("cxx", source, f"{source.stem}_{name}.o", [f"-DFASTLM_ISA={name}", *flags])
            if nvcc:
                for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                    compile_object("nvcc", source, f"{source.stem}_cuda.o", [])
            writer.build(str(target), "nvlink" if nvcc else "link", objects)

        command = [os.path.join(BIN_DIR, "ninja"), "-C", str(folder)]
        result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(result.stdout)
        if result.returncode:
            lines = result.stdout.splitlines()
            raise Unavailable("the build failed: " + next((line for line in lines if "error" in line), lines[-1]))
        report.update(instruction_sets=list(sets), cuda=CUDA_TARGETS if nvcc else None)

    @staticmethod
    def cuda_rules(writer, cxx, nvcc, openmp):
        targets = [flag for t in CUDA_TARGETS for flag in ("-gencode", f"arch=compute_{t},code=sm_{t}")]
        targets += ["-gencode", "arch=compute_80,code=compute_80"]
        compiler = [nvcc, "-ccbin", cxx[0]]
        options = ["-O3", "-std=c++17", "--threads", "0", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        compile_command = shlex.join([*compiler, "-MMD", "-MF", "$out.d", *options, *targets])
        writer.rule("nvcc", compile_command + " $flags -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
                    depfile="$out.d", deps="gcc", description="NVCC $out")
        # nvcc may be a wrapper script that only it can resolve, so it links too; cudart is static.
        host = ["-Xcompiler", ",".join(openmp)] if openmp else []
        writer.rule("nvlink", shlex.join([*compiler, "-shared", "-cudart", "static", *host,
                                          "-Xlinker", "--exclude-libs,ALL"]) + " $in -o $out",
                    description="LINK $out")


setup(ext_modules=[Extension("fastlm._native", sources=[], optional=True)], cmdclass={"build_ext": NinjaBuild})
