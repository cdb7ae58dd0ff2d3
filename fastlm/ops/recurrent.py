"""What lstm, gru and rnn share: their arguments, the stacking of layers and directions, samples and cost.

The ops take one canonical list of arguments for both overloads of `torch.lstm`:
`(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)` with
`batch_sizes` None for a dense batch and `hx` always a tuple.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.autograd import Differentiable, autocast, autocasts
from fastlm.dispatch import Sample

DENSE = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
IN_PLACE = 64  # hidden units from which on kernels multiply few rows by weights where they lie
MOST_ROWS = {"lstm": 64, "gru": 64, "tanh": 32, "relu": 32}  # of which kernels make one step in float32
PACKED = ("data", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")


# --- arguments -------------------------------------------------------------------------------------------------


def canonical(name: str, gates: int, states: int, args: tuple, kwargs: dict) -> tuple:
    """Bind either overload of `torch.lstm` and return the op's arguments, checked.

    Args:
        name: what errors call the op.
        gates: weight rows per hidden unit: 4 for LSTM, 3 for GRU, 1 for RNN.
        states: how many tensors `hx` holds: 2 for LSTM, else 1.

    Raises:
        TypeError: arguments are missing, unknown or no tensors.
        RuntimeError: a shape, dtype, device or count does not fit the others.
    """
    packed = "batch_sizes" in kwargs or "data" in kwargs or (len(args) > 3 and isinstance(args[3], list | tuple))
    names = PACKED if packed else DENSE
    if kwargs or len(args) != len(names):
        values = dict(zip(names, args, strict=False)) | kwargs
        if len(args) > len(names) or set(values) != set(names) or len(args) + len(kwargs) != len(names):
            raise TypeError(f"{name}: expected the arguments ({', '.join(names)}), "
                            f"got {len(args)} positional and {sorted(kwargs)}")
        args = [values[n] for n in names]
    if packed:
        data, batch_sizes, hx, params, *options = *args, False
    else:
        data, hx, params, *options = args
        batch_sizes = None
    hx = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    _check_tensors(name, data, hx, params)
    if len(hx) != states:
        raise RuntimeError(f"{name}: hx has {len(hx)} tensors, expected {states}")
    _check_sizes(name, gates, data, batch_sizes, hx, params, *options)
    return data, batch_sizes, hx, list(params), *options


def _check_tensors(name, data, hx, params):
    tensors, states = (data, *hx, *params), len(hx)

    def label(i):
        return "input" if i == 0 else f"hx[{i - 1}]" if i <= states else f"params[{i - 1 - states}]"

    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {label(i)} must be a Tensor, got {type(t).__name__}")
    dtype, device = data.dtype, data.device
    if not dtype.is_floating_point:
        raise RuntimeError(f"{name}: input must be floating point, got {dtype}")
    for i, t in enumerate(tensors):
        if t.dtype is not dtype and not (t.is_floating_point() and autocasts(device.type)):
            raise RuntimeError(f"{name}: {label(i)} has dtype {t.dtype}, input has {dtype}")
        if t.device != device:
            raise RuntimeError(f"{name}: {label(i)} is on {t.device}, input is on {device}")


def _check_sizes(name, gates, data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional,
                 batch_first):
    if not 0 <= dropout <= 1:
        raise RuntimeError(f"{name}: dropout is {dropout}, expected a probability")
    dims = 3 if batch_sizes is None else 2
    if data.dim() != dims:
        raise RuntimeError(f"{name}: input has shape {list(data.shape)}, expected {dims} dimensions")
    directions = 2 if bidirectional else 1
    cells = num_layers * directions
    least = 4 if has_biases else 2
    per = len(params) // cells if cells else 0
    if cells < 1 or len(params) != per * cells or per not in (least, least + 1) or (per > least and gates != 4):
        raise RuntimeError(f"{name}: params has {len(params)} tensors, expected {least} for each of {cells} "
                           "layers and directions")
    batch = _batch(name, data, batch_sizes, hx, batch_first)
    hidden = params[1].shape[0] // gates if params[1].dim() else 0
    rows, wide = gates * hidden, data.shape[-1]
    out = params[per - 1].shape[0] if per > least else hidden
    for i, h in enumerate(hx):
        if h.shape != (cells, batch, hidden if i else out):
            _refuse(name, f"hx[{i}]", h, [cells, batch, hidden if i else out])
    for k in range(cells):
        shapes = [(rows, wide if k < directions else directions * out), (rows, out)]
        shapes += [(rows,)] * (least - 2) + [(out, hidden)] * (per - least)
        for i, shape in enumerate(shapes, k * per):
            if params[i].shape != shape:
                _refuse(name, f"params[{i}]", params[i], list(shape))


def _refuse(name, label, tensor, shape):
    raise RuntimeError(f"{name}: {label} has shape {list(tensor.shape)}, expected {shape}")


def _batch(name, data, batch_sizes, hx, batch_first):
    """Return the number of sequences; check what can be known of them."""
    if batch_sizes is None:
        batch, steps = data.shape[:2] if batch_first else (data.shape[1], data.shape[0])
        if steps == 0:
            raise RuntimeError(f"{name}: input has shape {list(data.shape)}, expected at least one time step")
        return batch
    if not isinstance(batch_sizes, Tensor) or batch_sizes.dtype is not torch.int64 or batch_sizes.dim() != 1 \
            or batch_sizes.device.type != "cpu" or batch_sizes.numel() == 0:
        raise RuntimeError(f"{name}: batch_sizes must be a non-empty int64 vector on the CPU")
    if torch.compiler.is_compiling():  # values are unknown while tracing; the kernels check them again
        return hx[0].shape[1]
    check_batch_sizes(name, batch_sizes, data.shape[0])
    return int(batch_sizes[0])


def check_batch_sizes(name: str, batch_sizes: Tensor, rows: int) -> None:
    """Raise RuntimeError unless the sizes are positive, never rise and sum to `rows`."""
    sizes = batch_sizes.tolist()
    if any(later > earlier for earlier, later in itertools.pairwise(sizes)) or sizes[-1] < 1:
        raise RuntimeError(f"{name}: batch_sizes must be positive and never rise, got {sizes}")
    if sum(sizes) != rows:
        raise RuntimeError(f"{name}: batch_sizes sum to {sum(sizes)}, but input has {rows} rows")


# --- kernels, on the CPU and on a GPU -----------------------------------------------------------------------------


CELLS = {"lstm": 0, "gru": 1, "tanh": 2, "relu": 3}  # as csrc/rnn.h numbers them
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}


def steps_of(name: str, x: Tensor, batch_sizes: Tensor | None, batch: int) -> tuple[int, int]:
    """Return what a kernel is told of time: how many steps, and the address of their sizes or 0; check the sizes."""
    if batch_sizes is None:
        return x.shape[0], 0
    check_batch_sizes(name, batch_sizes, x.shape[0])
    if int(batch_sizes[0]) != batch:
        raise RuntimeError(f"{name}: hx is for {batch} sequences, batch_sizes for {int(batch_sizes[0])}")
    if not batch_sizes.is_contiguous():
        raise RuntimeError(f"{name}: batch_sizes must be contiguous, got stride {batch_sizes.stride(0)}")
    return batch_sizes.numel(), batch_sizes.data_ptr()


def projects(params: Sequence[Tensor], has_biases: bool, options: Sequence) -> bool:
    """Tell whether each layer and direction has a w_hr besides; `options` are num_layers, dropout, train, ..."""
    num_layers, _, _, bidirectional, _ = options
    return len(params) > (4 if has_biases else 2) * num_layers * (2 if bidirectional else 1)


def split_biases(cell: str, b_ih: Tensor | None, b_hh: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the bias that may be added outside the loop, and the one that may not: GRU's b_hn."""
    if b_ih is None or cell != "gru":
        return None if b_ih is None else b_ih + b_hh, None
    outside = b_ih.shape[0] // 3 * 2
    return torch.cat([b_ih[:outside] + b_hh[:outside], b_ih[outside:]]), b_hh[outside:].contiguous()


