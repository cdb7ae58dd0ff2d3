// How a time step multiplies its operand by W_hh in pairs of bfloat16: as gemm.h does it in vectors.
#pragma once

#include "../rnn.h"
#include "pairs.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// As VectorProduct in gemm.h. The operand is [rows][part][depth, padded with zeros to a multiple of 32], or where that is
// Way::kTiled, [rows / 16][part][padded / 32][16 rows][32].
//
// Way is what multiplies: Tiles or Dots. Way::units(gates) is the vectors of units of a forward panel, Way::kParts the
// most parts that it knows, and way.multiply<parts, count>(x, rows, panel, depth, out, fetch) makes
// out [rows, count tiles of 16] = x [rows, depth] · panel. fetch as in gemm.h.
template <class T, class Way>
struct PairProduct {
  using Number = T;
  using Operand = Bf16;
  using Gate = std::conditional_t<sizeof(T) == 2, F16, T>;
  using Functions = std::conditional_t<sizeof(T) == 2, RoughMath, Math<float>>;
  static constexpr bool kInPlace = false;
  static constexpr bool kTakesX = sizeof(T) == 2;  // as it lies in memory, and rounds no product with it
  static constexpr int kRowsAhead = Way::kRowsAhead;  // whose products with x are made at once
  static constexpr int units(int gates) { return Way::units(gates); }
  static constexpr int64_t panel_vectors(int64_t share) { return Way::panel_vectors(share); }
  using Registers = Way;

  int64_t depth, padded;
  int parts;
  Way* way;

  PairProduct(const RnnProblem& p, int64_t depth, Way* way = nullptr)
      : depth(depth), padded(tiles_deep(depth) * kTileDepth), way(way) {
    parts = sizeof(T) > 2 && p.precision == Precision::high ? Way::kParts : 1;
  }
  using Rows = PairRows;
  Rows rows_at(const Bf16* x, int64_t ld) const { return {x, ld, kTileRows * ld, kTileDepth, padded}; }
  Rows rows_of(const Bf16* operand) const {
    if constexpr (Way::kTiled)
      return {operand, kTileDepth, kTileRows * parts * padded, kTileNumbers, kTileRows * padded};
    else
      return rows_at(operand, (parts * padded / kTileDepth | 1) * kTileDepth);  // odd cache lines: rows share no sets
  }
  int64_t numbers(int64_t rows) const { return (rows + kTileRows - 1) / kTileRows * rows_of(nullptr).group; }
  FASTLM_INLINED Bf16* row(Bf16* operand, int64_t b) const {
    const Rows all = rows_of(operand);
    return operand + b / kTileRows * all.group + b % kTileRows * all.row;
  }
  int64_t panel_numbers() const { return fastlm::FASTLM_ISA::panel_numbers(1, depth, parts); }

  FASTLM_INLINED void put(Bf16* row, int64_t at, const Vector<float>& x, int n) const {
    place(row, at, narrow(x), n);
    if (parts == 2) place(row + rows_of(nullptr).low, at, narrow(x - rounded(x)), n);
  }
  void pad(Bf16* row) const {
    for (int part = 0; part < parts; ++part)
      if (depth < padded) std::memset(found(row, depth) + part * rows_of(nullptr).low, 0, (padded - depth) * sizeof *row);
  }
  void prefetch_row(Bf16* row, int64_t at, int n) const {
    for (int j = 0; j < n; j += kTileDepth) prefetch_to_write(found(row, at + j), 1);
  }

  template <int G, int count>
  void pack_gates(const T* w, int64_t units, int64_t u, Bf16* panel) const {
    for (int t = 0; t < G * count; ++t) {
      const int64_t first = u + t / G * 16;
      pack_rows(w + (t % G * units + first) * depth, units - first, depth, place(panel, t, G * count), parts);
    }
  }
  template <int count>
  void pack_units(const T* w, int64_t units, int64_t u, int64_t n, Bf16* panel) const {
    for (int t = 0; t < count; ++t)
      pack_columns(w + u + t * 16, n - t * 16, units, depth, place(panel, t, count), parts);
  }
  TilePlace place(Bf16* panel, int t, int count) const { return {panel, t, count, depth, parts}; }
  FASTLM_INLINED Bf16* found(Bf16* row, int64_t at) const {
    return row + (Way::kTiled ? at / kTileDepth * kTileNumbers + at % kTileDepth : at);
  }
  FASTLM_INLINED void place(Bf16* row, int64_t at, const Halves& x, int n) const {
    const int left = Way::kTiled ? kTileDepth - int(at % kTileDepth) : n;
    if (n <= left) return store_halves(found(row, at), x, n);
    Bf16 all[kLanes<float>];
    store_halves(all, x, kLanes<float>);
    std::memcpy(found(row, at), all, left * sizeof *all);
    std::memcpy(found(row, at + left), all + left, (n - left) * sizeof *all);
  }

  template <int count, class Fetch>
  void multiply(const Rows& x, int64_t rows, const Bf16* panel, const Bf16*, float* out, const Fetch& fetch) const {
    if constexpr (sizeof(T) > 2 && Way::kParts == 2)
      if (parts == 2) return way->template multiply<2, count>(x, rows, panel, depth, out, fetch);
    way->template multiply<1, count>(x, rows, panel, depth, out, fetch);
  }
};

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
