"""RNN, LSTM and GRU: torch.nn's arguments, parameters and results, and whole graphs under torch.compile.

They are plain modules: torch refuses to compile nn.RNN, nn.LSTM, nn.GRU and everything derived from them. Nothing
is cached between calls, so parametrised, pruned, swapped and shared weights are simply read.
"""

import functools
import math
import numbers
import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastlm import ops
from fastlm.autograd import autocasts
from fastlm.dispatch import at_once, runs_stock
from fastlm.ops import recurrent
from fastlm.ops.gru import op as gru_op
from fastlm.ops.lstm import op as lstm_op
from fastlm.ops.recurrent import IN_PLACE, MOST_ROWS
from fastlm.ops.rnn import op as rnn_op


def _shortcut(module, input, hx=None):
    """Run the layers over a dense batch: one step in one call of C++ where it can be, else by the op, which checks."""
    steps, batch, width = input.shape
    if module.batch_first:
        steps, batch = batch, steps
    state = module._zeros(input, batch) if hx is None else module._split(hx)
    settings, found = (*module._settings, module.batch_first), None
    weights = settings[0]
    if steps == 1 and width == module.input_size and weights[1].shape[-1] == module.hidden_size:
        found = module.op.at_once(input, module._join(state), *settings, *module._nonlinearity)
    if found is None:
        module._check_state(state, (batch,))
        module._check_input(input, weights[0])
        if module._runs_stock(input, state, weights, steps) and module._fits(weights):
            found = module.op.implementations["torch"].run(input, None, state, *settings, *module._nonlinearity)
        else:
            found = module._run(input, module._join(state), *settings)
    output, *state = found
    return output, module._join(state)


