"""Layers of lstm, gru and rnn around the kernels of csrc/rnn.h: buffers, checks, and the products that do not recur.

It is handed the extension by `lstm_native.py`, `gru_native.py` and `rnn_native.py`, so that it imports without it.
"""

import functools
import itertools
import math
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.autograd import Differentiable, unwatched
from fastlm.ops import recurrent
from fastlm.ops.cpu import MEASURED, keep_freed_memory
from fastlm.ops.products import exact_float32, mm
from fastlm.ops.recurrent import CELLS, GATES, IN_PLACE, MOST_ROWS, pair, split_biases
from fastlm.ops.recurrent_cuda import CudaLayers
from fastlm.ops.tensors import FLOATS, matmul_precision

DTYPES = FLOATS
PRECISIONS = {"highest": 0, "high": 1, "medium": 2}
NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACCEPTS = frozenset(recurrent.TEST_SHAPES) | {"not a number", "not contiguous"}

ANY = 1 << 62  # rows
BLOCK_BYTES = 16 << 20  # of gates made before they are used: benchmarks/LOG.md
KEPT_BYTES = 16 << 20  # less than this malloc keeps by itself


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
        self.cuda = CudaLayers(native, cell, step)
        self.kernels = Differentiable(
            f"{cell}_layer", statics="bool reverse", outputs=1 + self.states, forward=self.forward, fake=self.fake,
            backward=self.backward, reference=self.reference, reads=1, spends=True)

    def cannot(self, data, batch_sizes, hx, params, *options) -> str | None:
        if data.is_cuda:
            return self.cuda.cannot(data, batch_sizes, hx, params, *options)
        if data.dtype not in DTYPES:
            return f"dtype {data.dtype}"
        return None

    def run(self, data, batch_sizes, hx, params, has_biases, *options) -> tuple[Tensor, ...]:
        """Run the network; 16-bit inputs are computed in float32 and rounded at the end, or as pairs of bfloat16.

        Not so for relu, where a state that is rounded across the kink has another derivative: errors by chance.
        """
        if data.is_cuda:
            return self.cuda.run(data, batch_sizes, hx, params, has_biases, *options)
        projects = recurrent.projects(params, has_biases, options)
        batch_sizes = None if batch_sizes is None else batch_sizes.contiguous()
        found = None if batch_sizes is not None or projects else self.stream(data, hx, params, has_biases, *options)
        if found is not None:
            return found
        result = self.result_dtype(data, batch_sizes, hx, projects)
        # A step reads every weight once: to convert them first would cost more than the step itself.
        in_place = not projects and batch_sizes is None and not torch.is_grad_enabled() \
            and self.few(data, None, hx, options[-1])
        pairs = self.native.pairs and not in_place and self.cell != "relu"
        as_is = result is torch.float64 or (result is torch.bfloat16 and pairs)
        compute = result if as_is else torch.float32

        def one(x, batch_sizes, states, weights, reverse):
            w_ih, w_hh, *others = weights
            if not (in_place and w_ih.dtype is w_hh.dtype is data.dtype):
                w_ih, w_hh = cast((w_ih, w_hh), compute)
            x, b_ih, b_hh, w_hr, *states = cast((x, *others, *states), compute)
            return self.kernels([x, batch_sizes, *states, w_ih, w_hh, b_ih, b_hh, w_hr], reverse)

        layer = recurrent.directions(one, has_biases, options[3])
        found = recurrent.stack(layer, data, batch_sizes, hx, params, has_biases, *options)
        if projects:  # stock's cell state stays as it is under autocast
            return *cast(found[:2], result), *cast(found[2:], hx[1].dtype)
        return cast(found, result)

    def at_once(self, x, hx, params, *options):
        """Return what `run` makes of a call as it came, unchecked; None where that is no step of a stream or not ours.

        A stream calls for every token: here Python, its caches swept by the weights, takes as long as the kernel.
        """
        if self.native.cpu not in MEASURED or (self.native.pairs and not exact_float32()):
            return None
        return self.stream(x, hx, params, *options, most=MOST_ROWS[self.cell], doubles=False)

    def stream(self, x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first, most=ANY,
               doubles=True):
        """Return one step without gradients, None where the call is another or needs more than a kernel.

        All arguments are checked, by the extension where they are tensors.
        """
        if torch.is_grad_enabled() or bidirectional or not 0 <= dropout <= 1 or not unwatched():
            return None
        if num_layers != 1:
            alike = not (dropout and train)
            return self.streams(x, hx, params, has_biases, num_layers, batch_first, most, doubles) if alike else None
        found = self.native.rnn_step(CELLS[self.cell], IN_PLACE, most, torch.get_num_threads(), bool(has_biases),
                                     bool(batch_first), doubles, x, hx, params)
        if found is None or not batch_first:
            return found
        return found[0].transpose(0, 1), *found[1:]

    def streams(self, x, hx, params, has_biases, num_layers, batch_first, most, doubles):
        """Do what `stream` does for several layers."""
        hx, per, last = hx if isinstance(hx, list | tuple) else (hx,), 4 if has_biases else 2, []
        if num_layers < 1 or x.shape[1 if batch_first else 0] != 1 or len(params) != per * num_layers or \
                any(h.shape[0] != num_layers for h in hx):
            return None
        for i in range(num_layers):
            found = self.stream(x, [h[i: i + 1] for h in hx], params[i * per: (i + 1) * per], has_biases, 1, 0.0, False,
                                False, batch_first, most, doubles)
            if found is None:
                return None
            x, *states = found
            last.append(states)
        return x, *(torch.cat(states) for states in zip(*last, strict=True))

    def few(self, x, batch_sizes, hx, batch_first=False) -> bool:
        """Tell whether there is so little to compute that packed weights would not pay for their packing."""
        steps = batch_sizes.numel() if batch_sizes is not None else x.shape[1 if batch_first else 0]
        _, batch, hidden = hx[0].shape
        return x.shape[-1] > 0 and hidden >= IN_PLACE and (steps == 1 or batch * steps <= 16)

    def result_dtype(self, data, batch_sizes, hx, projects) -> torch.dtype:
        """Return what stock returns: under autocast the RNN and the LSTM lower it, the others keep hx's.

        They are the GRU, and the LSTM of packed sequences of several lengths that is not projected.
        """
        if data.dtype is torch.float64 or not torch.is_autocast_enabled(data.device.type):
            return data.dtype
        # A graph does not know the lengths.
        several = batch_sizes is not None and (torch.compiler.is_compiling() or bool(batch_sizes[0] != batch_sizes[-1]))
        if self.cell == "gru" or (self.cell == "lstm" and several and not projects):
            return hx[0].dtype
        return torch.get_autocast_dtype(data.device.type)

    def reference(self, tensors, reverse):
        x, batch_sizes, *rest = tensors
        return recurrent.scan(self.step, x, batch_sizes, rest[:self.states], rest[self.states:], reverse)

    # --- one layer in one direction ---

    def forward(self, tensors, needs, reverse):
        x, batch_sizes, *states, w_ih, w_hh, b_ih, b_hh, w_hr = tensors
        if w_hr is None and x.dtype is not torch.bfloat16 and self.few(x, batch_sizes, states):
            return self.direct(tensors, any(needs), reverse)
        train, wide, hidden = any(needs), w_hh.shape[0], states[-1].shape[-1]
        rows, states = x.reshape(-1, x.shape[-1]), as_states(states)
        w_hh, w_hr = as_weights(w_hh, w_hr)
        y = rows.new_empty(rows.shape[0], w_hh.shape[1])
        bias, b_hn = split_biases(self.cell, *cast((b_ih, b_hh), state_dtype(y)))
        kept = padded(self.columns(hidden), y.element_size()) if train else wide
        c = y.new_empty(y.shape[0], hidden, dtype=state_dtype(y)) if train and self.cell == "lstm" else None
        last = [torch.empty_like(s) for s in states]
        fused = x.dtype is torch.bfloat16  # The kernel multiplies x itself: a product rounded to 16 bits costs digits.
        problem = self.problem(x, batch_sizes, states, w_hr, reverse, fused)
        blocks, most = self.blocks(y, batch_sizes, problem, reverse)
        inputs = (w_ih.contiguous(), in_pairs(rows), bias) if fused else (None, None, None)
        # Without gradients the gates live for a block only; those of an Elman network turn into y.
        if fused and (self.gates == 1 or not train):
            gates = None
        else:
            gates = [y] if self.gates == 1 else [rows.new_empty(most, kept)] if not train else [
                rows.new_empty(n, kept) for n in self.kept_rows(x, batch_sizes, hidden)]
        workspace = self.workspace(y, problem, False)
        if train or y.nbytes + workspace.nbytes > KEPT_BYTES:
            keep_freed_memory()
        for steps, part in blocks:
            now = None if gates is None else rows_of(gates, part) if train or self.gates == 1 else \
                gates[0][: part.stop - part.start]
            if not fused:
                mm(self.native, rows[part], w_ih.t(), now[:, :wide], bias=bias)
            buffers = w_hh, w_hr, *inputs, b_hn, now, *pair(states), y, c, *pair(last), workspace
            ld = 0 if now is None else now.shape[1]
            self.call("rnn_forward", y, problem, steps, ld, train,
                      self.addresses(buffers, "nnnnssnssnsssn", like=y))
        saved = [] if not train or self.gates == 1 else gates if c is None else [*gates, c]
        return [y.view(*x.shape[:-1], y.shape[1]), *(s.to(x.dtype) for s in last), *saved]

    def direct(self, tensors, train, reverse):
        """Do what `forward` does without packing, copying or converting a weight matrix."""
        x, batch_sizes, *states, w_ih, w_hh, b_ih, b_hh, _ = [t if t is None else t.contiguous() for t in tensors]
        problem, hidden = self.problem(x, batch_sizes, states, None, reverse), w_hh.shape[1]
        rows = math.prod(x.shape[:-1])
        last, once = [torch.empty_like(s) for s in states], batch_sizes is None and x.shape[0] == 1
        y = torch.empty_like(states[0]) if once else x.new_empty(*x.shape[:-1], hidden)
        columns = padded(4 * hidden, x.element_size())
        none, gates = None, None
        if self.gates > 1 and not (once and not train):
            none, gates = x.new_empty(0, columns), x.new_empty(rows, columns)
        c = x.new_empty(rows, hidden) if train and self.cell == "lstm" else None
        buffers = x, w_ih, w_hh, b_ih, b_hh, *pair(states), gates, y, c, *pair(last)
        self.call("rnn_direct", y, problem, (0, problem[2]), columns, train,
                  self.addresses(buffers, "nwwnnnnnnnnn", like=x, weight=w_hh), NUMBERS[w_hh.dtype], x.shape[-1])
        return [y, *last, *(t for t in (none, gates, c) if train and t is not None)]

    def fake(self, tensors, needs, reverse):
        x, batch_sizes, *states, _, w_hh, _, _, _ = tensors
        hidden, rows = states[-1].shape[-1], math.prod(x.shape[:-1])  # Size.numel would make constants of symbols
        results = [x.new_empty(*x.shape[:-1], w_hh.shape[1]), *(s.new_empty(s.shape) for s in states)]
        if not any(needs) or self.gates == 1:
            return results
        c = [x.new_empty(rows, hidden, dtype=state_dtype(x))] if self.cell == "lstm" else []
        columns = padded(4 * hidden, x.element_size())
        return [*results, *(x.new_empty(n, columns) for n in self.kept_rows(x, batch_sizes, hidden)), *c]

    def backward(self, grads, saved, tensors, needs, reverse, spent):
        x, batch_sizes, *states, w_ih, w_hh, _, _, w_hr = tensors
        y, *saved = saved
        gates, c = saved[:2] or None, saved[2] if len(saved) > 2 else None
        wide, out, hidden = *w_hh.shape, states[-1].shape[-1]
        h0, states = states[0], as_states(states)
        w_hh, w_hr = as_weights(w_hh, w_hr)
        dy, d_last = grads[0].contiguous(), as_states(grads[1:])
        rows, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, out)
        kept = sum(map(len, gates)) if gates else len(rows)
        if len(y) != len(rows) or kept != len(rows) or (c is not None and c.shape != (len(rows), hidden)) or (
                gates and min(g.shape[1] for g in gates) < self.columns(hidden)):
            raise RuntimeError(f"{self.cell}: what backward is given is not what forward has saved")
        # dgates begins with the gates of GRU in the order n r z, so that those of either product lie side by side; in
        # 16 bits in that of W_ih, because dX as a sum of two products would be rounded twice.
        turn, of_u = 0, [(slice(0, wide), slice(0, wide))]  # rows of W_hh and their columns of dgates
        if self.cell == "gru" and y.element_size() == 2:
            of_u = [(slice(0, 2 * hidden), slice(0, 2 * hidden)), (slice(2 * hidden, wide), slice(wide, wide + hidden))]
        elif self.cell == "gru":
            turn, of_u = hidden, [(slice(0, wide), slice(hidden, hidden + wide))]
        need_x, _, *_, need_w, need_u, need_b, need_bu, need_hr = needs
        problem = self.problem(x, batch_sizes, states, w_hr, reverse)
        blocks, most = self.blocks(y, batch_sizes, problem, not reverse)
        before = states_before(y, h0[0], batch_sizes, reverse) if need_u else None
        columns = self.columns(hidden)
        # The gradients of gates take the place of the gates where nobody will read those again.
        in_place = spent and gates is not None and w_hr is None
        d_all = None if in_place else \
            y.new_empty(most, padded(columns if w_hr is None else columns + out + hidden, y.element_size()))
        d_states = [torch.empty_like(s) for s in states]
        workspace = self.workspace(y, problem, True)
        dx = rows.new_empty(rows.shape) if need_x else None
        dw, du, dhr = (w.new_empty(w.shape) if need else None
                       for w, need in ((w_ih, need_w), (w_hh, need_u), (w_hr, need_hr)))
        total = y.new_zeros(2, columns, dtype=state_dtype(y))
        for steps, part in blocks:
            kept = None if gates is None else rows_of(gates, part)
            d = kept if in_place else d_all[: part.stop - part.start]
            buffers = (w_hh, w_hr, kept, y, c, *pair(states), dy, *pair(d_last), d, total, *pair(d_states), workspace)
            self.call("rnn_backward", y, problem, steps, 0 if gates is None else kept.shape[1], d.shape[1],
                      self.addresses(buffers, "nnnnsssnssnsssn", like=y))
            if steps == blocks[-1][0]:
                del buffers, workspace  # before the products, at whose end most memory is in use
            d_in, later = d[:, :wide], steps != blocks[0][0]
            if need_x:
                self.pull(d_in, w_ih, turn, dx[part])
            for of_w, of_d in halves(wide, turn) if need_w else ():
                mm(self.native, d_in.t()[of_d], rows[part], dw[of_w], add=later)
            for i, (piece, h) in enumerate(before(part) if need_u else ()):
                for of_du, of_d in of_u:
                    mm(self.native, d[piece, of_d].t(), h, du[of_du], add=later or i > 0)
            if need_hr:
                d_out, unprojected = d[:, columns: columns + out], d[:, columns + out: columns + out + hidden]
                mm(self.native, d_out.t(), unprojected, dhr, add=later)
        total = total.sum(0).to(x.dtype)
        db = total[:wide].roll(-turn) if need_b else None
        dbu = torch.cat([total[of_d] for _, of_d in of_u]) if need_bu else None
        d_states = [s.to(x.dtype) for s in d_states]
        return [dx.view(x.shape) if need_x else None, None, *d_states, dw, du, db, dbu, dhr]

    def pull(self, d_in, w_ih, turn, out):
        """Write d_in · W_ih into `out`, where d_in has the gates of GRU in another order.

        Two products spare a copy of W_ih.
        """
        for i, (of_w, of_d) in enumerate(halves(d_in.shape[1], turn)):
            mm(self.native, d_in[:, of_d], w_ih[of_w], out, add=i > 0)

    def columns(self, hidden):
        """Return how many numbers of each row the backward pass reads and makes: GRU has U h of gate n besides.

        A projection's two products are no part of it.
        """
        return 4 * hidden if self.cell == "gru" else self.gates * hidden

    def blocks(self, y, batch_sizes, problem, reverse):
        """Return blocks of time in the order of visit, each ((first, last) step, slice of rows), and the most rows.

        What lives for a block only, gates or their gradients, is small enough to be used while caches hold it. In 16
        bits there is one block: the sums of several would be rounded each time.
        """
        _, _, steps, batch, hidden, *_ = problem
        count = self.block_count(y, steps, y.shape[0], hidden)
        rows = range(0, steps * batch + 1, batch or 1) if batch_sizes is None else [0, *batch_sizes.cumsum(0).tolist()]
        ends = [steps * i // count for i in range(count + 1)]
        found = [((t, u), slice(rows[t], rows[u])) for t, u in itertools.pairwise(ends)] if batch else [
            ((0, steps), slice(0, 0))]
        return found[::-1] if reverse else found, max(part.stop - part.start for _, part in found)

    def block_count(self, like, steps, rows, hidden):
        size = rows * self.columns(hidden) * like.element_size()
        return 1 if like.element_size() == 2 else torch.sym_min(steps, 1 + size // BLOCK_BYTES)

    def kept_rows(self, x, batch_sizes, hidden):
        """Return how many rows of gates each of two tensors keeps: those of the first half of the blocks, and the rest.

        Of 32 MB or more, glibc's malloc takes new pages from the system each time, which cost as much as the products
        that are written there. A graph knows no batch_sizes: those of packed batches lie in one tensor.
        """
        rows = math.prod(x.shape[:-1])
        if batch_sizes is not None:
            return 0, rows
        steps, batch = x.shape[:2]
        count = self.block_count(x, steps, rows, hidden)
        first = steps * (count // 2) // count * batch
        return first, rows - first

    # --- what crosses into C++ ---

    def problem(self, x, batch_sizes, states, w_hr, reverse, fused=False):
        _, batch, hidden = states[-1].shape
        projection = 0 if w_hr is None else w_hr.shape[0]
        steps, sizes = recurrent.steps_of(self.cell, x, batch_sizes, batch)
        precision = PRECISIONS[matmul_precision("cpu")]
        return (CELLS[self.cell], reverse, steps, batch, hidden, projection, x.shape[-1] if fused else 0, sizes,
                torch.get_num_threads(), precision)

    def workspace(self, like, problem, backward):
        size = like.element_size()
        return like.new_empty(self.native.rnn_workspace((*problem, 0, problem[2]), backward, size) // size)

    def call(self, name, like, problem, steps, *args):
        getattr(self.native, name)((*problem, *steps), like.element_size(), *args)

    def addresses(self, buffers, kinds, like, weight=None):
        """Check what the kernel takes for granted, and return where the tensors lie (0 for None).

        `kinds` says of each tensor whether it holds numbers (n) like those of `like`, what carries a state (s), or
        weights (w) like `weight`. The caller keeps `buffers` until the kernel is done: an address alone keeps no
        memory.
        """
        return self.native.addresses(buffers, kinds, NUMBERS[like.dtype], NUMBERS[state_dtype(like)],
                                     NUMBERS[(like if weight is None else weight).dtype])


def cast(tensors, dtype):
    """Return the tensors, which may be None, as `dtype`; `Tensor.to` alone takes a microsecond to see nothing to do."""
    return tuple([t if t is None or t.dtype is dtype else t.to(dtype) for t in tensors])


def state_dtype(like: Tensor) -> torch.dtype:
    """Return what carries a state from step to step in a layer of such numbers."""
    return torch.float32 if like.dtype is torch.bfloat16 else like.dtype


def as_weights(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


def as_states(tensors: list[Tensor]) -> list[Tensor]:
    return [t.to(state_dtype(t)).contiguous() for t in tensors]


def in_pairs(rows: Tensor) -> Tensor:
    """Return the rows, contiguous, with zeros up to a multiple of 32 columns."""
    rest = -rows.shape[1] % 32
    return F.pad(rows, (0, rest)) if rest else rows.contiguous()


def rows_of(parts: list[Tensor], rows: slice) -> Tensor:
    """Return the rows of what lies in one tensor, or in two, one after the other, of which only one has them."""
    first = parts[0].shape[0]
    return parts[0][rows] if rows.stop <= first else parts[1][rows.start - first: rows.stop - first]


def padded(columns: int, size: int) -> int:
    """Return how far apart rows of `columns` numbers should lie: on cache lines, no page apart, which share sets."""
    line = 64 // size
    columns = -(-columns // line) * line
    return columns + line if columns * size % 4096 == 0 else columns


def halves(wide: int, turn: int) -> list[tuple[slice, slice]]:
    """Return which rows of W_ih belong to which columns of dgates, where the last `turn` rows come first."""
    return [(slice(wide - turn, wide), slice(0, turn)), (slice(0, wide - turn), slice(turn, wide))][not turn:]


def states_before(y: Tensor, h0: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Callable:
    """Return f(rows): pairs of a slice within those rows and the states [., H] before it in reading order.

    In 16 bits it is one pair, because the sum of two products would be rounded twice.
    """
    batch, count = h0.shape[0], y.shape[0]
    if batch_sizes is not None:
        states, index = torch.cat([h0, y]), _rows_before(batch_sizes, batch, reverse)
        return lambda rows: [(slice(None), states[index[rows]])]
    if y.element_size() == 2:
        parts = [y[batch:], h0] if reverse else [h0, y[: count - batch]]
        return lambda rows: [(slice(None), torch.cat(parts))]

    def before(rows):
        """The first step in reading order follows h0."""
        start, stop = (rows.start + batch, rows.stop + batch) if reverse else (rows.start - batch, rows.stop - batch)
        if stop > count:
            return [(slice(0, count - start), y[start:]), (slice(count - start, None), h0)]
        if start < 0:
            return [(slice(batch, None), y[:stop]), (slice(0, batch), h0)]
        return [(slice(None), y[start:stop])]
    return before


def _rows_before(batch_sizes, batch, reverse):
    """Return for each packed row the row of cat([h0, y]) that holds the state before it."""
    sizes, index, row = batch_sizes.tolist(), [], 0
    count = functools.partial(torch.arange, device=batch_sizes.device)
    for t, n in enumerate(sizes):
        if not reverse:
            index.append(count(n) + (0 if t == 0 else batch + row - sizes[t - 1]))
        else:
            later = sizes[t + 1] if t + 1 < len(sizes) else 0
            index += [count(later) + batch + row + n, count(later, n)]
        row += n
    return torch.cat(index)
