// The recurrent layer on a GPU, one launch a step: each block multiplies a tile of the recurrent product through
// shared memory and turns it into gates, or into gradients of gates, at once.

#include "rnn.h"

#include <cuda_runtime.h>

#include <climits>
#include <stdexcept>
#include <string>

#include "../gates.h"

namespace fastlm::cuda {
namespace {

// A block makes kUnits hidden units of kSequences sequences; a thread makes one unit of kRows sequences.
constexpr int kUnits = 16, kLanes = 16, kRows = 2, kSequences = kLanes * kRows, kThreads = kUnits * kLanes;
constexpr int kBlocks = 3;  // a multiprocessor; without the hint ptxas aims at five and spills
constexpr int kDepth = 32;  // of the product that shared memory holds at a time

template <Cell cell>
constexpr int kGates = cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1;

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
template <class T, int columns>
struct Tiles {
  T rows[kSequences][kDepth + 1];
  T weights[columns][kDepth + 1];
};

// sums[r][g] = Σ_k row(r·kLanes + lane)[k] · w[k, g·kUnits + column], k < depth. `row(i)` is null where there is no
// sequence i of the tile; `load_weights(k0)` fills tiles.weights[g·kUnits + column][k - k0] for kDepth values of k,
// with zeros outside the matrix.
template <int G, class T, class Row, class LoadWeights>
__device__ void multiply(Tiles<T, G * kUnits>& tiles, const Place& place, int64_t depth, const Row& row,
                         const LoadWeights& load_weights, T (&sums)[kRows][G]) {
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    __syncthreads();  // the tiles of the depth before are still being read
    for (int i = int(threadIdx.x) / kDepth; i < kSequences; i += kThreads / kDepth) {
      const int k = int(threadIdx.x) % kDepth;
      const auto* from = row(i);
      tiles.rows[i][k] = from && k0 + k < depth ? from[k0 + k] : 0;
    }
    load_weights(k0);
    __syncthreads();
    T part[kRows][G] = {};  // a chain of its own for each depth: one long chain would round too often
    for (int k = 0; k < kDepth; ++k)
      for (int r = 0; r < kRows; ++r)
        for (int g = 0; g < G; ++g)
          part[r][g] += tiles.rows[r * kLanes + place.lane][k] * tiles.weights[g * kUnits + place.column][k];
    for (int r = 0; r < kRows; ++r)
      for (int g = 0; g < G; ++g) sums[r][g] += part[r][g];
  }
}

// --- forward ------------------------------------------------------------------------------------------------------

// Turn the products of sequence b's unit u into its next state. cn holds c between steps.
template <Cell cell, class T>
__device__ void forward_gates(const RnnForward<T>& a, int64_t H, const Step& step, int64_t b, int64_t u,
                              const T* h_before, const T* s) {
  const int64_t row = step.now.row + b, state = b * H + u;
  const bool begins = b >= step.before.rows, ends = b >= step.after.rows;
  T h;
  if constexpr (cell == Cell::lstm) {
    T* x = a.gates + row * 4 * H + u;
    T i = x[0] + s[0], f = x[H] + s[1], g = x[2 * H] + s[2], o = x[3 * H] + s[3], c;
    lstm_forward<Math>(i, f, g, o, begins ? a.c0[state] : a.cn[state], c, h);
    a.cn[state] = c;
    if (a.train) {
      x[0] = i;
      x[H] = f;
      x[2 * H] = g;
      x[3 * H] = o;
      a.c[row * H + u] = c;
    }
  } else if constexpr (cell == Cell::gru) {
    T* x = a.gates + row * (a.train ? 4 : 3) * H + u;
    T r = x[0] + s[0], z = x[H] + s[1], n = x[2 * H], hn = s[2];
    if (a.b_hn) hn += a.b_hn[u];
    gru_forward<Math>(r, z, n, hn, h_before[u], h);
    if (a.train) {
      x[0] = r;
      x[H] = z;
      x[2 * H] = n;
      x[3 * H] = hn;
    }
  } else {
    h = a.gates[row * H + u] + s[0];
    if constexpr (cell == Cell::tanh)
      h = Math::tanh(h);
    else
      h = h < 0 ? 0 : h;  // a NaN stays
  }
  a.y[row * H + u] = h;
  if (ends) a.hn[state] = h;
}

template <Cell cell, class T>
__global__ void __launch_bounds__(kThreads, kBlocks) forward_step(RnnForward<T> a, int64_t H, Step step) {
  constexpr int G = kGates<cell>;
  __shared__ Tiles<T, G * kUnits> tiles;
  const Place place(H);
  const auto h_before = [&](int i) -> const T* {
    const int64_t b = place.sequence + i;
    if (b >= step.now.rows) return nullptr;
    return b < step.before.rows ? a.y + (step.before.row + b) * H : a.h0 + b * H;
  };
  const auto load_weights = [&](int64_t k0) {
    for (int i = int(threadIdx.x) / kDepth; i < G * kUnits; i += kThreads / kDepth) {
      const int64_t k = k0 + int(threadIdx.x) % kDepth, u = place.unit + i % kUnits;
      tiles.weights[i][k - k0] = k < H && u < H ? a.w_hh[(i / kUnits * H + u) * H + k] : 0;
    }
  };
  T sums[kRows][G] = {};
  multiply(tiles, place, H, h_before, load_weights, sums);
  const int64_t u = place.unit + place.column;
  for (int r = 0; r < kRows; ++r) {
    const int i = r * kLanes + place.lane;
    const int64_t b = place.sequence + i;
    if (b < step.now.rows && u < H) forward_gates<cell>(a, H, step, b, u, h_before(i), sums[r]);
  }
}

// --- backward -----------------------------------------------------------------------------------------------------

// Turn dh, the gradient of sequence b's unit u, into those of its gates. What passes the gates by stays, between
// steps, where the result of the last one belongs: LSTM dc in dc0, GRU's direct part of dh in dh0.
template <Cell cell, class T>
__device__ void backward_gates(const RnnBackward<T>& a, int64_t H, const Step& step, int64_t b, int64_t u, T dh) {
  const int64_t row = step.now.row + b, state = b * H + u, before = (step.before.row + b) * H + u;
  const bool begins = b >= step.before.rows, ends = b >= step.after.rows;
  if constexpr (cell == Cell::lstm) {
    const T* x = a.gates + row * 4 * H + u;
    T i = x[0], f = x[H], g = x[2 * H], o = x[3 * H];
    T dc = ends ? a.dcn[state] : a.dc0[state];
    lstm_backward<Math>(i, f, g, o, a.c[row * H + u], begins ? a.c0[state] : a.c[before], dh, dc);
    a.dc0[state] = dc;
    T* d = a.dgates + row * a.ld + u;
    d[0] = i;
    d[H] = f;
    d[2 * H] = g;
    d[3 * H] = o;
  } else if constexpr (cell == Cell::gru) {
    const T* x = a.gates + row * 4 * H + u;
    T r = x[0], z = x[H], n = x[2 * H], hn = x[3 * H];
    gru_backward<Math>(r, z, n, hn, begins ? a.h0[state] : a.y[before], dh);
    a.dh0[state] = dh;
    T* d = a.dgates + row * a.ld + u;
    d[0] = n;
    d[H] = r;
    d[2 * H] = z;
    d[3 * H] = hn;
  } else {
    const T h = a.y[row * H + u];
    a.dgates[row * a.ld + u] = cell == Cell::tanh ? dh * (1 - h * h) : h <= 0 ? 0 : dh;
  }
}

template <Cell cell, class T>
__global__ void __launch_bounds__(kThreads, kBlocks) backward_step(RnnBackward<T> a, int64_t H, Step step) {
  // The columns of dgates that belong to U h: all, but for GRU's first.
  constexpr int G = kGates<cell>, first = cell == Cell::gru ? 1 : 0;
  __shared__ Tiles<T, kUnits> tiles;
  const Place place(H);
  const int64_t depth = G * H;
  const auto d_after = [&](int i) -> const T* {
    const int64_t b = place.sequence + i;
    return b < step.after.rows ? a.dgates + (step.after.row + b) * a.ld + first * H : nullptr;
  };
  const auto load_weights = [&](int64_t k0) {
    for (int i = place.lane; i < kDepth; i += kLanes) {
      const int64_t u = place.unit + place.column;
      tiles.weights[place.column][i] = k0 + i < depth && u < H ? a.w_hh[(k0 + i) * H + u] : 0;
    }
  };
  T sums[kRows][1] = {};
  multiply(tiles, place, depth, d_after, load_weights, sums);
  const int64_t u = place.unit + place.column;
  for (int r = 0; r < kRows; ++r) {
    const int64_t b = place.sequence + r * kLanes + place.lane, state = b * H + u;
    if (u >= H || (b >= step.now.rows && b >= step.after.rows)) continue;
    T dh = sums[r][0];
    if (b >= step.after.rows)
      dh = a.dhn[state];
    else if (cell == Cell::gru)
      dh += a.dh0[state];
    if (b < step.now.rows)
      backward_gates<cell>(a, H, step, b, u, dh + a.dy[(step.now.row + b) * H + u]);
    else
      a.dh0[state] = dh;  // the sequence began at the step after
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

template <class Arguments>
void launch(const char* name, void (*kernel)(Arguments, int64_t, Step), const Arguments& a, int64_t hidden,
            const Step& step, void* stream) {
  const int64_t rows = step.now.rows > step.after.rows ? step.now.rows : step.after.rows;
  const int64_t blocks = (hidden + kUnits - 1) / kUnits * ((rows + kSequences - 1) / kSequences);
  if (blocks == 0) return;
  if (blocks > INT_MAX) throw std::runtime_error(std::string(name) + ": too many sequences and hidden units");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, a, hidden, step);
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string(name) + ": CUDA refused the launch: " + cudaGetErrorString(status));
}

template <Cell cell, class T>
void forward(const RnnProblem& p, const RnnForward<T>& a, void* stream) {
  walk(p, false, [&](const Step& step) {
    launch("rnn_forward", forward_step<cell, T>, a, p.hidden, step, stream);
  });
}

template <Cell cell, class T>
void backward(const RnnProblem& p, const RnnBackward<T>& a, void* stream) {
  Span first{};
  walk(p, true, [&](const Step& step) {
    launch("rnn_backward", backward_step<cell, T>, a, p.hidden, step, stream);
    first = step.now;
  });
  // One more hands the gradients of the first step's gates to h0.
  launch("rnn_backward", backward_step<cell, T>, a, p.hidden, Step{{}, {}, first}, stream);
}

}  // namespace

size_t rnn_workspace(const RnnProblem&, bool, size_t) { return 0; }

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
template void rnn_backward(const RnnProblem&, const RnnBackward<float>&, void*);
template void rnn_backward(const RnnProblem&, const RnnBackward<double>&, void*);

int built_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace fastlm::cuda
