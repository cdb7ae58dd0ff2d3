// A recurrent layer on an NVIDIA GPU, in one direction or in both at once: two passes, one launch each.
//
// Cells, T, B, H, N, the layout of rows, of packed sequences and of gates are those of ../rnn.h. Pointers are device
// memory of the pass's numbers but for RnnPass::batch_sizes, which is read before the call returns. A call only queues
// work on a stream: nothing is allocated, nothing waits, and a CUDA graph can capture it. Blocks that wait for each
// other for minutes end the launch with an error.
//
// All blocks that wait for each other are on the chip together, whatever else runs there: those of a grid or a plane
// since the launch is cooperative, those of a cluster since a cluster always is, and of cluster.h's none waits for
// another cluster. So two passes on two streams never wait for each other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../rnn.h"
#include "plan.h"

namespace fastlm::cuda {

struct RnnPass {
  Layer layer;
  int64_t steps;               // T ≥ 1
  const int64_t* batch_sizes;  // [T] host memory, at most B, never rising, at least 1; null: B at each step
  Chip chip;
  void* workspace;             // plan(layer, backward, chip).workspace · T bytes, aligned to 16
};

// Of one direction; the second one reads the sequences from their ends. Rows of `x` and `y` may lie apart.
struct RnnForward {
  const void* w_hh;   // [G·H, H]
  const void* b_hn;   // [H] GRU only; null: zero
  const void* x;      // [N, G·H] W_ih x + b; may be y
  void* gates;        // [N, H, 4] out, LSTM and GRU in training, else null: those of ../rnn.h, a unit's side by side
  const void* h0;     // [B, H]
  const void* c0;     // [B, H] LSTM only
  void* y;            // [N, H] out
  void* c;            // [N, H] out, LSTM in training, else null; float64 for float64, else float32
  void* before;       // [N, H] out: h of the step before; packed sequences in training, else null
  void* hn;           // [B, H] out
  void* cn;           // [B, H] out, LSTM only
  int64_t x_row;      // numbers from one row of x to the next
  int64_t y_row;      // the same of y
};

struct RnnBackward {
  const void* w_hh;    // [G·H, H]
  const void* gates;   // [N, H, 4] as the forward pass left them; Elman: null
  const void* y;       // [N, H]
  const void* c;       // [N, H] as the forward pass left it, LSTM only
  const void* h0;      // [B, H]
  const void* c0;      // [B, H] LSTM only
  const void* dy;      // [N, H] gradient of y
  const void* dhn;     // [B, H] gradient of hn
  const void* dcn;     // [B, H] gradient of cn, LSTM only
  void* dgates;        // [N, S·H] out, as in ../rnn.h
  void* dh0;           // [B, H] out
  void* dc0;           // [B, H] out, LSTM only
  int64_t y_row;       // numbers from one row of y, and of dy, to the next
  int64_t dgates_row;  // the same of dgates
};

// `directions` are layer.directions structs. Throws std::runtime_error where the plan does not fit the GPU or CUDA
// refuses the launch.
void rnn_forward(const RnnPass&, const RnnForward* directions, void* stream);
void rnn_backward(const RnnPass&, const RnnBackward* directions, void* stream);

// Whether the current GPU holds the blocks of the pass that wait for each other at a time.
bool rnn_fits(const Layer&, bool backward, const Chip&);

// Steps of nothing but an exchange, the floor of a pass: `teams` teams of `blocks` blocks, in which each block
// publishes its part of `bytes` bytes as soon as all of the step before are there. `cluster`: through shared memory,
// else through L2 and a workspace of teams · steps · bytes, rounded up to 16. Writes to `nanoseconds`, in device memory.
struct ExchangeAlone {
  bool cluster;
  int blocks, teams, bytes, steps;
  void* workspace;
  uint64_t* nanoseconds;  // of all steps but the first
};
void exchange_alone(const ExchangeAlone&, void* stream);

// Chip::planes of the current GPU, whose blocks may use `shared` bytes: CUDA says how many clusters it holds at a time,
// and one launch on the stream, that does nothing, whether such a launch may be cooperative too.
int planes(int shared, void* stream);

// Chip::cluster of the current GPU, whose blocks may use `shared` bytes; 0 where the code that runs on it knows none.
int largest_cluster(int shared);

// The CUDA version that this was built with, and the newest that the installed driver knows (0: no driver), as
// 1000·major + 10·minor.
int built_version();
int driver_version();

}  // namespace fastlm::cuda
