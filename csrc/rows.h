// Functions of rows whose time is that of reading and writing them: norms, gated units, rotary embedding, softmax.
//
// Numbers (void pointers) are float32, or bfloat16 where `bf16`; arithmetic, weights, tables and sums are float32.
// The elements of a row lie side by side; `…_row` is the distance of rows, in elements. Where there is none, a tensor
// is contiguous. All pointers belong to the caller; results overlap no input.
#pragma once

#include <cstdint>

namespace fastlm {

struct NormForward {  // T rows of H elements; RMS norm where mean is null
  int64_t rows, cols;
  const void* x;
  int64_t x_row;
  const void* residual;  // null: none
  int64_t residual_row;
  const float* weight;  // [H], null: ones
  const float* bias;    // [H], null: zeros
  void* y;              // [T, H] out
  void* sum;            // [T, H] out: x + residual; null without a residual
  float* mean;          // [T] out
  float* rstd;          // [T] out: 1 / sqrt(mean square or variance + eps)
  float eps;
  bool bf16;
  int threads;
};

struct NormBackward {
  int64_t rows, cols;
  const void* x;  // what was normalised: the sum, where there was a residual
  int64_t x_row;
  const void* dy;    // [T, H]
  const void* dsum;  // [T, H] gradient of the sum, null: none
  const float* weight;
  const float* mean;  // null: RMS norm
  const float* rstd;
  void* dx;        // [T, H] out, null: not wanted
  float* dweight;    // [H] out, null: not wanted
  float* dbias;      // [H] out, null: not wanted
  float* workspace;  // [threads, 4, H]; null where neither is wanted
  bool bf16;
  int threads;
};

enum class Gate : int { silu, gelu, gelu_tanh };

struct Gated {  // y = gate(a) ⊙ b; backward: da and db from dy
  Gate kind;
  int64_t rows, cols;
  const void* a;
  int64_t a_row;
  const void* b;
  int64_t b_row;
  const void* dy;  // [T, H] backward only
  void* y;         // [T, H] out; backward: da
  void* db;        // [T, H] out, backward only
  bool bf16;
  int threads;
};

struct Rotary {  // [B, H, S, D]: the first 2·half columns are turned, the others copied
  int64_t batch, heads, steps, dim, half;
  const void* x;
  int64_t x_strides[3];  // of B, H, S
  void* y;
  int64_t y_strides[3];
  const float *cos, *sin;    // of angles [B or 1, S, 2, half]
  int64_t table_strides[3];  // of B (0: one for all), S, and from a pair's first column to its second
  bool interleaved, inverse;  // inverse: the gradient
  bool bf16;
  int threads;
};

struct Softmax {  // of scale·x where the mask keeps it; 0 elsewhere
  int64_t rows, cols;
  const void* x;
  int64_t x_row;
  const bool* mask;         // null: all kept
  int64_t mask_sizes[2];    // rows are numbered (i, j, k) with j and k below these sizes
  int64_t mask_strides[4];  // of i, j, k and the columns (1 or 0)
  void* y;                  // [T, H] out
  float* workspace;         // [threads, H]
  float scale;
  bool bf16;
  int threads;
};

struct RowKernels {
  void (*norm_forward)(const NormForward&);
  void (*norm_backward)(const NormBackward&);
  void (*gated_forward)(const Gated&);
  void (*gated_backward)(const Gated&);
  void (*rotary)(const Rotary&);
  void (*softmax)(const Softmax&);
};

#define FASTLM_DECLARE_ROWS(isa) \
  namespace isa {                \
  RowKernels row_kernels();      \
  }

}  // namespace fastlm
