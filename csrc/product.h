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

// T is float or double: size_t product_workspace(const Product&, size_t size_of_number)

#define FASTLM_DECLARE_PRODUCT(isa)                                     \
  namespace isa {                                                       \
  size_t product_workspace(const Product&, size_t number);              \
  void product(const Product&, size_t number);                          \
  }

}  // namespace fastlm