def pair(states: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return (h, c), or (h, None) for a cell that has no c."""
    return states if len(states) == 2 else [*states, None]


# --- layers ----------------------------------------------------------------------------------------------------


def stack(layer: Callable, data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional,
          batch_first) -> tuple[Tensor, ...]:
    """Run `layer(x, batch_sizes, hx, params) -> (output, *last states)` for each layer, dropout in between."""
    dense_first = batch_first and batch_sizes is None
    x = data.transpose(0, 1) if dense_first else data
    directions = 2 if bidirectional else 1
    per = len(params) // num_layers
    last = []
    for i in range(num_layers):
        states = hx if num_layers == 1 else tuple(h[i * directions: (i + 1) * directions] for h in hx)
        x, *final = layer(x, batch_sizes, states, params[i * per: (i + 1) * per])
        last.append(final)
        if dropout and train and i < num_layers - 1:
            x = F.dropout(x, dropout)
    return (x.transpose(0, 1) if dense_first else x,
            *(torch.cat(states) if num_layers > 1 else states[0] for states in zip(*last, strict=True)))


def directions(one: Callable, has_biases: bool, bidirectional: bool) -> Callable:
    """Make a layer of `one(x, batch_sizes, states, weights, reverse) -> (output, *last states)`.

    Its states are [1, B, H] each; `weights` is (w_ih, w_hh, b_ih, b_hh, w_hr), None where there is none.
    """
    def layer(x, batch_sizes, hx, params):
        count = 2 if bidirectional else 1
        per = len(params) // count
        found = []
        for d in range(count):
            w_ih, w_hh, *rest = params[d * per: (d + 1) * per]
            b_ih, b_hh = rest[:2] if has_biases else (None, None)
            w_hr = rest[-1] if per in (3, 5) else None
            states = [h[d: d + 1] for h in hx] if bidirectional else hx
            found.append(one(x, batch_sizes, states, (w_ih, w_hh, b_ih, b_hh, w_hr), d == 1))
        if not bidirectional:
            return found[0]
        outputs, *last = zip(*found, strict=True)
        return torch.cat(outputs, -1), *(torch.cat(s) for s in last)
    return layer


def reference(step: Callable, data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional,
              batch_first) -> tuple[Tensor, ...]:
    """Run a network of `step`s: see `scan`."""
    layer = directions(lambda *args: scan(step, *args), has_biases, bidirectional)
    return stack(layer, data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional,
                 batch_first)


def scan(step: Callable, x: Tensor, batch_sizes: Tensor | None, states: Sequence[Tensor], weights: tuple,
         reverse: bool) -> tuple[Tensor, ...]:
    """Run one layer in one direction, step by step.

    Args:
        step: `step(projected, states, w_hh, b_hh, w_hr) -> states`, where the first state is the output.
        x: [T, B, I], or the packed rows [N, I], longest sequence first.
        batch_sizes: [T] sequences alive at each step, None for all of them.
        states: each [1, B, H].

    Returns:
        The output [T, B, H] or [N, H], then the last state of each sequence, [1, B, H] each.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    projected = F.linear(x, w_ih, b_ih)
    if batch_sizes is None:
        steps = list(projected)
    else:
        steps = projected.split([int(n) for n in batch_sizes])
    outputs, states = [], [s[0] for s in states]
    for now in reversed(steps) if reverse else steps:
        alive = now.shape[0]
        found = step(now, [s[:alive] for s in states], w_hh, b_hh, w_hr)
        outputs.append(found[0])
        # A sequence that ended keeps its last state; read backwards, one that has not begun keeps its first.
        states = [torch.cat([new, old[alive:]]) for new, old in zip(found, states, strict=True)]
    if reverse:
        outputs.reverse()
    return (torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)), *(s[None] for s in states)


