// The recurrent layer on a GPU, one launch a step: each block multiplies a tile of the recurrent product through
// shared memory and turns it into gates, or into gradients of gates, at once.

#include "rnn.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <stdexcept>
#include <string>

#include "../gates.h"

namespace fastlm::cuda {
namespace {

// A block makes kUnits hidden units of kSequences sequences; a thread makes one unit of kRows sequences.
constexpr int kUnits = 16, kLanes = 16, kRows = 2, kSequences = kLanes * kRows, kThreads = kUnits * kLanes;
constexpr int kDepth = 32;  // of the product that shared memory holds at a time

template <Cell cell>
constexpr int kGates = cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1;

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using Number = typename Arithmetic<T>::type;  // what T is computed in

struct Math {
  __host__ __device__ static float sigmoid(float x) { return 1 / (1 + expf(-x)); }
  __host__ __device__ static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
  __host__ __device__ static float tanh(float x) { return tanhf(x); }
  __host__ __device__ static double tanh(double x) { return ::tanh(x); }
};

// The sequences alive at a step: `rows` of them, the first of them at row `row` of [N, …].
struct Span {
  int64_t row, rows;
};

// A step and its neighbours in the order of reading. A sequence b begins where b ≥ before.rows, ends where
// b ≥ after.rows.
struct Step {
  Span before, now, after;
};

// The block's corner of the [sequences, hidden units] plane, and this thread's place in it.
struct Place {
  int64_t sequence, unit;
  int lane, column;

