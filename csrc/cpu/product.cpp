// Large products: both matrices are packed, chunk by chunk of the depth, into what the inner loop reads in order. A
// block of A stays in the L2 cache of the thread that packed it, a panel of B in L1 while all rows of that block use it.

#include "../product.h"

#include <algorithm>
#include <utility>

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

template <class T, size_t... I>
FASTLM_INLINE void zip(const Vector<T>& a, const Vector<T>& b, Vector<T>& low, Vector<T>& high,
                       std::index_sequence<I...>) {
  constexpr int lanes = kLanes<T>;
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * lanes)...);
  high = __builtin_shufflevector(a, b, (lanes / 2 + I / 2 + I % 2 * lanes)...);
#else
  using Bits = typename Simd<T>::Bits;
  low = __builtin_shuffle(a, b, Bits{(I / 2 + I % 2 * lanes)...});
  high = __builtin_shuffle(a, b, Bits{(lanes / 2 + I / 2 + I % 2 * lanes)...});
#endif
}

// Transpose a square of vectors: each round interleaves its halves.
template <class T>
FASTLM_INLINE void transpose(Vector<T> (&v)[kLanes<T>]) {
  constexpr int lanes = kLanes<T>;
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
    Vector<T> w[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i)
      zip<T>(v[i], v[i + lanes / 2], w[2 * i], w[2 * i + 1], std::make_index_sequence<lanes>());
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = w[i];
  }
}

// out [depth, width] = `count` lines, then zeros; number k of line i is from[i·across + k·along]
template <class T, int width>
void pack(const T* from, int64_t across, int64_t along, int64_t count, int64_t depth, T* out) {
  constexpr int lanes = kLanes<T>;
  for (int j = 0; j < width; j += lanes) {
    const int take = width - j < lanes ? width - j : lanes;
    const int there = int(std::clamp<int64_t>(count - j, 0, take));
    const T* const lines = from + j * across;
    int64_t k = 0;
    if (across == 1) {
      if (there == take)
        for (; k < depth; ++k) store(out + k * width + j, load(lines + k * along, take), take);
      else
        for (; k < depth; ++k) store(out + k * width + j, load(lines + k * along, there), take);
    } else if (along == 1) {
      for (; k + lanes <= depth; k += lanes) {
        Vector<T> square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = i < there ? load(lines + i * across + k) : Vector<T>{};
        transpose<T>(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(out + (k + i) * width + j, square[i], take);
      }
    }
    for (; k < depth; ++k)
      for (int i = 0; i < take; ++i) out[k * width + j + i] = i < there ? lines[i * across + k * along] : T(0);
  }
}

// --- tiles --------------------------------------------------------------------------------------------------------

// What a tile's sums are added to: its part of C itself, the same row of a bias for all its rows, or nothing.
template <class T>
struct Start {
  const T* from;  // null: nothing
  int64_t row;
};

// c [rows, columns] = start + strip [depth, kRows]ᵀ · panel [depth, kWidth]; meanwhile `depth` cache lines from `ahead`
// on are fetched, and c row by row: at once they would take all buffers that the panel is waiting for.
template <class T>
void tile(const T* strip, const T* panel, int64_t depth, Start<T> start, T* c, int64_t c_row, int rows, int columns,
          const T* ahead) {
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  V acc[kRows][kVectors] = {};
  const V* b = reinterpret_cast<const V*>(panel);
  const char* line = reinterpret_cast<const char*>(ahead);
  int64_t k = 0;
  for (int row = 0; row <= kRows; ++row) {
    if (row < rows) prefetch_to_write(c + row * c_row, kWidth<T>);
    const int64_t end = row < kRows ? depth * (row + 1) / (kRows + 2) : depth;
    for (; k < end; ++k, b += kVectors, strip += kRows, line += 64) {
      __builtin_prefetch(line, 0, 2);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const T a = strip[i];
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) acc[i][j] += a * b[j];
      }
    }
  }
  const auto finish = [&](int i, int j, int n) {
    const V sum = start.from ? acc[i][j] + load(start.from + i * start.row + j * lanes, n) : acc[i][j];
    store(c + i * c_row + j * lanes, sum, n);
  };
  const bool whole = rows == kRows && columns == kWidth<T>;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) {
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
      pack<T, kWidth<T>>(b + i * kWidth<T> * p.b_column, p.b_column, p.b_row, columns - i * kWidth<T>, depth,
                         space.panels() + i * kWidth<T> * depth);
  }

  void multiply(int64_t m, int64_t rows, int64_t k, int64_t depth, int64_t n, int64_t columns) {
    const T* const a = static_cast<const T*>(p.a) + m * p.a_row + k * p.a_column;
    T* const block = space.block(me.index);
    for (int64_t i = 0; i < rows; i += kRows)
      pack<T, kRows>(a + i * p.a_row, p.a_row, p.a_column, rows - i, depth, block + i * depth);
    const int64_t panels = up(columns, kWidth<T>) / kWidth<T>;
    const int64_t first = by_rows ? 0 : me.begin(panels), last = by_rows ? panels : me.end(panels);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t j = panel * kWidth<T>;
      const T* const packed = space.panels() + j * depth;
      const T* const next = packed + (panel + 1 < last ? kWidth<T> * depth : 0);
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t strip = i / kRows;  // the first kVectors of them fetch the next panel: it is as many lines
        const T* const ahead = strip < kVectors ? next + strip * depth * kLanes<T> : packed;
        T* const c = static_cast<T*>(p.c) + (m + i) * p.c_row + n + j;
        const Start<T> start = k > 0 || p.add ? Start<T>{c, p.c_row}
                               : p.bias       ? Start<T>{static_cast<const T*>(p.bias) + n + j, 0}
                                              : Start<T>{nullptr, 0};
        tile(block + i * depth, packed, depth, start, c, p.c_row, int(std::min<int64_t>(rows - i, kRows)),
             int(std::min<int64_t>(columns - j, kWidth<T>)), ahead);
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
