"""Run lstm, gru and rnn through an extension whose CUDA kernels are emulated, and hold them to the error rule.

Usage: python run.py EXTENSION [SAMPLE], in a process of its own: the extension takes the place of `fastlm._native`.
Prints a line `op dtype sample: ok` or `op dtype sample: ERROR` for each call.
"""

import importlib.util
import sys

import torch

spec = importlib.util.spec_from_file_location("fastlm._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
sys.modules["fastlm._native"] = native

from fastlm import measure, ops  # noqa: E402
from fastlm.dispatch import Sample  # noqa: E402
from fastlm.ops import recurrent, recurrent_kernels  # noqa: E402

GATES_AND_STATES = {"lstm": (4, 2), "gru": (3, 1), "rnn": (1, 1)}
FEATURES = {"no bias", "packed", "packed bidirectional layers", "no sequences", "outliers", "not a number",
            "not contiguous", "relu plain", "relu packed bidirectional layers"}
SIZES = {
    **{f"T{t} B{b} H{h}": {"steps": t, "batch": b, "hidden": h}
       for t, b, h in ((1, 1, 1), (3, 33, 3), (7, 3, 17), (2, 17, 33), (17, 1, 7), (3, 65, 40))},
    # More sequences than a block takes, whose number changes from step to step, in both directions.
    "tall packed": {"lengths": (4,) * 3 + (3,) * 20 + (2,) * 12 + (1,) * 6, "hidden": 17, "bidirectional": True},
}

launched = []


def call(self, name, like, problem, steps, *args):
    launched.append(name)
    getattr(native.cuda, name)((*problem, *steps), like.element_size(), *args, 0)


recurrent_kernels.Layers.library = lambda self, like: native.cuda
recurrent_kernels.Layers.call = call


def cases(op):
    """Yield (dtype, sample): sizes in float64, where an index is right or far off, and features in float32."""
    for sample in op.samples("test", torch.float32, "cpu"):
        if sample.name in FEATURES:
            yield torch.float32, sample
    for name, shape in SIZES.items():
        args = recurrent.make_args(*GATES_AND_STATES[op.name], torch.float64, "cpu", **shape)
        yield torch.float64, Sample(name, (*args, "tanh") if op.name == "rnn" else args)


torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is filled with NaN
for op in ops.ALL:
    if op.name in GATES_AND_STATES:
        for dtype, sample in cases(op):
            if sys.argv[2:] not in ([], [sample.name]):
                continue
            launched.clear()
            wrong = [error for error in measure.errors(op, "native", sample.args) if not error.ok]
            assert set(launched) == {"rnn_forward", "rnn_backward"}, (op, sample.name, launched)
            print(f"{op.name} {str(dtype)[6:]} {sample.name}:", wrong or "ok")