  __device__ explicit Place(int64_t hidden) {
    const int64_t across = (hidden + kUnits - 1) / kUnits;
    unit = blockIdx.x % across * kUnits;
    sequence = blockIdx.x / across * kSequences;
    lane = int(threadIdx.x) / kUnits;
    column = int(threadIdx.x) % kUnits;
  }
};

// Padded by one: threads of a warp read, or write, neighbouring rows at the same depth.
template <class N, int columns>
struct Tiles {
  N rows[kSequences][kDepth + 1];
  N weights[columns][kDepth + 1];
};

// sums[r][g] = Σ_k row(r·kLanes + lane)[k] · w[k, g·kUnits + column], k < depth. `row(i)` is null where sequence i of
// the tile has none; `load_weights(k0)` fills tiles.weights[g·kUnits + column][k - k0] for kDepth values of k, with
// zeros outside the matrix.
template <int G, class N, class Row, class LoadWeights>
__device__ void multiply(Tiles<N, G * kUnits>& tiles, const Place& place, int64_t depth, const Row& row,
                         const LoadWeights& load_weights, N (&sums)[kRows][G]) {
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    __syncthreads();  // the tiles of the depth before are still being read
    for (int i = int(threadIdx.x) / kDepth; i < kSequences; i += kThreads / kDepth) {
      const int k = int(threadIdx.x) % kDepth;
      const auto* from = row(i);
      tiles.rows[i][k] = from && k0 + k < depth ? N(from[k0 + k]) : N(0);
    }
    load_weights(k0);
    __syncthreads();
    N part[kRows][G] = {};  // a chain of its own for each depth: one long chain would round too often
    for (int k = 0; k < kDepth; ++k)
      for (int r = 0; r < kRows; ++r)
        for (int g = 0; g < G; ++g)
          part[r][g] += tiles.rows[r * kLanes + place.lane][k] * tiles.weights[g * kUnits + place.column][k];
    for (int r = 0; r < kRows; ++r)
      for (int g = 0; g < G; ++g) sums[r][g] += part[r][g];
  }
}

// --- forward ------------------------------------------------------------------------------------------------------

// Turn the products of sequence b's unit u into its next state. `running` [B, H] holds c between steps.
template <Cell cell, class T, class N>
__device__ void forward_gates(const RnnForward<T>& a, int64_t H, const Step& step, N* running, int64_t b, int64_t u,
                              const T* h_before, const N* s) {
  const int64_t row = step.now.row + b, state = b * H + u;
  const bool begins = b >= step.before.rows, ends = b >= step.after.rows;
  N h;
  if constexpr (cell == Cell::lstm) {
    T* x = a.gates + row * 4 * H + u;
    N i = N(x[0]) + s[0], f = N(x[H]) + s[1], g = N(x[2 * H]) + s[2], o = N(x[3 * H]) + s[3], c;
    lstm_forward<Math>(i, f, g, o, begins ? N(a.c0[state]) : running[state], c, h);
    running[state] = c;
    if (ends) a.cn[state] = T(c);
    if (a.train) {
      x[0] = T(i);
      x[H] = T(f);
      x[2 * H] = T(g);
      x[3 * H] = T(o);
      a.c[row * H + u] = T(c);
    }
  } else if constexpr (cell == Cell::gru) {
    T* x = a.gates + row * (a.train ? 4 : 3) * H + u;
    N r = N(x[0]) + s[0], z = N(x[H]) + s[1], n = N(x[2 * H]), hn = s[2];
    if (a.b_hn) hn += N(a.b_hn[u]);
    gru_forward<Math>(r, z, n, hn, N(h_before[u]), h);
    if (a.train) {
      x[0] = T(r);
      x[H] = T(z);
      x[2 * H] = T(n);
      x[3 * H] = T(hn);
    }
  } else {
    h = N(a.gates[row * H + u]) + s[0];
    if constexpr (cell == Cell::tanh)
      h = Math::tanh(h);
    else
      h = h < 0 ? N(0) : h;  // a NaN stays
  }
  a.y[row * H + u] = T(h);
  if (ends) a.hn[state] = T(h);
}

template <Cell cell, class T>
__global__ void __launch_bounds__(kThreads)
    forward_step(RnnForward<T> a, int64_t H, Step step, Number<T>* running) {
  constexpr int G = kGates<cell>;
  using N = Number<T>;
  __shared__ Tiles<N, G * kUnits> tiles;
  const Place place(H);
  const auto h_before = [&](int i) -> const T* {
    const int64_t b = place.sequence + i;
    if (b >= step.now.rows) return nullptr;
    return b < step.before.rows ? a.y + (step.before.row + b) * H : a.h0 + b * H;
  };
  const auto load_weights = [&](int64_t k0) {
    for (int i = int(threadIdx.x) / kDepth; i < G * kUnits; i += kThreads / kDepth) {
      const int64_t k = k0 + int(threadIdx.x) % kDepth, u = place.unit + i % kUnits;
      tiles.weights[i][k - k0] = k < H && u < H ? N(a.w_hh[(i / kUnits * H + u) * H + k]) : N(0);
    }
  };
  N sums[kRows][G] = {};
  multiply(tiles, place, H, h_before, load_weights, sums);
  const int64_t u = place.unit + place.column;
  for (int r = 0; r < kRows; ++r) {
    const int i = r * kLanes + place.lane;
    const int64_t b = place.sequence + i;
    if (b < step.now.rows && u < H) forward_gates<cell>(a, H, step, running, b, u, h_before(i), sums[r]);
  }
}

// --- backward -----------------------------------------------------------------------------------------------------

// Turn dh, the gradient of sequence b's unit u, into those of its gates. `running` [B, H] holds between steps what
// passes the gates by: LSTM dc, GRU its direct part of dh.
template <Cell cell, class T, class N>
__device__ void backward_gates(const RnnBackward<T>& a, int64_t H, const Step& step, N* running, int64_t b, int64_t u,
                               N dh) {
  const int64_t row = step.now.row + b, state = b * H + u, before = (step.before.row + b) * H + u;
  const bool begins = b >= step.before.rows, ends = b >= step.after.rows;
  if constexpr (cell == Cell::lstm) {
    const T* x = a.gates + row * 4 * H + u;
    N i = N(x[0]), f = N(x[H]), g = N(x[2 * H]), o = N(x[3 * H]);
    N dc = ends ? N(a.dcn[state]) : running[state];
    lstm_backward<Math>(i, f, g, o, N(a.c[row * H + u]), N(begins ? a.c0[state] : a.c[before]), dh, dc);
    running[state] = dc;
    if (begins) a.dc0[state] = T(dc);
    T* d = a.dgates + row * 4 * H + u;
    d[0] = T(i);
    d[H] = T(f);
    d[2 * H] = T(g);
    d[3 * H] = T(o);
  } else if constexpr (cell == Cell::gru) {
    const T* x = a.gates + row * 4 * H + u;
    N r = N(x[0]), z = N(x[H]), n = N(x[2 * H]), hn = N(x[3 * H]);
    gru_backward<Math>(r, z, n, hn, N(begins ? a.h0[state] : a.y[before]), dh);
    running[state] = dh;
    T* d = a.dgates + row * 4 * H + u;
    d[0] = T(n);
    d[H] = T(r);
    d[2 * H] = T(z);
    d[3 * H] = T(hn);
  } else {
    const N h = N(a.y[row * H + u]);
    a.dgates[row * H + u] = T(cell == Cell::tanh ? dh * (1 - h * h) : h <= 0 ? N(0) : dh);
  }
}

template <Cell cell, class T>
__global__ void __launch_bounds__(kThreads)
    backward_step(RnnBackward<T> a, int64_t H, Step step, Number<T>* running) {
  // The columns of dgates that belong to U h: all, but for GRU's first.
  constexpr int G = kGates<cell>, first = cell == Cell::gru ? 1 : 0;
  using N = Number<T>;
  __shared__ Tiles<N, kUnits> tiles;
  const Place place(H);
  const int64_t depth = G * H;
  const auto d_after = [&](int i) -> const T* {
    const int64_t b = place.sequence + i;
    return b < step.after.rows ? a.dgates + ((step.after.row + b) * (G + first) + first) * H : nullptr;
  };
  const auto load_weights = [&](int64_t k0) {
    for (int i = place.lane; i < kDepth; i += kLanes) {
      const int64_t u = place.unit + place.column;
      tiles.weights[place.column][i] = k0 + i < depth && u < H ? N(a.w_hh[(k0 + i) * H + u]) : N(0);
    }
  };
  N sums[kRows][1] = {};
  multiply(tiles, place, depth, d_after, load_weights, sums);
  const int64_t u = place.unit + place.column;
  for (int r = 0; r < kRows; ++r) {
    const int64_t b = place.sequence + r * kLanes + place.lane, state = b * H + u;
    if (u >= H || (b >= step.now.rows && b >= step.after.rows)) continue;
    N dh = sums[r][0];
    if (b >= step.after.rows) dh = N(a.dhn[state]);
    else if (cell == Cell::gru) dh += running[state];
    if (b < step.now.rows)
      backward_gates<cell>(a, H, step, running, b, u, dh + N(a.dy[(step.now.row + b) * H + u]));
    else
      a.dh0[state] = T(dh);  // the sequence began at the step after
  }
}

// --- launches -----------------------------------------------------------------------------------------------------

// Calls visit(step) for each step in the order of reading, or against it.
template <class Visit>
void walk(const RnnProblem& p, bool against, const Visit& visit) {
  const bool down = p.reverse != against;
  const auto rows_at = [&](int64_t t) -> int64_t {
    if (t < 0 || t >= p.steps) return 0;
    return p.batch_sizes ? p.batch_sizes[t] : p.batch;
  };
  int64_t row = 0;
  if (down)
    for (int64_t t = 0; t + 1 < p.steps; ++t) row += rows_at(t);
  for (int64_t i = 0; i < p.steps; ++i) {
    const int64_t t = down ? p.steps - 1 - i : i;
    const Span now{row, rows_at(t)}, earlier{row - rows_at(t - 1), rows_at(t - 1)};
    const Span later{row + now.rows, rows_at(t + 1)};
    visit(p.reverse ? Step{later, now, earlier} : Step{earlier, now, later});
    row += down ? -earlier.rows : now.rows;
  }
}

template <class Arguments, class N>
void launch(const char* name, void (*kernel)(Arguments, int64_t, Step, N*), const Arguments& a, int64_t hidden,
            const Step& step, N* running, void* stream) {
  const int64_t rows = step.now.rows > step.after.rows ? step.now.rows : step.after.rows;
  const int64_t blocks = (hidden + kUnits - 1) / kUnits * ((rows + kSequences - 1) / kSequences);
  if (blocks == 0) return;
  if (blocks > INT_MAX) throw std::runtime_error(std::string(name) + ": too many sequences and hidden units");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, a, hidden, step, running);
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string(name) + ": CUDA refused the launch: " + cudaGetErrorString(status));
}

