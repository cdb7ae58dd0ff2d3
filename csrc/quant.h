// y = x·Ŵᵀ + b, where Ŵ is kept in 8 or 4 bits: M rows of x, K inputs, N outputs.
//
// All pointers belong to the caller, are contiguous and row-major; nothing is packed or kept between calls.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlm {

enum class Number : int { f32, bf16, f16 };

enum class QuantizedWeight : int {
  int8,          // Ŵ[n][k] = scale[n]·weight[n][k], x as it is
  int8_dynamic,  // the same Ŵ; each row of x is rounded to 8 bits too and the product is one of integers
  int4           // Ŵ[n][k] = scale[n][k / group]·(nibble - 8); byte j of a row holds k = 2j low and k = 2j + 1 high
};

struct QuantizedLinear {
  QuantizedWeight kind;
  Number number;       // of x and y
  int64_t rows;        // M ≥ 1
  int64_t in;          // K ≥ 1; int8_dynamic: at most 131072, so that 127·127·K fits in 32 bits
  int64_t out;         // N ≥ 1
  int64_t group;       // int4: 32, 64 or 128
  const void* x;       // [M, K]
  const void* weight;  // int8 [N, K], or for int4 bytes [N, ceil(K / 2)]
  const float* scale;  // [N], or for int4 [N, ceil(K / group)]
  const float* bias;   // [N]; null: zero
  void* y;             // [M, N] out
  void* workspace;
  int threads;
};

// Only the instruction sets in which it is fast have it.
#define FASTLM_DECLARE_QUANT(isa)                             \
  namespace isa {                                             \
  size_t quantized_linear_workspace(const QuantizedLinear&);  \
  void quantized_linear(const QuantizedLinear&);              \
  }

}  // namespace fastlm
