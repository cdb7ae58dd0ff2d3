"""Layers of lstm, gru and rnn around the kernels of csrc/rnn.h: buffers, checks, and the products that do not recur.

It is handed the extension by `lstm_native.py`, `gru_native.py` and `rnn_native.py`, so that it imports without it.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from fastlm.autograd import Differentiable
from fastlm.dispatch import build_report
from fastlm.ops import recurrent

CELLS = {"lstm": 0, "gru": 1, "tanh": 2, "relu": 3}
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACCEPTS = frozenset(recurrent.TEST_SHAPES) | {"not a number", "not contiguous"}

MEASURED = {"avx512"}  # instruction sets timed in benchmarks/LOG.md
ROW = "benchmarks/LOG.md 2026-11-23"


def losses(native: ModuleType, cell: str, data, batch_sizes, hx, params, *options) -> str | None:
    """Return why stock is the better choice, None where a measured row says that it is not.

    Stock runs a dense LSTM in float32 and bfloat16 through oneDNN, which is hard to beat, and all else step by step
    in PyTorch, which only few steps, and so little to save, make as fast as a kernel.
    """
    if data.is_cuda:
        return "not yet run on a GPU"
    if native.isa not in MEASURED:
        return f"not yet measured with {native.isa}"
    if data.dtype is torch.bfloat16 and native.bf16_arithmetic:
        return "not yet measured on a CPU with bfloat16 arithmetic"
    steps = batch_sizes.numel() if batch_sizes is not None else data.shape[1 if options[-1] else 0]
    batch, hidden = hx[0].shape[1:]
    if cell != "lstm" or batch_sizes is not None or data.dtype not in (torch.float32, torch.bfloat16):
        least = 32 if cell in ("tanh", "relu") else 16
        return f"slower than torch below {least} steps: {ROW}" if steps < least else None
    if hidden < 256:
        return f"slower than torch's oneDNN below 256 hidden units: {ROW}"
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (data, *hx, *params))
    if trains or data.dtype is torch.bfloat16:
        return None
    if batch == 1:
        few = hidden >= 512 and steps < 16
        return None if few else f"slower than torch's oneDNN for one sequence, but for few steps of a wide layer: {ROW}"
    if hidden < 640 or steps < 16:
        return f"slower than torch's oneDNN without gradients below 640 hidden units or 16 steps: {ROW}"
    return None


def cuda_missing(native: ModuleType) -> str | None:
    """Return why the extension cannot use a GPU here, None where it can."""
    if not hasattr(native, "cuda"):
        return f"the extension was built without CUDA: {build_report()['skipped'].get('cuda', 'reason not recorded')}"
    built, known = native.cuda.built_version // 1000, native.cuda.driver_version() // 1000
    if known < built:
        return f"the extension was built with CUDA {built}, " + (
            f"the NVIDIA driver is for CUDA {known}" if known else "there is no NVIDIA driver")
    return None


class Layers:
    """One cell's `cannot` and `run`, and the differentiable layer in one direction that they are made of.

    Args:
        native: the compiled extension.
        cell: "lstm", "gru", "tanh" or "relu".
        step: the cell's definition, see `recurrent.scan`.
    """

    def __init__(self, native: ModuleType, cell: str, step: Callable):
        self.native, self.cell, self.step = native, cell, step
        self.gates, self.states = GATES[cell], 2 if cell == "lstm" else 1
        self.no_cuda = cuda_missing(native)
        self.kernels = Differentiable(
            f"{cell}_layer", statics="bool reverse", outputs=1 + self.states, forward=self.forward, fake=self.fake,
            backward=self.backward, reference=self.reference, reads_results=True)

    def cannot(self, data, batch_sizes, hx, params, *options) -> str | None:
        if data.is_cuda and self.no_cuda:
            return self.no_cuda
        if data.is_cuda and torch.cuda.get_device_properties(data.device).major < 8:
            return "the GPU is older than compute capability 8.0"
        if data.dtype not in DTYPES:
            return f"dtype {data.dtype}"
        if hx[0].shape[-1] * self.gates != params[1].shape[0]:
            return "proj_size: not yet in the kernel"
        return None

    def run(self, data, batch_sizes, hx, params, has_biases, *options) -> tuple[Tensor, ...]:
        """Run the network; 16-bit inputs are computed in float32 and rounded at the end."""
        compute = torch.float64 if data.dtype is torch.float64 else torch.float32
        result = self.result_dtype(data, batch_sizes, hx)

        def one(x, batch_sizes, states, weights, reverse):
            tensors = [x, batch_sizes, *states, *weights[:4]]
            return self.kernels([t if t is batch_sizes or t is None else t.to(compute) for t in tensors], reverse)

        layer = recurrent.directions(one, has_biases, options[3])
        found = recurrent.stack(layer, data, batch_sizes, hx, params, has_biases, *options)
        return tuple(t.to(result) for t in found)

    def result_dtype(self, data, batch_sizes, hx) -> torch.dtype:
        """Return what stock returns: under autocast the dense LSTM and the RNN lower it, the others keep hx's."""
        if data.dtype is torch.float64 or not torch.is_autocast_enabled(data.device.type):
            return data.dtype
        if self.cell == "gru" or (self.cell == "lstm" and batch_sizes is not None):
            return hx[0].dtype
        return torch.get_autocast_dtype(data.device.type)

    def reference(self, tensors, reverse):
        x, batch_sizes, *rest = tensors
        return recurrent.scan(self.step, x, batch_sizes, rest[:self.states], (*rest[self.states:], None), reverse)

    # --- one layer in one direction ---

    def forward(self, tensors, needs, reverse):
        x, batch_sizes, *states, w_ih, w_hh, b_ih, b_hh = tensors
        train, hidden = any(needs), w_hh.shape[1]
        states = [s.contiguous() for s in states]
        gates, b_hn = self.project(x.reshape(-1, x.shape[-1]), w_ih, b_ih, b_hh, train)
        y = gates if self.gates == 1 else gates.new_empty(gates.shape[0], hidden)
        c = torch.empty_like(y) if train and self.cell == "lstm" else None
        last = [torch.empty_like(s) for s in states]
        problem = self.problem(x, batch_sizes, states[0], reverse)
        buffers = (w_hh.contiguous(), b_hn, gates, *pair(states), y, c, *pair(last), self.workspace(y, problem, False))
        self.call("rnn_forward", y, problem, train, self.addresses(buffers))
        saved = [] if not train or self.gates == 1 else [gates] if c is None else [gates, c]
        return [y.view(*x.shape[:-1], hidden), *last, *saved]

    def fake(self, tensors, needs, reverse):
        x, _, *states, _, w_hh, _, _ = tensors
        hidden, rows = w_hh.shape[1], x.shape[:-1].numel()
        saved = {"lstm": (4 * hidden, hidden), "gru": (4 * hidden,)}.get(self.cell, ())
        return [x.new_empty(*x.shape[:-1], hidden), *(s.new_empty(s.shape) for s in states),
                *(x.new_empty(rows, n) for n in saved if any(needs))]

    def backward(self, grads, saved, tensors, needs, reverse):
        x, batch_sizes, *states, w_ih, w_hh, _, _ = tensors
        y, *saved = saved[:1] + saved[1 + self.states:]
        gates, c = [*saved, None, None][:2]
        hidden = w_hh.shape[1]
        states, grads = [s.contiguous() for s in states], [g.contiguous() for g in grads]
        y = y.reshape(-1, hidden)
        d = y.new_empty(y.shape[0], hidden if self.gates == 1 else 4 * hidden)
        d_states = [torch.empty_like(s) for s in states]
        problem = self.problem(x, batch_sizes, states[0], reverse)
        buffers = (w_hh.contiguous(), gates, y, c, *pair(states), grads[0], *pair(grads[1:]), d, *pair(d_states),
                   self.workspace(y, problem, True))
        self.call("rnn_backward", y, problem, self.addresses(buffers))
        rows = x.reshape(-1, x.shape[-1])
        need_x, _, *_, need_w, need_u, need_b, need_bu = needs
        d_hidden = d[:, hidden:] if self.cell == "gru" else d
        dx = self.through_input(d, w_ih).view(x.shape) if need_x else None
        dw = self.input_product(d, rows) if need_w else None
        du = previous_product(d_hidden, y, states[0], batch_sizes, reverse) if need_u else None
        db = dbu = None
        if need_b or need_bu:
            total = d.sum(0)
            db = total[:3 * hidden].roll(-hidden) if self.cell == "gru" else total
            dbu = (total[hidden:] if self.cell == "gru" else total).clone()
        return [dx, None, *d_states, dw, du, db, dbu]

    def through_input(self, d, w_ih):
        """Return the gradient of x. GRU's d starts with n r z, its matrix is r z n: two products, no copy."""
        if self.cell != "gru":
            return d @ w_ih
        hidden = d.shape[1] // 4
        return (d[:, :hidden] @ w_ih[2 * hidden:]).addmm_(d[:, hidden:3 * hidden], w_ih[:2 * hidden])

    def input_product(self, d, rows):
        """Return the gradient of w_ih."""
        if self.cell != "gru":
            return d.t() @ rows
        hidden = d.shape[1] // 4
        dw = rows.new_empty(3 * hidden, rows.shape[1])
        torch.mm(d[:, :hidden].t(), rows, out=dw[2 * hidden:])
        torch.mm(d[:, hidden:3 * hidden].t(), rows, out=dw[:2 * hidden])
        return dw

    def project(self, rows, w_ih, b_ih, b_hh, train):
        """Return W_ih x + b with every bias that may be added outside, and the one that may not: GRU's b_hn."""
        wide = w_ih.shape[0]
        kept = wide // 3 * 4 if self.cell == "gru" and train else wide
        gates = rows.new_empty(rows.shape[0], kept)
        if b_ih is None:
            torch.mm(rows, w_ih.t(), out=gates[:, :wide])
            return gates, None
        bias, b_hn = b_ih + b_hh, None
        if self.cell == "gru":
            outside = wide // 3 * 2
            bias, b_hn = torch.cat([bias[:outside], b_ih[outside:]]), b_hh[outside:].contiguous()
        torch.addmm(bias, rows, w_ih.t(), out=gates[:, :wide])
        return gates, b_hn

    # --- what crosses into C++ ---

    def problem(self, x, batch_sizes, h0, reverse):
        batch, hidden = h0.shape
        steps, sizes = x.shape[0], 0
        if batch_sizes is not None:
            recurrent.check_batch_sizes(self.cell, batch_sizes, x.shape[0])
            if int(batch_sizes[0]) != batch:
                raise RuntimeError(f"{self.cell}: hx is for {batch} sequences, batch_sizes for {int(batch_sizes[0])}")
            steps, sizes = batch_sizes.numel(), batch_sizes.data_ptr()
        return CELLS[self.cell], reverse, steps, batch, hidden, sizes, torch.get_num_threads()

    def library(self, like):
        return self.native.cuda if like.is_cuda else self.native

    def workspace(self, like, problem, backward):
        size = like.element_size()
        return like.new_empty(self.library(like).rnn_workspace(*problem, backward, size) // size)

    def call(self, name, like, problem, *args):
        """Run a kernel on the device of `like`; a GPU's is queued on PyTorch's current stream there."""
        kernel = getattr(self.library(like), name)
        if not like.is_cuda:
            return kernel(*problem, like.element_size(), *args)
        with torch.cuda.device(like.device):
            return kernel(*problem, like.element_size(), *args, torch.cuda.current_stream().cuda_stream)

    def addresses(self, buffers):
        """Check what the kernel takes for granted, and return where the tensors lie (0 for None).

        The caller keeps `buffers` until the kernel is done: an address alone keeps no memory.
        """
        like = buffers[0]
        for t in buffers:
            if t is not None and (t.dtype is not like.dtype or t.device != like.device or not t.is_contiguous()):
                raise RuntimeError(f"{self.cell}: a kernel needs contiguous {like.dtype} on {like.device}, got "
                                   f"{t.dtype} of strides {t.stride()} on {t.device}")
        return tuple(0 if t is None else t.data_ptr() for t in buffers)


def pair(states):
    """Return (h, c), or (h, None) for a cell that has no c."""
    return states if len(states) == 2 else [*states, None]


def previous_product(d: Tensor, y: Tensor, h0: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """Return Σ d_rᵀ h_r, [G·H, H], where h_r [H] is the state that came before row r in reading order."""
    batch, rows = h0.shape[0], y.shape[0]
    if batch_sizes is not None:
        return d.t() @ torch.cat([h0, y])[_rows_before(batch_sizes, batch, reverse)]
    if reverse:
        first, rest, before = d[rows - batch:], d[:rows - batch], y[batch:]
    else:
        first, rest, before = d[:batch], d[batch:], y[:rows - batch]
    if rows == batch:
        return first.t() @ h0
    return (rest.t() @ before).addmm_(first.t(), h0)


def _rows_before(batch_sizes, batch, reverse):
    """Return for each packed row the row of cat([h0, y]) that holds the state before it."""
    sizes, index, row = batch_sizes.tolist(), [], 0
    for t, n in enumerate(sizes):
        if not reverse:
            index.append(torch.arange(n) + (0 if t == 0 else batch + row - sizes[t - 1]))
        else:
            later = sizes[t + 1] if t + 1 < len(sizes) else 0
            index += [torch.arange(later) + batch + row + n, torch.arange(later, n)]
        row += n
    return torch.cat(index)
