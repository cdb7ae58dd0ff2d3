// Large products: both matrices are packed, chunk by chunk of the depth, into what the inner loop reads in order. A
// block of A stays in the L2 cache of the thread that packed it, a panel of B in L1 while all rows of that block use it.

#include "../product.h"

#include <algorithm>

#include "pack.h"
#include "simd.h"
#include "team.h"

namespace fastlm {

FASTLM_DECLARE_PRODUCT(FASTLM_ISA)

namespace FASTLM_ISA {
namespace {

constexpr int kVectors = 3;                        // of a tile's row; 2 and 4 are slower: benchmarks/LOG.md 2026-11-25
constexpr int kRows = kAccumulators / kVectors;    // of a tile
constexpr int64_t kDepthBytes = 2048;              // of a chunk; sums of chunks keep more digits than one long sum
constexpr int64_t kBlockRows = 240 / kRows * kRows;  // of A, packed: half of an L2 cache of 1 MB
constexpr int64_t kBlockColumns = 2048;            // of B, packed by all threads together

template <class T>
constexpr int kWidth = kVectors * kLanes<T>;

constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }  // to a multiple

// --- packing ------------------------------------------------------------------------------------------------------

// The lanes of v from `first` on, before the others.
template <class T, int first, size_t... I>
FASTLM_INLINE Vector<T> lanes_from(const Vector<T>& v, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, ((I + first) % kLanes<T>)...);
#else
  return __builtin_shuffle(v, typename Simd<T>::Bits{((I + first) % kLanes<T>)...});
#endif
}

// Strips [depth, kRows] of a [rows, depth], one after the other, zeros after the last row. A vector may hold the rows
// of two strips; four vectors use each page of a column-major A while it is at hand.
template <class T>
void pack_strips(const T* a, int64_t a_row, int64_t a_column, int64_t rows, int64_t depth, T* strips) {
  constexpr int lanes = kLanes<T>, together = kRows < lanes ? kRows : lanes, vectors = 4;
  static_assert(together * 2 >= lanes);
  const int64_t all = up(rows, kRows);
  for (int64_t i = 0; i < all; i += vectors * lanes) {
    pack<T, vectors>(a + i * a_row, a_row, a_column, rows - i, depth,
                     [&](int64_t k, int j, const Vector<T>& v) FASTLM_INLINED {
      const int64_t row = i + j * lanes;
      T* const first = strips + row / kRows * kRows * depth + row % kRows + k * kRows;
      if (row < all) store(first, v, together);
      if constexpr (together < lanes)
        if (row + together < all)
          store(first + depth * kRows, lanes_from<T, together>(v, std::make_index_sequence<lanes>()), together);
    });
  }
}

// --- tiles --------------------------------------------------------------------------------------------------------

// What a tile's sums are added to: its part of C itself, the same row of a bias for all its rows, or nothing.
template <class T>
struct Start {
  const T* from;  // null: nothing
  int64_t row;
};

// c [rows, columns] = start + strip [depth, kRows]ᵀ · panel [depth, kWidth], of which `count` vectors hold the columns;
// meanwhile `depth` cache lines from `ahead` on are fetched, and c row by row: at once they would take all buffers that
// the panel is waiting for.
template <class T, int count>
void tile(const T* strip, const T* panel, int64_t depth, Start<T> start, T* c, int64_t c_row, int rows, int columns,
          const T* ahead) {
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  V acc[kRows][count] = {};
  const V* b = reinterpret_cast<const V*>(panel);
  const char* line = reinterpret_cast<const char*>(ahead);
  int64_t k = 0;
  for (int row = 0; row <= kRows; ++row) {
    if (row < rows) prefetch_to_write(c + row * c_row, count * lanes);
    const int64_t end = row < kRows ? depth * (row + 1) / (kRows + 2) : depth;
    for (; k < end; ++k, b += kVectors, strip += kRows, line += 64) {
      __builtin_prefetch(line, 0, 2);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const T a = strip[i];
#pragma GCC unroll 3
        for (int j = 0; j < count; ++j) acc[i][j] += a * b[j];
      }
    }
  }
  const auto finish = [&](int i, int j, int n) {
    const V sum = start.from ? acc[i][j] + load(start.from + i * start.row + j * lanes, n) : acc[i][j];
    store(c + i * c_row + j * lanes, sum, n);
  };
  const bool whole = rows == kRows && columns == count * lanes;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < count; ++j) {
      if (whole)
        finish(i, j, lanes);
      else if (i < rows)
        finish(i, j, std::clamp(columns - j * lanes, 0, lanes));
    }
}

// --- the product --------------------------------------------------------------------------------------------------

template <class T>
struct Workspace {
  T* const base;
  const int64_t depth, of_panels, of_block;

