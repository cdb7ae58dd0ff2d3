// One recurrent layer in one direction: LSTM, GRU (PyTorch's form, reset gate after the product) or Elman.
//
// T steps, B sequences, H hidden units, P numbers of h (H, but for an LSTM that projects it), G gates (LSTM 4: i f g o;
// GRU 3: r z n; Elman 1), N rows: all steps of all sequences, step by step, the first batch_sizes[t] sequences at step
// t, so N = T·B for a dense batch.
// All pointers are contiguous row-major and belong to the caller; nothing is allocated, nothing read from Python.
// The caller makes the large products that are not recurrent: W_ih x before, in all numbers but bfloat16, and dW, dX, db
// after.
//
// The steps may be visited in blocks, a call each: what is made for one block alone (R rows) stays in the caches.
//
// The GPU has its own interface, with the same layouts: cuda/rnn.h.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace fastlm {

// What carries a state from step to step.
template <class T>
struct StateOf {
  using type = T;
};
template <>
struct StateOf<Bf16> {
  using type = float;
};
template <class T>
using State = typename StateOf<T>::type;

// How float32 numbers may be multiplied: as they are, as sums of two of bfloat16 each, or rounded to one.
enum class Precision : int { highest, high, medium };

enum class Cell : int { lstm, gru, tanh, relu };

struct RnnProblem {
  Cell cell;
  bool reverse;                // read the sequences from their ends
  int64_t steps;               // T ≥ 1
  int64_t batch;               // B ≥ 0
  int64_t hidden;              // H ≥ 1
  int64_t projection;          // P ≥ 1 where w_hr projects h, LSTM only; else 0
  int64_t inputs;              // I ≥ 1 where the forward pass multiplies x, in bfloat16; else 0
  const int64_t* batch_sizes;  // [T], at most B, never rising, at least 1; null: B at each step
  int threads;                 // CPU: use at most so many
  Precision precision;         // used where the CPU multiplies pairs of bfloat16 and numbers are float32
  int64_t first, last;         // this call visits the steps first ≤ t < last; calls follow each other in reading order,
                               // or against it in the backward pass, with the same workspace

  int64_t out() const { return projection ? projection : hidden; }  // P
};

// Bytes of workspace, aligned to 64, that the calls of one pass share.
// size_t rnn_workspace(const RnnProblem&, bool backward, size_t size_of_number);

template <class T>
struct RnnForward {
  const T* w_hh;         // [G·H, P]
  const T* w_hr;         // [P, H] of a projection, else null
  const T* w_ih;         // [G·H, I] where I > 0, and
  const T* x;            // [N, I rounded up to a multiple of 32], zeros from I on, and
  const State<T>* bias;  // [G·H] b_ih + b_hh, but for b_hh of GRU's gate n; null: zero
  const State<T>* b_hn;  // [H] that b_hh; null: zero. Where I = 0 all other biases are in `gates` already.
  T* gates;              // [R, S·H] of this block. In where I = 0: W_ih x + b in the first G·H columns of each row. Out
                         // when `train`: LSTM i f g o, GRU r z n and U_n h + b_hn, after activation. S = 4 for LSTM, 1
                         // for Elman, 3 for GRU, 4 for GRU when `train`. Elman: may be the block's part of y. Null
                         // where nothing goes in or out.
  int64_t ld;            // numbers from one row of gates to the next, at least its columns
  const State<T>* h0;    // [B, P]
  const State<T>* c0;    // [B, H] LSTM only
  T* y;                  // [N, P] out: h at each step
  State<T>* c;           // [N, H] out: cell states, LSTM when `train`, else null
  State<T>* hn;          // [B, P] out: last h of each sequence; between the calls of a pass, the one before the block
  State<T>* cn;          // [B, H] out: last c of each sequence, likewise, LSTM only
  bool train;            // keep what the backward pass needs
  void* workspace;
};