// Where float32 or float64 calls keep what passes from step to step: in the result that it becomes at the end.
template <class T>
Number<T>* running_state(T* result, void* workspace) {
  if constexpr (sizeof(T) == sizeof(Number<T>))
    return result;
  else
    return static_cast<Number<T>*>(workspace);
}

template <Cell cell, class T>
void forward(const RnnProblem& p, const RnnForward<T>& a, void* stream) {
  Number<T>* const running = running_state(a.cn, a.workspace);
  walk(p, false, [&](const Step& step) {
    launch("rnn_forward", forward_step<cell, T>, a, p.hidden, step, running, stream);
  });
}

template <Cell cell, class T>
void backward(const RnnProblem& p, const RnnBackward<T>& a, void* stream) {
  Number<T>* const running = running_state(cell == Cell::gru ? a.dh0 : a.dc0, a.workspace);
  Span first{};
  walk(p, true, [&](const Step& step) {
    launch("rnn_backward", backward_step<cell, T>, a, p.hidden, step, running, stream);
    first = step.now;
  });
  // One more hands the gradients of the first step's gates to h0.
  launch("rnn_backward", backward_step<cell, T>, a, p.hidden, Step{{}, {}, first}, running, stream);
}

}  // namespace

size_t rnn_workspace(const RnnProblem& p, bool, size_t number) {
  return number < 4 && (p.cell == Cell::lstm || p.cell == Cell::gru) ? p.batch * p.hidden * sizeof(float) : 0;
}