  explicit Workspace(const Product& p)
      : base(static_cast<T*>(p.workspace)),
        depth(even_chunk(p.depth)),
        of_panels(up(std::min(p.columns, kBlockColumns), kWidth<T>) * depth),
        of_block(up(std::min(p.rows, kBlockRows), kRows) * depth) {}
  size_t bytes(int threads) const { return (of_panels + threads * of_block) * sizeof(T); }
  T* panels() const { return base; }
  T* block(int thread) const { return base + of_panels + thread * of_block; }

 private:
  // A multiple of 16, so that each part begins on a cache line.
  static int64_t even_chunk(int64_t depth) {
    constexpr int64_t most = kDepthBytes / sizeof(T);
    const int64_t chunks = up(depth, most) / most;
    return chunks ? up((depth + chunks - 1) / chunks, 16) : 16;
  }
};

// One thread's share of a product.
template <class T>
class Share {
  const Product& p;
  Member& me;
  const Workspace<T> space;
  const bool by_rows;  // of C, else by columns: B is packed by all threads together, A by each that needs it
  int64_t first_row = 0, last_row;

 public:
  Share(const Product& p, Member& me) : p(p), me(me), space(p), by_rows(p.rows >= me.count * 4 * kRows),
                                        last_row(p.rows) {
    if (!by_rows) return;
    const int64_t strips = up(p.rows, kRows) / kRows;
    first_row = me.begin(strips) * kRows;
    last_row = std::min(me.end(strips) * kRows, p.rows);
  }

  void run() {
    for (int64_t n = 0; n < p.columns; n += kBlockColumns) {
      const int64_t columns = std::min(kBlockColumns, p.columns - n);
      int64_t k = 0;
      do {  // once for a depth of 0
        const int64_t depth = std::min(space.depth, p.depth - k);
        me.meet();  // the last panels were read
        pack_panels(k, depth, n, columns);
        me.meet();
        for (int64_t m = first_row; m < last_row; m += kBlockRows)
          multiply(m, std::min(kBlockRows, last_row - m), k, depth, n, columns);
        k += depth;
      } while (k < p.depth);
    }
  }

 private:
  void pack_panels(int64_t k, int64_t depth, int64_t n, int64_t columns) {
    const T* const b = static_cast<const T*>(p.b) + k * p.b_row + n * p.b_column;
    const int64_t panels = up(columns, kWidth<T>) / kWidth<T>;
    for (int64_t i = me.begin(panels); i < me.end(panels); ++i)
      pack<T, kVectors>(b + i * kWidth<T> * p.b_column, p.b_column, p.b_row, columns - i * kWidth<T>, depth,
                        [panel = space.panels() + i * kWidth<T> * depth](int64_t k, int j, const Vector<T>& v)
                            FASTLM_INLINED { store(panel + k * kWidth<T> + j * kLanes<T>, v); });
  }

  void multiply(int64_t m, int64_t rows, int64_t k, int64_t depth, int64_t n, int64_t columns) {
    const T* const a = static_cast<const T*>(p.a) + m * p.a_row + k * p.a_column;
    T* const block = space.block(me.index);
    pack_strips(a, p.a_row, p.a_column, rows, depth, block);
    const int64_t panels = up(columns, kWidth<T>) / kWidth<T>;
    const int64_t first = by_rows ? 0 : me.begin(panels), last = by_rows ? panels : me.end(panels);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t j = panel * kWidth<T>;
      const T* const packed = space.panels() + j * depth;
      const T* const next = packed + (panel + 1 < last ? kWidth<T> * depth : 0);
      const int wide = int(std::min<int64_t>(columns - j, kWidth<T>));
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t strip = i / kRows;  // the first kVectors of them fetch the next panel: it is as many lines
        const T* const ahead = strip < kVectors ? next + strip * depth * kLanes<T> : packed;
        T* const c = static_cast<T*>(p.c) + (m + i) * p.c_row + n + j;
        const Start<T> start = k > 0 || p.add ? Start<T>{c, p.c_row}
                               : p.bias       ? Start<T>{static_cast<const T*>(p.bias) + n + j, 0}
                                              : Start<T>{nullptr, 0};
        with_count<kVectors>((wide + kLanes<T> - 1) / kLanes<T>, [&](auto count) {
          tile<T, count>(block + i * depth, packed, depth, start, c, p.c_row, int(std::min<int64_t>(rows - i, kRows)),
                         wide, ahead);
        });
      }
    }
  }
};

template <class T>
void run(const Product& p) {
  if (p.rows == 0 || p.columns == 0) return;
  parallel(p.threads, [&](Member& me) { Share<T>(p, me).run(); });
}

}  // namespace

size_t product_workspace(const Product& p, size_t number) {
  return number == sizeof(float) ? Workspace<float>(p).bytes(p.threads) : Workspace<double>(p).bytes(p.threads);
}

void product(const Product& p, size_t number) { number == sizeof(float) ? run<float>(p) : run<double>(p); }

}  // namespace FASTLM_ISA
}  // namespace fastlm
