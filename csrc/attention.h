// Attention tile by tile: softmax(s) v with s = scale · q kᵀ, capped, biased and masked (fastlm/ops/attention.py).
//
// A query i of a row of the batch sees the keys of one band, [start, end): that is what causality, the window and the
// row's own lengths come to. Numbers are stored as S (float, double, Bf16) and computed with as T (double for double, else
// float), which they are rounded from once. All pointers belong to the caller; results overlap no input.
#pragma once

#include <cstddef>
#include <cstdint>

#include "numbers.h"

namespace fastlm {

// Row i of head h of batch row b lies at data + b·batch + h·head + i·row; its numbers lie side by side.
template <class P>
struct Strided {
  P* data;
  int64_t batch, head, row;
};

template <class S>
struct Attention {
  using T = Compute<S>;

  int64_t batch, heads, kv_heads;  // B, H, H_kv, which divides H
  int64_t queries, keys;           // Sq, Sk; where there are spans, at least as many as the longest has
  int64_t dim, value_dim;          // D, Dv

  Strided<const S> query;  // [B, H, Sq, D]
  Strided<const S> key;    // [B, H_kv, Sk, D]
  Strided<const S> value;  // [B, H_kv, Sk, Dv]
  const int64_t* spans;    // [B, 4]: first query, queries, first key, keys of each batch row; null: all of them

  double scale, softcap;       // softcap 0: none
  bool is_causal;              // key j ≤ query i
  int64_t left, right;         // of the window, aligned at the last query and key; -1: unbounded
  Strided<const T> bias;       // [B, H, Sq, Sk], strides 0 where it is broadcast; null data: none
  Strided<const uint8_t> mask; // the same, of bytes that are 0 where a query may not attend; not both
  int64_t column;              // stride of the keys in bias or mask: 1 or 0
  const T* sinks;              // [H], null: none
  const T* slopes;             // [B or 1, H] of ALiBi, null: none
  int64_t slopes_batch;        // H or 0
  const int64_t* query_ids;    // [B, Sq] documents, null: none
  const int64_t* key_ids;      // [B, Sk]

  Strided<S> out;  // [B, H, Sq, Dv] out; backward: in
  Strided<T> lse;  // [B, H, Sq] out, +∞ for a query that sees nothing; backward: in

  // Backward only.
  Strided<const S> dout;   // [B, H, Sq, Dv]
  Strided<const T> dlse;   // [B, H, Sq], null data: zeros
  Strided<S> dquery;       // [B, H, Sq, D] out, null data: not wanted
  Strided<S> dkey;         // [B, H_kv, Sk, D] out, null data: not wanted
  Strided<S> dvalue;       // [B, H_kv, Sk, Dv] out, null data: not wanted
  Strided<T> dbias;        // as bias, keys side by side, null data: not wanted; zeros where nothing is seen come from the caller
  bool dbias_add;          // several scores share one element of it: add them up
  bool batch_shared, heads_shared;  // rows of the batch, or heads, share elements of dbias

  int threads;
  void* workspace;  // on a cache line
};

// Each returns how many bytes of workspace it needs, and does no more where there is none.
#define FASTLM_DECLARE_ATTENTION(isa)                  \
  namespace isa {                                      \
  size_t attention_forward(const Attention<float>&);   \
  size_t attention_forward(const Attention<double>&);  \
  size_t attention_forward(const Attention<Bf16>&);    \
  size_t attention_backward(const Attention<float>&);  \
  size_t attention_backward(const Attention<double>&); \
  size_t attention_backward(const Attention<Bf16>&);   \
  }

}  // namespace fastlm