class _Recurrent(nn.Module):
    """Hold the parameters of a stack of recurrent layers and bring input and state into the op's form."""

    op = rnn_op
    gates = 1  # rows of each weight matrix, in hidden sizes
    _nonlinearity = ()  # what the op takes besides torch's arguments: RNN's alone

    def __init__(self, mode, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                 proj_size, device, dtype):
        super().__init__()
        _check_options(input_size, hidden_size, num_layers, bias, batch_first, dropout, proj_size)
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self._all_weights, self._all_shapes = [], []
        for layer in range(num_layers):
            for suffix in ("", "_reverse")[: self._directions]:
                shapes = self._shapes(layer)
                for name, shape in shapes.items():
                    empty = torch.empty(shape, device=device, dtype=dtype)
                    self.register_parameter(f"{name}_l{layer}{suffix}", nn.Parameter(empty))
                self._all_weights.append([f"{name}_l{layer}{suffix}" for name in shapes])
                self._all_shapes += shapes.values()
        self.flatten_parameters()
        self.reset_parameters()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the parameters of one direction of a layer, in the order that torch.nn registers them."""
        rows, width = self.gates * self.hidden_size, self.proj_size or self.hidden_size
        shapes = {"weight_ih": (rows, width * self._directions if layer else self.input_size),
                  "weight_hh": (rows, width)}
        if self.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if self.proj_size:
            shapes |= {"weight_hr": (self.proj_size, self.hidden_size)}
        return shapes

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/√hidden_size, 1/√hidden_size)."""
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """Return the parameters, a list for each direction of each layer."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Tensor]:
        try:
            return [self._parameters[name] for names in self._all_weights for name in names]
        except KeyError:  # parametrised or pruned: an attribute that is made of others
            return [getattr(self, name) for name in self._flat_weights_names]

    def flatten_parameters(self) -> None:
        """Lay the parameters out as cuDNN wants them, lest it copies them at each call; do nothing elsewhere."""
        nn.RNNBase.flatten_parameters(self)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.flatten_parameters()
        return self

    def extra_repr(self) -> str:
        shown = {"proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0,
                 "bidirectional": False}
        options = [f"{name}={getattr(self, name)}" for name, default in shown.items() if getattr(self, name) != default]
        return ", ".join([str(self.input_size), str(self.hidden_size), *options])

    @at_once(_shortcut)
    def forward(self, input: Tensor | PackedSequence, hx=None):
        """Run the layers over a sequence.

        Args:
            input: `[T, B, input_size]` (`[B, T, input_size]` with `batch_first`), `[T, input_size]` or a
                `PackedSequence`.
            hx: the initial state, zeros where None; `[num_layers * directions, B, H]`, without `B` for unbatched
                input. H is `proj_size` where that is set; LSTM takes a pair `(h, c)`, whose c has `hidden_size`.

        Returns:
            Every hidden state of the last layer, in the form of `input`, and the last state, in the form of `hx`.

        Raises:
            ValueError: `input` is neither 2-D nor 3-D, or its dtype is not that of the weights.
            RuntimeError: the shape of `input` or `hx` does not fit.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"{self._name}: input has {input.dim()} dimensions, expected 2 or 3")
        batched, batch_dim = input.dim() == 3, 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
        settings = self._settings
        self._check_input(input, settings[0][0])
        if hx is None:
            state = self._zeros(input, input.size(batch_dim))
        else:
            state = self._split(hx)
            self._check_state(state, (input.size(batch_dim),) if batched else ())
            state = state if batched else [s.unsqueeze(1) for s in state]
        output, *state = self._run(input, self._join(state), *settings, self.batch_first)
        if not batched:
            output, state = output.squeeze(batch_dim), [s.squeeze(1) for s in state]
        return output, self._join(state)

    def _forward_packed(self, input, hx):
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if data.dim() != 2:
            raise RuntimeError(f"{self._name}: packed data has {data.dim()} dimensions, expected 2")
        settings = self._settings
        self._check_input(data, settings[0][0])
        if hx is None:
            state = self._zeros(data, _batch_size(batch_sizes, sorted_indices))
        else:
            state = self._split(hx)
            # A graph does not know the values of batch_sizes: a compiled call is checked by what runs it.
            batch = state[0].size(1) if torch.compiler.is_compiling() else int(batch_sizes[0])
            self._check_state(state, (batch,))
            state = _permute(state, sorted_indices)
        output, *state = self._run(data, batch_sizes, self._join(state), *settings)
        output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return output, self._join(_permute(state, unsorted_indices))

    def _runs_stock(self, input, state, weights, steps) -> bool:
        """Tell whether there is so little to compute that `losses` of the kernels name stock on every CPU."""
        dtype, hidden = weights[0].dtype, self.hidden_size
        if self.proj_size or autocasts("cpu") or any(t.dtype is not dtype or not t.is_cpu for t in (input, *state)):
            return False
        if dtype is not torch.float32:
            return hidden < 256 and steps < 16 and steps * hidden < 2048 if self.gates == 4 else steps < 4
        if self.gates == 4 and steps > 1:
            return hidden < 256 and steps < 128
        trains, rows = torch.is_grad_enabled() and weights[0].requires_grad, steps * state[0].shape[1]
        return steps < 16 and (trains or hidden < IN_PLACE or (rows > 16 and steps > 1))

    def _fits(self, weights) -> bool:
        """Tell whether the weights have the sizes that they were made with, which stock's LSTM takes for granted."""
        return [w.shape for w in weights] == self._all_shapes

    def _run(self, *args):
        return self.op(*recurrent.canonical(self.op.name, self.gates, len(self._widths), args, {}), *self._nonlinearity)

    @property
    def _settings(self):
        return (self._flat_weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)

    @property
    def _name(self) -> str:
        return self.mode.split("_")[0]

    @property
    def _widths(self) -> list[int]:
        """Return the width of each tensor of the state."""
        return [self.hidden_size]

    def _split(self, hx) -> list[Tensor]:
        if not isinstance(hx, Tensor):
            raise AttributeError(f"{self._name}: hx must be a Tensor, got {type(hx).__name__}")
        return [hx]

    def _join(self, state):
        return state[0]

    def _zeros(self, like, batch):
        layers = self.num_layers * self._directions
        return [like.new_zeros(layers, batch, width) for width in self._widths]

    def _check_input(self, input, weight):
        dtype = weight.dtype
        if input.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(f"{self._name}: input has dtype {input.dtype}, expected the weights' {dtype}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(f"{self._name}: input has {input.size(-1)} features, expected {self.input_size}")

    def _check_state(self, state, batch):
        for i, (tensor, width) in enumerate(zip(state, self._widths, strict=True)):
            expected = (self.num_layers * self._directions, *batch, width)
            if tensor.shape != expected:
                what = f"hx[{i}]" if len(state) > 1 else "hx"
                raise RuntimeError(f"{self._name}: {what} has shape {list(tensor.shape)}, expected {list(expected)}")


class RNN(_Recurrent):
    """Apply h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu, with the arguments of `torch.nn.RNN`."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh",
                 bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
                 proj_size: int = 0, device=None, dtype=None):
        if proj_size:
            raise ValueError("RNN: proj_size is only supported by LSTM")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"RNN: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, bias, batch_first,
                         dropout, bidirectional, 0, device, dtype)
        self.nonlinearity = nonlinearity

    @property
    def _nonlinearity(self):
        return (self.nonlinearity,)


class GRU(_Recurrent):
    """Apply a gated recurrent unit (Cho et al. 2014), with the arguments of `torch.nn.GRU`."""

    op, gates = gru_op, 3

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
                 batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
                 device=None, dtype=None):
        if proj_size:
            raise ValueError("GRU: proj_size is only supported by LSTM")
        super().__init__("GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0,
                         device, dtype)


class LSTM(_Recurrent):
    """Apply long short-term memory (Hochreiter & Schmidhuber 1997), with the arguments of `torch.nn.LSTM`."""

    op, gates = lstm_op, 4

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
                 batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
                 device=None, dtype=None):
        super().__init__("LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                         proj_size, device, dtype)

    @property
    def _widths(self):
        return [self.proj_size or self.hidden_size, self.hidden_size]

    def _split(self, hx):
        if len(hx) != 2 or isinstance(hx, Tensor):
            whole = len(hx) == 2 and hx.dim() == 4  # as torch.nn's
            kind = IndexError if len(hx) < 2 else TypeError if whole else RuntimeError
            raise kind(f"LSTM: hx must be a pair (h, c), got {len(hx)} of {type(hx).__name__}")
        return [hx[0], hx[1]]

    def _join(self, state):
        return tuple(state)


class _Cell:
    """One step of a layer: what our cells add to torch.nn's, whose parameters, arguments and representation they keep.

    It runs as a sequence of one step, through the op of the layer.
    """

    _pair = False  # whether the state is (h, c)
    _nonlinearity = ()  # as above
    _most_rows = MOST_ROWS["gru"]

    def _weights(self):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.bias else ("weight_ih", "weight_hh")
        try:
            return [self._parameters[name] for name in names]
        except KeyError:  # parametrised or pruned: an attribute that is made of others
            return [getattr(self, name) for name in names]

    def _is_stocks(self, input, hx) -> bool:
        """Tell whether the dtypes inside a cell are stock's own affair, or its input has a form of its own."""
        if autocasts(input.device.type):
            runs_stock(self.op, "a cell under autocast")
        elif input.layout is not torch.strided:
            runs_stock(self.op, f"input is {input.layout}")
        elif self._pair and hx is not None and len(hx) == 2 and hx[0].dtype is not hx[1].dtype:  # which torch promotes
            runs_stock(self.op, f"h is {hx[0].dtype}, c is {hx[1].dtype}")
        else:
            return False
        return True

    def _step_is_stocks(self, input, dtype) -> bool:
        """Tell whether `losses` of the kernels name stock for a step without gradients."""
        hidden, rows = self.hidden_size, input.shape[0] if input.dim() == 2 else 1
        if hidden >= IN_PLACE and dtype is torch.float32:
            return rows > self._most_rows
        return not self._pair or dtype is not torch.bfloat16 or hidden < 256 or _wide_step_is_stocks(rows, hidden)

    def _advance(self, run, input, states):
        """Return the states after `input`; `states` is None for zeros.

        Raises:
            ValueError: `input` or a state is neither 1-D nor 2-D.
            RuntimeError: their shapes, dtypes or devices do not fit.
        """
        name, batch = type(self).__name__, input.shape[:-1]
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: input has {input.dim()} dimensions, expected 1 or 2")
        if input.size(-1) != self.input_size:
            raise RuntimeError(f"{name}: input has {input.size(-1)} features, expected {self.input_size}")
        shape = (*batch, self.hidden_size)
        if states is None:
            states = [torch.zeros(shape, dtype=input.dtype, device=input.device)] * (2 if self._pair else 1)
        for i, state in enumerate(states):
            what = f"hx[{i}]" if self._pair else "hx"
            if state.dim() not in (1, 2):
                raise ValueError(f"{name}: {what} has {state.dim()} dimensions, expected 1 or 2")
            if state.shape != shape:
                raise RuntimeError(f"{name}: {what} has shape {list(state.shape)}, expected {list(shape)}")
        grow = (None,) * (3 - input.dim())
        states = [state[grow] for state in states]
        _, *states = run(input[grow], states if self._pair else states[0], self._weights(), self.bias, 1, 0.0,
                         self.training, False, False)
        return [state.view(shape) for state in states]


@functools.lru_cache(1 << 10)
def _wide_step_is_stocks(rows, hidden):
    """Tell the same of an LSTM in bfloat16, where it depends on the CPU."""
    native, state = lstm_op.implementations["native"], torch.empty(1, rows, hidden, dtype=torch.bfloat16, device="meta")
    return native.run is None or native.loses(state, None, (state,), (), True, 1, 0.0, False, False, False) is not None


def _cell_shortcut(stock):
    """Let a cell try torch.nn's, the faster one in training and for few hidden units, or one call of C++."""
    def shortcut(self, input, hx=None):
        if "weight_hh" not in self._parameters or "weight_ih" not in self._parameters:
            return None  # they are made of others, perhaps at random: to be read once a call
        weights, states = self._weights(), hx if hx is None or self._pair else (hx,)
        dtype, trains = weights[0].dtype, torch.is_grad_enabled() and weights[0].requires_grad
        if trains or self._step_is_stocks(input, dtype):
            for t in (weights[0], input, *(states or ())):
                if t.dtype is not dtype or t.device != input.device:
                    return None
            return stock.forward(self, input, hx)
        if dtype is not torch.float32:
            return None
        if states is None:
            states = (input.new_zeros(input.shape[0], self.hidden_size),) * (2 if self._pair else 1)
        found = self.op.at_once(input, states, weights, self.bias, 1, 0.0, self.training, False, False,
                                *self._nonlinearity)
        return found if found is None or self._pair else found[0]
    return at_once(shortcut)


class RNNCell(_Cell, nn.RNNCell):
    """Apply one step of an Elman network, with the arguments of `torch.nn.RNNCell`."""

    op, _most_rows = rnn_op, MOST_ROWS["tanh"]

    @property
    def _nonlinearity(self):
        return (self.nonlinearity,)

    @_cell_shortcut(nn.RNNCell)
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the state [B, H] after `input` [B, input_size]; without B for unbatched input. `hx` None is zeros."""
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"RNNCell: nonlinearity must be 'tanh' or 'relu', got {self.nonlinearity!r}")
        if self._is_stocks(input, hx):
            return super().forward(input, hx)
        run = functools.partial(ops.rnn, nonlinearity=self.nonlinearity)
        return self._advance(run, input, None if hx is None else [hx])[0]


class GRUCell(_Cell, nn.GRUCell):
    """Apply one step of a gated recurrent unit, with the arguments of `torch.nn.GRUCell`."""

    op = gru_op

    @_cell_shortcut(nn.GRUCell)
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the state [B, H] after `input` [B, input_size]; without B for unbatched input. `hx` None is zeros."""
        if self._is_stocks(input, hx):
            return super().forward(input, hx)
        return self._advance(ops.gru, input, None if hx is None else [hx])[0]


class LSTMCell(_Cell, nn.LSTMCell):
    """Apply one step of long short-term memory, with the arguments of `torch.nn.LSTMCell`."""

    op, _pair = lstm_op, True

    @_cell_shortcut(nn.LSTMCell)
    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return (h, c), [B, H] each, after `input` [B, input_size]; without B for unbatched input."""
        if self._is_stocks(input, hx):
            return super().forward(input, hx)
        if hx is not None and (len(hx) != 2 or isinstance(hx, Tensor)):
            kind = TypeError if isinstance(hx, Tensor) else RuntimeError
            raise kind(f"LSTMCell: hx must be a pair (h, c), got {len(hx)} of {type(hx).__name__}")
        h, c = self._advance(ops.lstm, input, None if hx is None else [hx[0], hx[1]])
        return h, c


def _check_options(input_size, hidden_size, num_layers, bias, batch_first, dropout, proj_size):
    if not isinstance(dropout, numbers.Number) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a number between 0 and 1, got {dropout!r}")
    if dropout > 0 and num_layers == 1:
        warnings.warn(f"dropout={dropout} has no effect: it acts between layers, and num_layers is 1", stacklevel=4)
    for name, value in (("bias", bias), ("batch_first", batch_first)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    for name, value in (("input_size", input_size), ("hidden_size", hidden_size)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not 0 <= proj_size < hidden_size:
        raise ValueError(f"proj_size must be at least 0 and less than hidden_size {hidden_size}, got {proj_size}")


def _permute(state, indices):
    return state if indices is None else [s.index_select(1, indices) for s in state]


def _batch_size(batch_sizes: Tensor, sorted_indices: Tensor | None) -> int:
    """Return the number of packed sequences, from shapes where they tell it: a graph cannot know values."""
    if sorted_indices is not None:
        return sorted_indices.numel()
    if torch.compiler.is_compiling():
        with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):
            return batch_sizes[0].item()
    return int(batch_sizes[0])
