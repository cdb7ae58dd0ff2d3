// Products of matrices: C (+)= A·B (+ bias).
//
// The caller owns all memory; nothing is allocated. Sums are taken over chunks of the depth, one after the other, so the
// result does not depend on the threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlm {

struct Product {
  int64_t rows, depth, columns;  // M, K, N ≥ 0
  const void* a;                 // [M, K], any strides
  int64_t a_row, a_column;       // numbers from one row to the next, and from one column to the next
  const void* b;                 // [K, N], any strides
  int64_t b_row, b_column;
  const void* bias;              // [N] what C begins with; null: zeros
  void* c;                       // [M, N] out, rows contiguous; must not overlap the others
  int64_t c_row;
  bool add;                      // add to what C holds; then without bias
  int threads;
  void* workspace;               // product_workspace() bytes, aligned to 64
};

// x·Wᵀ + b, as a layer has it, for few rows of x.
struct FewRows {
  int64_t rows, depth, columns;  // ≥ 0
  const void* x;                 // [rows, depth]
  const void* w;                 // [columns, depth], rows contiguous
  int64_t w_row;                 // numbers from one row of W to the next
  const void* bias;              // [columns], or null
  void* y;                       // [rows, columns] out; must not overlap the others
  int threads;
};

// A number has 4 or 8 bytes, in few_rows 4 or, in bfloat16, 2. product_pairs: A and B are bfloat16, of each one stride is
// 1; a number of C and of the bias has 2 or, in float32, 4 bytes; sums are taken in one chain of 32 products at a time.

#define FASTLM_DECLARE_PRODUCT(isa)                                     \
  namespace isa {                                                       \
  size_t product_workspace(const Product&, size_t number);              \
  void product(const Product&, size_t number);                          \
  void few_rows(const FewRows&, size_t number);                         \
  }

#define FASTLM_DECLARE_PRODUCT_PAIRS(isa)               \
  namespace isa {                                       \
  size_t product_pairs_workspace(const Product&);       \
  void product_pairs(const Product&, size_t number);    \
  }

}  // namespace fastlm
