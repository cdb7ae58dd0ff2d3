"""The first experiment on a GPU: which kernels cuDNN runs for nn.LSTM and nn.GRU, and how long a forward pass takes.

torch asks cuDNN for its persistent kernel in float16 alone, and never for a GRU: is bfloat16 really slower? Prints a
row for each shape and writes those that there are to FOLDER/cudnn-rnn.json.
Usage: python benchmarks/cudnn_rnn.py FOLDER
"""

import itertools
import json
import sys
from pathlib import Path

import torch

from fastlm import measure

SHAPES = (("LSTM", torch.float16), ("LSTM", torch.bfloat16), ("GRU", torch.float16), ("GRU", torch.bfloat16))


def kernels(call) -> list[str]:
    """Return the names of the three kernels in which a call spends most of its time on the GPU, with milliseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    return [f"{row.key} {row.self_device_time_total / 1000:.2f}" for row in rows[:3]]


class Rows:
    """Rows of an experiment, in FOLDER/NAME.json after each of them: what follows may fail or run out of time."""

    def __init__(self, folder: str, name: str):
        if not torch.cuda.is_available():
            raise SystemExit(f"{name}: there is no NVIDIA GPU here")
        self.path, self.rows = Path(folder) / f"{name}.json", []
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict, printed: str) -> None:
        self.rows.append(row)
        print(printed, flush=True)
        self.path.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                                         "rows": self.rows}, indent=1))


def main(folder: str) -> None:
    rows = Rows(folder, "cudnn-rnn")
    for hidden, batch, (cell, dtype) in itertools.product((512, 768, 1024), (16, 64), SHAPES):
        module = getattr(torch.nn, cell)(hidden, hidden, device="cuda", dtype=dtype)
        x = torch.randn(512, batch, hidden, device="cuda").to(dtype)
        with torch.no_grad():
            seconds = measure.timings({"stock": lambda module=module, x=x: module(x)}, "cuda", 0.3)["stock"].median
            names = kernels(lambda module=module, x=x: module(x))
        rows.add({"cell": cell, "dtype": str(dtype)[6:], "batch": batch, "hidden": hidden, "seconds": seconds,
                  "kernels": names},
                 f"{cell:5}{str(dtype)[6:]:9} T512 B{batch:<3} H{hidden:<5}{seconds * 1e3:8.2f} ms  {'; '.join(names)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
