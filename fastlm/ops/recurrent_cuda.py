"""Layers of lstm, gru and rnn on an NVIDIA GPU, around the kernels of csrc/cuda: both directions in one launch.

A pass is one launch of ours; the products that do not recur are PyTorch's. Everything is queued on the current stream,
memory is PyTorch's, nothing waits for the GPU: a CUDA graph can capture it.
"""

import functools
import math
from types import ModuleType

import torch
from torch import Tensor

from fastlm.autograd import Differentiable
from fastlm.dispatch import assume_constant, build_report
from fastlm.ops import recurrent
from fastlm.ops.products import exact_float32
from fastlm.ops.recurrent import CELLS, GATES, pair, split_biases
from fastlm.ops.tensors import addresses

NUMBERS = {torch.float32: 0, torch.float64: 1, "tf32": 2, torch.bfloat16: 3, torch.float16: 4}
MEASURED = dict(units=1024, sequences=64, steps=64)  # at most, at most and at least
EXCHANGES = {"cheapest": 0, "grid": 1, "cluster": 2, "plane": 3}  # how the blocks of a kernel hand on their results


class CudaLayers:
    """One cell's `cannot` and `run` for tensors on a GPU, and the differentiable layer that they are made of.

    Args:
        native: the compiled extension.
        cell: "lstm", "gru", "tanh" or "relu".
        step: the cell's definition, see `recurrent.scan`.
    """

    def __init__(self, native: ModuleType, cell: str, step):
        self.native, self.cell, self.step = native, cell, step
        self.gates, self.states = GATES[cell], 2 if cell == "lstm" else 1
        self.missing = missing(native)
        self.most_packed = 0 if self.missing else native.cuda.packed_sequences
        self.kernels = Differentiable(
            f"{cell}_layer_cuda", statics="str exchange", outputs=1 + self.states, forward=self.forward, fake=self.fake,
            backward=self.backward, reference=self.reference, reads=1)

    def cannot(self, data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional,
               batch_first) -> str | None:
        if self.missing:
            return self.missing
        if torch.cuda.get_device_properties(data.device).major < 8:
            return "the GPU is older than compute capability 8.0"
        if data.dtype not in NUMBERS:
            return f"dtype {data.dtype}"
        if recurrent.projects(params, has_biases, (num_layers, dropout, train, bidirectional, batch_first)):
            return "proj_size: not yet in the kernel"
        # A compiler cannot compare what is data of a packed batch; the launch refuses more all the same.
        compiles = torch.compiler.is_compiling()
        if batch_sizes is not None and not compiles and hx[0].shape[1] > self.most_packed:
            return f"more than {self.most_packed} packed sequences"
        number = number_of(self.compute_dtype(self.result_dtype(data)))
        return _misfit(self.native, CELLS[self.cell], number, hx[0].shape[2], bidirectional, str(data.device))

    def result_dtype(self, data) -> torch.dtype:
        """Return what stock returns: under autocast cuDNN's is float16, whatever is asked for (ATen, AutocastRNN)."""
        lowers = data.dtype is not torch.float64 and torch.is_autocast_enabled(data.device.type)
        return torch.float16 if lowers else data.dtype

    def compute_dtype(self, result: torch.dtype) -> torch.dtype:
        """Return what the kernels compute in.

        A relu is float32: a state that is rounded across the kink has another derivative, an error by chance.
        """
        return torch.float32 if self.cell == "relu" and result.itemsize == 2 else result

    def run(self, data, batch_sizes, hx, params, has_biases, *options, exchange="cheapest") -> tuple[Tensor, ...]:
        """Run the network.

        `exchange` names one of EXCHANGES, to measure one against the other; raises where it cannot. There are planes
        backward alone: forward is on a grid then.
        """
        result = self.result_dtype(data)
        compute = self.compute_dtype(result)

        def layer(x, batch_sizes, hx, params):
            per = 4 if has_biases else 2
            slots = [p for i in range(0, len(params), per) for p in (*params[i: i + per], None, None)[:4]]
            tensors = [x, *hx, *slots]
            x, *rest = [t if t is None or t.dtype is compute else t.to(compute) for t in tensors]
            return self.kernels([x, batch_sizes, *rest], exchange)

        found = recurrent.stack(layer, data, batch_sizes, hx, params, has_biases, *options)
        return tuple(t.to(result) for t in found)

    def reference(self, tensors, exchange):
        x, batch_sizes, *rest = tensors
        hx, params = rest[:self.states], rest[self.states:]
        layer = recurrent.directions(lambda *args: recurrent.scan(self.step, *args), params[2] is not None,
                                     len(params) == 8)
        return layer(x, batch_sizes, hx, [p for p in params if p is not None])

    # --- one layer, D directions: H columns of y for each, states [D, B, H] ---

    def forward(self, tensors, needs, exchange):
        x, batch_sizes, hx, weights = self.unpack(tensors)
        train, (count, batch, hidden) = any(needs), hx[0].shape
        rows, wide = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), self.gates * hidden
        y = rows.new_empty(rows.shape[0], count * hidden)
        last = [torch.empty_like(s) for s in hx]
        saved = self.saved(y, batch_sizes, hidden, count) if train else {}
        # W x + b; an Elman network's turns into y.
        projected = y.view(y.shape[0], count, hidden).transpose(0, 1) if self.gates == 1 else y.new_empty(
            count, y.shape[0], wide)
        hold, launched = [], []
        for d, (w_ih, w_hh, b_ih, b_hh) in enumerate(weights):
            bias, b_hn = split_biases(self.cell, b_ih, b_hh)
            if bias is None:
                torch.mm(rows, w_ih.t(), out=projected[d])
            else:
                torch.addmm(bias, rows, w_ih.t(), out=projected[d])
            hold += [w_hh.contiguous(), b_hn]
            of = {name: t[d] for name, t in saved.items()}
            launched.append((addresses(hold[-2], b_hn, projected[d], of.get("gates"), *pair([s[d] for s in hx]),
                                       y[:, d * hidden:], of.get("c"), of.get("before"), *pair([s[d] for s in last])),
                             projected.stride(1), y.stride(0)))
        if batch:
            self.launch("rnn_forward", exchange, y, hx[0].shape, x, batch_sizes, launched)
        return [y.view(*x.shape[:-1], count * hidden), *last, *saved.values()]

    def saved(self, y, batch_sizes, hidden, count):
        """Return what the backward pass needs besides y, [D, N, ·] each: gates, c in float32 or wider, h before."""
        def new(columns, dtype=y.dtype):
            return y.new_empty(count, y.shape[0], columns, dtype=dtype)

        found = {} if self.gates == 1 else {"gates": new(4 * hidden)}
        if self.cell == "lstm":
            found["c"] = new(hidden, torch.promote_types(y.dtype, torch.float32))
        if batch_sizes is not None:
            found["before"] = new(hidden)
        return found

    def fake(self, tensors, needs, exchange):
        x, batch_sizes, hx, _ = self.unpack(tensors)
        count, _, hidden = hx[0].shape
        y = x.new_empty(math.prod(x.shape[:-1]), count * hidden)
        saved = self.saved(y, batch_sizes, hidden, count) if any(needs) else {}
        return [y.view(*x.shape[:-1], count * hidden), *(s.new_empty(s.shape) for s in hx), *saved.values()]

    def backward(self, grads, saved, tensors, needs, exchange):
        x, batch_sizes, hx, weights = self.unpack(tensors)
        count, batch, hidden = hx[0].shape
        rows, wide = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), self.gates * hidden
        y, kept = saved[0].reshape(rows.shape[0], count * hidden), iter(saved[1:])
        gates = None if self.gates == 1 else next(kept)
        c = next(kept) if self.cell == "lstm" else None
        before = None if batch_sizes is None else next(kept)
        dy, *d_last = [g.contiguous() for g in grads]
        dy = dy.reshape(y.shape)
        d_hx = [torch.empty_like(s) for s in hx]
        columns = 4 * hidden if self.cell == "gru" else wide
        dgates = y.new_empty(count, y.shape[0], -(-columns // 8) * 8)  # rows that 16-byte loads can read
        hold, launched = [], []
        for d, (_, w_hh, _, _) in enumerate(weights):
            hold.append(w_hh.contiguous())
            at = slice(d * hidden, None)
            of = [None if t is None else t[d] for t in (gates, c)]
            launched.append((addresses(hold[-1], of[0], y[:, at], of[1], *pair([s[d] for s in hx]), dy[:, at],
                                       *pair([s[d] for s in d_last]), dgates[d], *pair([s[d] for s in d_hx])),
                             y.stride(0), dgates.stride(1)))
        if batch:
            self.launch("rnn_backward", exchange, y, hx[0].shape, x, batch_sizes, launched)
        # dgates begins with the gates of GRU in the order n r z, so that those of either product lie side by side.
        turn, dx, found = hidden if self.cell == "gru" else 0, None, []
        need_x, _, *need_params = (needs[0], None, *needs[2 + self.states:])

        def unturned(gradient):
            return gradient.roll(-turn, 0) if turn else gradient

        for d, (w_ih, *_) in enumerate(weights):
            need_w, need_u, need_b, need_bu = need_params[4 * d: 4 * d + 4]
            d_in, d_hidden = dgates[d, :, :wide], dgates[d, :, turn: turn + wide]
            if need_x:
                w_in = w_ih.roll(turn, 0) if turn else w_ih
                dx = d_in @ w_in if dx is None else dx.addmm_(d_in, w_in)
            dw = unturned(d_in.t() @ rows) if need_w else None
            du = self.recurrent_gradient(d_hidden, y[:, d * hidden: (d + 1) * hidden], hx[0][d],
                                         None if before is None else before[d], d == 1) if need_u else None
            total = dgates[d, :, :columns].sum(0) if need_b or need_bu else None
            found += [dw, du, unturned(total[:wide]) if need_b else None,
                      total[turn: turn + wide].clone() if need_bu else None]
        return [dx.view(x.shape) if need_x else None, None, *d_hx, *found]

    def recurrent_gradient(self, d_hidden, y, h0, before, reverse):
        """Return Σ dgatesᵀ h of the step before, whose rows are those of y a step earlier, but for the first step."""
        if before is not None:
            return d_hidden.t() @ before
        batch = h0.shape[0]
        cut = d_hidden.shape[0] - batch
        if reverse:
            return (d_hidden[cut:].t() @ h0).addmm_(d_hidden[:cut].t(), y[batch:])
        return (d_hidden[:batch].t() @ h0).addmm_(d_hidden[batch:].t(), y[:cut])

    # --- what crosses into C++ ---

    def unpack(self, tensors):
        """Return x, batch_sizes, the states [D, B, H], and (w_ih, w_hh, b_ih, b_hh) of each direction."""
        x, batch_sizes, *rest = tensors
        batch_sizes = None if batch_sizes is None else batch_sizes.contiguous()
        hx, params = [s.contiguous() for s in rest[:self.states]], rest[self.states:]
        return x, batch_sizes, hx, [params[i: i + 4] for i in range(0, len(params), 4)]

    def launch(self, name, exchange, y, shape, x, batch_sizes, directions):
        """Queue a pass on PyTorch's current stream."""
        count, batch, hidden = shape
        steps, sizes = recurrent.steps_of(self.cell, x, batch_sizes, batch)
        layer = (CELLS[self.cell], number_of(y.dtype), batch, hidden, count, EXCHANGES[exchange])
        chip = chip_of(self.native, str(y.device))
        with torch.cuda.device(y.device):
            plan = self.native.cuda.rnn_plan(layer, name == "rnn_backward", chip)
            if plan is None:
                raise RuntimeError(f"{name}: {hidden} units do not fit this GPU (exchange: {exchange})")
            workspace = y.new_empty(plan["workspace"] * steps, dtype=torch.uint8)
            getattr(self.native.cuda, name)(layer, chip, steps, sizes, workspace.data_ptr(), directions,
                                            torch.cuda.current_stream().cuda_stream)


def losses(cell, data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional,
           batch_first) -> str | None:
    """Return why cuDNN is the better choice, None where rows measured on an H200 say that it is not.

    They are of LSTM and GRU in 16 bits: benchmarks/LOG.md 2026-11-26.
    """
    batch, hidden = hx[0].shape[1:]
    steps = batch_sizes.shape[0] if batch_sizes is not None else data.shape[1 if batch_first else 0]
    lowered = data.dtype is torch.float32 and torch.is_autocast_enabled(data.device.type)
    dtype = torch.float16 if lowered else data.dtype
    if cell not in ("lstm", "gru") or dtype.itemsize != 2:
        return "against cuDNN only LSTM and GRU in 16 bits were measured"
    if hidden > MEASURED["units"] or batch > MEASURED["sequences"] or steps < MEASURED["steps"]:
        return "not measured above {units} units or {sequences} sequences, nor below {steps} steps".format(**MEASURED)
    if bidirectional:
        if batch_sizes is not None:
            return "both directions of packed sequences were not measured on a GPU"
        measured = hidden <= 512 or (hidden <= 768 and batch <= 16)
        return None if measured else "both directions were measured up to 768 units and, above 512, up to 16 sequences"
    # What torch asks of cuDNN's own persistent kernel (ATen, cudnn/RNN.cpp).
    persists = cell == "lstm" and dtype is torch.float16 and num_layers == 1 and (
        batch_sizes is None and hidden % 128 == 0 and data.shape[-1] % 128 == 0 and batch % 8 == 0)
    if persists and batch < 64 and (hidden > 768 or (hidden > 512 and batch > 16)):
        return "cuDNN's persistent kernel was not measured to be slower than ours"
    return None


@functools.cache
def chip_of(native: ModuleType, device: str) -> tuple[int, int, int, int]:
    """Return what plans ask of a GPU: cuda::Chip."""
    properties = torch.cuda.get_device_properties(device)
    shared, cluster, planes = properties.shared_memory_per_block_optin, 0, 0
    with torch.cuda.device(device):
        if properties.major >= 9:
            cluster = native.cuda.largest_cluster(shared)
        if cluster:
            planes = native.cuda.planes(shared, torch.cuda.current_stream().cuda_stream)
    return properties.multi_processor_count, shared, cluster, planes


def exchange_alone(native: ModuleType, layer: tuple, backward: bool, device: str) -> dict[str, float]:
    """Return the seconds that a step of a layer's exchange takes on the GPU, measured without any arithmetic.

    Through L2 ("grid") and in clusters ("cluster", where the layer fits one), each between the blocks, and of the
    bytes, that the plan of such a kernel exchanges. `layer` is (cell, number, batch, hidden, directions).
    """
    found, size = {}, 2 if layer[1] in (NUMBERS[torch.bfloat16], NUMBERS[torch.float16]) else 4
    for name in ("grid", "cluster"):
        plan = native.cuda.rnn_plan((*layer, EXCHANGES[name]), backward, chip_of(native, device))
        if plan is None:
            continue
        sequences = min(layer[2], 8 * plan["n_tiles"])
        of_one = plan["depth"] * size
        if name == "cluster" and backward:
            of_one = plan["slices"] * plan["units"] * 4  # sums, in float32
        teams = -(-plan["groups"] * layer[4] // plan["turns"])  # side by side
        found[name] = plan["turns"] * _alone(
            native, name == "cluster", plan["slices"], teams, sequences * of_one, device)
    return found


@functools.cache
def _alone(native, cluster, blocks, teams, size, device, steps=256):
    with torch.cuda.device(device):
        workspace = torch.empty(16 if cluster else teams * steps * (size + 15), dtype=torch.uint8, device=device)
        taken = torch.zeros(3, dtype=torch.int64, device=device)
        for i in range(len(taken)):
            native.cuda.exchange_alone(cluster, blocks, teams, size, steps, workspace.data_ptr(), taken[i:].data_ptr(),
                                       torch.cuda.current_stream().cuda_stream)
        return sorted(taken.tolist())[1] / (steps - 1) * 1e-9


@functools.cache
def misfit(native: ModuleType, cell: int, number: int, hidden: int, bidirectional: bool, device: str) -> str | None:
    """Return why no plan of a layer fits the GPU. The batch plays no part: it goes through in groups."""
    layer, chip = (cell, number, 1, hidden, 2 if bidirectional else 1, EXCHANGES["cheapest"]), chip_of(native, device)
    for backward in (False, True):
        if native.cuda.rnn_plan(layer, backward, chip) is None:
            return f"the recurrent weights of {hidden} units do not fit the shared memory of this GPU"
        with torch.cuda.device(device):
            if not native.cuda.rnn_fits(layer, backward, chip):
                return "the GPU cannot hold all blocks at a time"
    return None


@assume_constant
def _misfit(*args) -> str | None:
    return misfit(*args)


def number_of(dtype: torch.dtype) -> int:
    """Return the kernels' number format: float32 is rounded to TF32 in products where PyTorch's own may be."""
    return NUMBERS["tf32" if dtype is torch.float32 and not exact_float32() else dtype]


def missing(native: ModuleType) -> str | None:
    """Return why the extension cannot use a GPU here, None where it can."""
    if not hasattr(native, "cuda"):
        return f"the extension was built without CUDA: {build_report()['skipped'].get('cuda', 'reason not recorded')}"
    built, known = native.cuda.built_version // 1000, native.cuda.driver_version() // 1000
    if known < built:
        return f"the extension was built with CUDA {built}, " + (
            f"the NVIDIA driver is for CUDA {known}" if known else "there is no NVIDIA driver")
    return None