# --- stock -----------------------------------------------------------------------------------------------------


STOCK = {"lstm": torch.lstm, "gru": torch.gru, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}


def stock(cell: str, data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional,
          batch_first) -> tuple[Tensor, ...]:
    """Run stock PyTorch; while compiling, but not for an export, as one opaque operator a layer.

    Traced, the LSTM becomes `mkldnn_rnn_layer`, which has no backward there (torch 2.13).
    """
    options = (has_biases, num_layers, dropout, train, bidirectional)
    if torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag:
        def layer(x, batch_sizes, hx, params):
            tensors, projected = [x, *hx, *params], cell == "lstm" and hx[0].shape[-1] != hx[1].shape[-1]
            if cell in ("tanh", "relu") or projected or (cell == "lstm" and batch_sizes is None):
                tensors = autocast(x.device.type, *tensors)  # as stock does inside, unseen by an opaque operator
            found = _stock_layers[cell]([tensors[0], batch_sizes, *tensors[1:]], cell, has_biases, bidirectional)
            if projected:  # its cell state keeps its dtype
                found = [*found[:2], found[2].to(hx[1].dtype)]
            return found
        return stack(layer, data, batch_sizes, hx, params, *options, batch_first)
    return _call_stock(cell, data, batch_sizes, hx, params, *options, batch_first)