template <class T>
void rnn_forward(const RnnProblem& p, const RnnForward<T>& a, void* stream) {
  switch (p.cell) {
    case Cell::lstm: return forward<Cell::lstm>(p, a, stream);
    case Cell::gru: return forward<Cell::gru>(p, a, stream);
    case Cell::tanh: return forward<Cell::tanh>(p, a, stream);
    case Cell::relu: return forward<Cell::relu>(p, a, stream);
  }
}

template <class T>
void rnn_backward(const RnnProblem& p, const RnnBackward<T>& a, void* stream) {
  switch (p.cell) {
    case Cell::lstm: return backward<Cell::lstm>(p, a, stream);
    case Cell::gru: return backward<Cell::gru>(p, a, stream);
    case Cell::tanh: return backward<Cell::tanh>(p, a, stream);
    case Cell::relu: return backward<Cell::relu>(p, a, stream);
  }
}

template void rnn_forward(const RnnProblem&, const RnnForward<float>&, void*);
template void rnn_forward(const RnnProblem&, const RnnForward<double>&, void*);
template void rnn_forward(const RnnProblem&, const RnnForward<__half>&, void*);
template void rnn_forward(const RnnProblem&, const RnnForward<__nv_bfloat16>&, void*);
template void rnn_backward(const RnnProblem&, const RnnBackward<float>&, void*);
template void rnn_backward(const RnnProblem&, const RnnBackward<double>&, void*);
template void rnn_backward(const RnnProblem&, const RnnBackward<__half>&, void*);
template void rnn_backward(const RnnProblem&, const RnnBackward<__nv_bfloat16>&, void*);

int built_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace fastlm::cuda