template <class T>
struct RnnBackward {
  const T* w_hh;        // [G·H, P]
  const T* w_hr;        // [P, H] of a projection, else null
  const T* gates;       // [R, 4·H] of this block as the forward pass left them; Elman: null
  int64_t ld_gates;     // numbers from one row of gates to the next
  const T* y;           // [N, P]
  const State<T>* c;    // [N, H] LSTM only
  const State<T>* h0;   // [B, P]
  const State<T>* c0;   // [B, H] LSTM only
  const T* dy;          // [N, P] gradient of y
  const State<T>* dhn;  // [B, P] gradient of hn
  const State<T>* dcn;  // [B, H] gradient of cn, LSTM only
  T* dgates;            // [R, S·H] out: gradients before activation. LSTM S = 4: i f g o. Elman S = 1.
                        // GRU S = 4: n r z and U_n h + b_hn: columns 0..3H are of W_ih x (n r z),
                        // columns H..4H are of U h (r z n). In 16 bits r z n and U_n h + b_hn: columns 0..3H are of
                        // W_ih x, the others and the last of U h.
                        // A projection adds P columns, the whole gradient of h, and H, what was projected.
                        // Without one it may be `gates`.
  int64_t ld;           // numbers from one row of dgates to the next, at least its columns
  State<T>* db;         // [2, S·H] out: sums of the rows of dgates, the latest and all others, are added, without
                        // a projection's columns
  State<T>* dh0;        // [B, P] out; between the calls of a pass, the gradient of the state before the block
  State<T>* dc0;        // [B, H] out, likewise, LSTM only
  void* workspace;
};

// The forward pass for few rows, on the CPU: the product with x is made inside and no weight is copied or packed. It
// knows no projection.
enum class Stored : int { f32, f64, bf16, f16 };

template <class T>
struct RnnDirect {
  Stored weights;          // how w_ih and w_hh are stored: as T, or in 16 bits where T is float
  int64_t inputs;          // I ≥ 1
  const T* x;              // [N, I]
  const void* w_ih;        // [G·H, I]
  const void* w_hh;        // [G·H, H]
  const T *b_ih, *b_hh;    // [G·H]; null: zero
  const T *h0, *c0;        // [B, H]; c0, c and cn are LSTM's
  T* gates;                // [N, 4·H] out, as RnnForward leaves them when `train`, else undefined; not used by Elman, nor
                           // for one step unless `train`
  int64_t ld;              // numbers from one row of gates to the next
  T* y;                    // [N, H] out
  T* c;                    // [N, H] out when `train`, else not used
  T *hn, *cn;              // [B, H] out
  bool train;              // keep what the backward pass needs
  bool back;               // visit the units from the last to the first: a call that follows one the other way, by the
                           // same weights, begins with those that the caches still hold
};

#define FASTLM_DECLARE_RNN_DIRECT(isa)                                     \
  namespace isa {                                                          \
  void rnn_direct(const RnnProblem&, const RnnDirect<float>&);             \
  void rnn_direct(const RnnProblem&, const RnnDirect<double>&);            \
  }

#define FASTLM_DECLARE_RNN_OF(T)                             \
  void rnn_forward(const RnnProblem&, const RnnForward<T>&); \
  void rnn_backward(const RnnProblem&, const RnnBackward<T>&);

#define FASTLM_DECLARE_RNN(isa)                                          \
  namespace isa {                                                        \
  size_t rnn_workspace(const RnnProblem&, bool backward, size_t number); \
  FASTLM_DECLARE_RNN_OF(float)                                           \
  FASTLM_DECLARE_RNN_OF(double)                                          \
  }

// The same by pairs: bfloat16, and float32 at less than the highest precision.
#define FASTLM_DECLARE_RNN_PAIRS(isa)                                    \
  namespace isa {                                                        \
  size_t rnn_workspace(const RnnProblem&, bool backward, size_t number); \
  FASTLM_DECLARE_RNN_OF(Bf16)                                        \
  FASTLM_DECLARE_RNN_OF(float)                                           \
  }

}  // namespace fastlm