def _call_stock(cell, data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional,
                batch_first):
    hx = [s.contiguous() for s in hx]  # cuDNN refuses others
    state = hx if cell == "lstm" else hx[0]
    if cell == "lstm" and batch_sizes is None and data.shape[1 if batch_first else 0] == 1 and len(hx[0]) == 1 \
            and len(params) in (2, 4) and not autocasts(data.device.type) and not torch._C._is_tracing():
        # One step of one layer: oneDNN would pack the weights first, for up to ten times as long as the step takes.
        h, c = torch.lstm_cell(data[:, 0] if batch_first else data[0], [s[0] for s in hx], *params)
        return torch.stack([h], 1 if batch_first else 0), h[None], c[None]
    if batch_sizes is None:
        return STOCK[cell](data, state, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    batch_sizes = batch_sizes.contiguous()  # others are misread there
    return STOCK[cell](data, batch_sizes, state, params, has_biases, num_layers, dropout, train, bidirectional)


def _split(tensors, cell):
    data, batch_sizes, *rest = tensors
    states = 2 if cell == "lstm" else 1
    return data, batch_sizes, tuple(rest[:states]), rest[states:]


def _stock_forward(tensors, needs, cell, has_biases, bidirectional):
    return [t.clone() for t in
            _call_stock(cell, *_split(tensors, cell), has_biases, 1, 0.0, False, bidirectional, False)]


def _stock_fake(tensors, needs, cell, has_biases, bidirectional):
    data, _, hx, _ = _split(tensors, cell)
    wide = hx[0].shape[-1] * (2 if bidirectional else 1)
    return [data.new_empty(*data.shape[:-1], wide), *(h.new_empty(h.shape) for h in hx)]


def _stock_backward(grads, saved, tensors, needs, cell, has_biases, bidirectional):
    inputs = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    with torch.enable_grad():
        results = _call_stock(cell, *_split(inputs, cell), has_biases, 1, 0.0, True, bidirectional, False)
        found = iter(torch.autograd.grad(results, wanted, grads))
    return [next(found) if need else None for need in needs]


_stock_layers = {
    cell: Differentiable(f"{cell}_stock", statics="str cell, bool has_biases, bool bidirectional",
                         outputs=3 if cell == "lstm" else 2, forward=_stock_forward, fake=_stock_fake,
                         backward=_stock_backward,
                         reference=lambda tensors, cell, *options: _call_stock(
                             cell, *_split(tensors, cell), options[0], 1, 0.0, True, options[1], False))
    for cell in STOCK}


# --- samples and cost ------------------------------------------------------------------------------------------


def make_args(gates: int, states: int, dtype: torch.dtype, device: str, *, steps: int = 5, batch: int = 3,
              inputs: int = 6, hidden: int = 8, layers: int = 1, bidirectional: bool = False, bias: bool = True,
              batch_first: bool = False, lengths: Sequence[int] | None = None, proj: int = 0, dropout: float = 0.0,
              train: bool = True, scale: float = 1.0) -> tuple:
    """Draw the op's arguments as torch.nn would initialise them; `lengths` (longest first) make a packed batch."""
    def draw(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype)

    count, out, bound = 2 if bidirectional else 1, proj or hidden, hidden ** -0.5
    params, wide = [], inputs
    for _ in range(layers):
        for _ in range(count):
            shapes = [(gates * hidden, wide), (gates * hidden, out)]
            shapes += [(gates * hidden,)] * 2 if bias else []
            shapes += [(out, hidden)] if proj else []
            params += [((torch.rand(s, device=device) * 2 - 1) * bound * scale).to(dtype) for s in shapes]
        wide = count * out
    batch_sizes = None
    shape = (batch, steps, inputs) if batch_first else (steps, batch, inputs)
    if lengths:
        batch = len(lengths)
        batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(lengths[0])])
        shape = (sum(lengths), inputs)
    hx = tuple(draw(layers * count, batch, out if i == 0 else hidden) for i in range(states))
    return draw(*shape, scale=scale), batch_sizes, hx, params, bias, layers, dropout, train, bidirectional, batch_first


TEST_SHAPES = {
    "plain": {},
    "one step": {"steps": 1},
    "one sequence": {"batch": 1, "hidden": 33},
    "one step of one sequence": {"steps": 1, "batch": 1, "hidden": 16},
    **{f"hidden {h}": {"hidden": h, "batch": 2, "inputs": 5} for h in (1, 7, 16, 33, 127, 129)},
    "many rows": {"batch": 37, "hidden": 20, "inputs": 1},
    "long": {"steps": 70, "batch": 2, "hidden": 12},
    "long alone": {"steps": 70, "batch": 1, "hidden": 40},
    "layers": {"layers": 3},
    "bidirectional": {"bidirectional": True, "hidden": 17},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True, "inputs": 9},
    "packed": {"lengths": (7, 4, 4, 1), "hidden": 18},
    "packed bidirectional layers": {"lengths": (6, 6, 3, 2, 1), "bidirectional": True, "layers": 2},
    "packed alone": {"lengths": (4,), "bidirectional": True},
    "dropout": {"layers": 2, "dropout": 0.3, "bidirectional": True},
    "dropout in evaluation": {"layers": 2, "dropout": 0.3, "train": False},
    "no sequences": {"batch": 0},
    "outliers": {"scale": 30.0, "hidden": 19},
    "few rows": {"steps": 2, "hidden": 70, "inputs": 21},
    "few packed rows": {"lengths": (3, 3, 2, 1), "hidden": 67, "bidirectional": True},
    "one step of many": {"steps": 1, "batch": 15, "hidden": 64, "bias": False, "layers": 2},
}
PROJECTED = {
    "projection": {"proj": 5},
    "packed projection": {"proj": 5, "lengths": (5, 3, 1), "layers": 2, "bidirectional": True},
    "wide projection": {"proj": 70, "hidden": 131, "batch": 14, "bidirectional": True},
    "projection of one sequence": {"proj": 33, "hidden": 66, "batch": 1, "steps": 7},
    "one step of a projection": {"proj": 17, "hidden": 64, "steps": 1, "bias": False},
    "projection to one": {"proj": 1, "hidden": 3, "layers": 2, "batch_first": True},
}
BENCH_SHAPES = ((128, 32, 256), (128, 32, 512), (32, 64, 1024), (512, 1, 512), (35, 20, 650), (1, 1, 512))


def samples(gates: int, states: int, scale: str, dtype: torch.dtype, device: str):
    """Yield the samples of a cell: every feature of torch.nn on small sizes, or the shapes of real models."""
    if scale == "bench":
        for steps, batch, hidden in BENCH_SHAPES:
            yield Sample(f"T{steps} B{batch} H{hidden}", make_args(
                gates, states, dtype, device, steps=steps, batch=batch, inputs=hidden, hidden=hidden))
        return
    for name, options in (TEST_SHAPES | (PROJECTED if states == 2 else {})).items():
        yield Sample(name, make_args(gates, states, dtype, device, **options))
    spoilt = make_args(gates, states, dtype, device, steps=4, batch=3)
    spoilt[0][1, 1, 2] = torch.nan
    yield Sample("not a number", spoilt)
    strided = make_args(gates, states, dtype, device, inputs=12)
    yield Sample("not contiguous", (strided[0][..., ::2], None, tuple(h.mT.contiguous().mT for h in strided[2]),
                                    [p[:, :6] if i == 0 else p for i, p in enumerate(strided[3])], *strided[4:]))


def cost(gates: int, data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional,
         batch_first) -> tuple[int, int]:
    rows = data.shape[0] if batch_sizes is not None else data.shape[0] * data.shape[1]
    weights = sum(p.numel() for p in params if p.dim() == 2)
    wide = hx[0].shape[-1] * (2 if bidirectional else 1)
    numbers = data.numel() + rows * wide + sum(p.numel() for p in params) + 2 * sum(h.numel() for h in hx)
    return 2 * rows * weights + 10 * gates * rows * wide * num_layers, numbers * data.element_size()
