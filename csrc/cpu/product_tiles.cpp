// Large products of bfloat16 by AMX: B is packed into tiles, and A where it does not lie in them, whatever their strides,
// so that nothing has to be transposed before. Four tiles of sums are 32 rows and 32 columns of C; a strip of A stays in
// the L1 cache while it meets the strips of B, which come from L2.
#include "../product.h"

#if defined(FASTLM_TILES)

#include <algorithm>

#include "pairs.h"
#include "team.h"
#include "tiles.h"

namespace fastlm {

FASTLM_DECLARE_PRODUCT_PAIRS(FASTLM_ISA)

namespace FASTLM_ISA {
namespace {

constexpr int64_t kSide = 32;                // rows or columns of a strip: two tiles
constexpr int64_t kStep = 2 * kTileNumbers;  // of a strip, for each 32 of the depth
constexpr int64_t kChunk = 16;               // tiles of the depth that are multiplied at a time: a strip of A stays in L1
constexpr int64_t kBlockColumns = 512;       // of B, packed by all threads together; twice as many of a single chunk
constexpr int64_t kPackedRows = 128;         // of A, at a time
constexpr int64_t kMostRows = 512;           // of a task, whose sums wait in L2 for the next chunk: more rows read B less often
constexpr int64_t kPage = 2048;              // numbers; rows a page apart share cache sets

constexpr int64_t strips(int64_t n) { return (n + kSide - 1) / kSide; }

// --- packing ------------------------------------------------------------------------------------------------------

// A or B, seen as rows of numbers to be multiplied: those of A, the columns of B.
struct Operand {
  const Bf16* first;
  int64_t row, step;  // numbers from one row to the next and from one number of a row to the next; one of them is 1
};

// Strips of `rows` rows, [strip][32 of the depth][tile], zeros after the last row and number. `pairs`: the lines of a tile
// are pairs of the depth, as the second factor has them, else rows.
template <bool pairs>
class Packing {
  const Operand x;
  const int64_t rows, depth, deep = tiles_deep(depth);
  Bf16* const strip;

 public:
  Packing(const Operand& x, int64_t rows, int64_t depth, Bf16* strip) : x(x), rows(rows), depth(depth), strip(strip) {
    if (x.step == 1)
      from_rows();
    else
      from_columns();
  }

 private:
  Bf16* tile(int64_t row, int64_t k) const {
    return strip + (row / kSide * deep + k) * kStep + row / kTileRows % 2 * kTileNumbers;
  }

  // Row by row: what lies in order is read fastest.
  void from_rows() {
    const int64_t whole = depth / kTileDepth, end = strips(rows) * kSide;
    for (int64_t r = 0; r < end; ++r) {
      const Bf16* from = x.first + r * x.row;
      Bf16* to = tile(r, 0) + r % kTileRows * kTileDepth;
      int64_t k = 0;
      for (; r < rows && k < whole; ++k, from += kTileDepth, to += kStep) std::memcpy(to, from, 64);
      for (; k < deep; ++k, to += kStep) {
        std::memset(to, 0, 64);
        if (r < rows) std::memcpy(to, from, (depth - k * kTileDepth) * sizeof *to);
      }
    }
    if constexpr (pairs)
      for (int64_t r = 0; r < end; r += kTileRows)
        for (int64_t k = 0; k < deep; ++k) {
          Pairs all[16];
          std::memcpy(all, tile(r, k), sizeof all);
          transpose(all);
          std::memcpy(tile(r, k), all, sizeof all);
        }
  }

  // All strips take their part of a column while its page is at hand.
  void from_columns() {
    for (int64_t k = 0; k < deep; ++k)
      for (int64_t r = 0; r < strips(rows) * kSide; r += kTileRows) {
        const int wide = int(std::clamp<int64_t>(rows - r, 0, 16));
        const Bf16* const from = x.first + r;
        const auto read = [&](int64_t at) FASTLM_INLINED {
          return at < depth ? (Pairs)load(from + at * x.step, wide) : Pairs{};
        };
        for (int64_t i = 0; r % kSide == 0 && i < kTileDepth; ++i)
          __builtin_prefetch(from + ((k + 1) * kTileDepth + i) * x.step);
        Pairs all[16];
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) all[i] = read(k * kTileDepth + 2 * i) >> 16 | read(k * kTileDepth + 2 * i + 1);
        if constexpr (!pairs) transpose(all);
        std::memcpy(tile(r, k), all, sizeof all);
      }
  }
};

// --- products -----------------------------------------------------------------------------------------------------

// A strip of A, packed or as it lies: 32 numbers of row r, of the k-th 32 of the depth, are at
// first + r/16·low + r%16·row + k·step.
struct StripOfA {
  const Bf16* first;
  int64_t row, low, step;
};

// sums [32, 32] = a · strip of B, plus what they are if `more`; the sums behind them are then fetched for the next strip.
void multiply_strips(StripOfA a, const Bf16* b, int64_t deep, float* sums, bool more) {
  constexpr int64_t line = 64, row = kSide * sizeof *sums;
  const int64_t a_row = a.row * sizeof *a.first;
  float* const below = sums + kTileRows * kSide;
  __asm__ volatile("" : : : "memory");  // GCC's tile loads do not say that they read memory
  if (more) {
    _tile_loadd(0, sums, row);
    _tile_loadd(1, sums + 16, row);
    _tile_loadd(2, below, row);
    _tile_loadd(3, below + 16, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const float* next = sums + kSide * kSide;
  for (; deep > 0; --deep, a.first += a.step, b += kStep, next += kSide * kSide / kChunk) {
#pragma GCC unroll 4
    for (int i = 0; more && i < 4; ++i) __builtin_prefetch(next + i * 16, 1);
    _tile_stream_loadd(6, b, line);  // leaves L1 to A
    _tile_loadd(4, a.first, a_row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a.first + a.low, a_row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_stream_loadd(7, b + kTileNumbers, line);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, row);
  _tile_stored(1, sums + 16, row);
  _tile_stored(2, below, row);
  _tile_stored(3, below + 16, row);
  __asm__ volatile("" : : : "memory");
}

// How C is cut into tasks: whoever is free takes the next, because a core may be slower than the others. Who makes a
// part of C changes no number.
struct Plan {
  int64_t deep;                 // tiles of the depth, at least 1
  int64_t rows, columns;        // strips of a task's rows and of a block of B
  int64_t parts;                // of a block of B
  int64_t of_b, of_a, of_sums;  // bytes

  explicit Plan(const Product& p) : deep(std::max<int64_t>(tiles_deep(p.depth), 1)) {
    const bool long_sums = deep >= 4 * kChunk;
    const int64_t enough = p.threads == 1 ? 1 : (long_sums ? 2 : 4) * p.threads;  // tasks
    const int64_t high = strips(p.rows), wide = strips(p.columns);
    rows = std::clamp<int64_t>(high / enough, 1, (long_sums ? kMostRows : kPackedRows) / kSide);
    columns = std::min(wide, (deep > kChunk ? 1 : 2) * kBlockColumns / kSide);
    const int64_t blocks = std::max<int64_t>((high + rows - 1) / rows, 1);
    parts = std::clamp<int64_t>(enough / blocks, 1, std::max<int64_t>(columns, 1));
    of_b = columns * deep * kStep * sizeof(Bf16);
    of_a = std::min(rows, kPackedRows / kSide) * std::min(deep, kChunk) * kStep * sizeof(Bf16);
    of_sums = (deep > kChunk ? rows * columns : 1) * kSide * kSide * sizeof(float);
  }
  size_t bytes(int threads) const { return of_b + threads * (of_a + of_sums); }
};

// One thread's share of a product whose C is of type T.
template <class T>
class Share {
  const Product& p;
  Member& me;
  const Plan plan;
  Bf16* const packed_b;
  Bf16* const packed_a;
  float* const sums;
  TileRegisters registers;

 public:
  Share(const Product& p, Member& me)
      : p(p),
        me(me),
        plan(p),
        packed_b(static_cast<Bf16*>(p.workspace)),
        packed_a(packed_b + (plan.of_b + me.index * (plan.of_a + plan.of_sums)) / sizeof(Bf16)),
        sums(reinterpret_cast<float*>(packed_a + plan.of_a / sizeof(Bf16))) {}

  void run(Queue& packings, Queue& tasks) {
    registers.shape(kTileRows, kTileRows);
    const int64_t blocks = (strips(p.rows) + plan.rows - 1) / plan.rows, step = plan.columns * kSide;
    int64_t packed = 0, done = 0, packing = packings.take(), task = tasks.take();
    for (int64_t n = 0; n < p.columns; n += step) {
      const int64_t count = strips(std::min(step, p.columns - n));
      if (n > 0) me.meet();  // the last strips were read
      for (; packing < packed + count; packing = packings.take()) {
        const int64_t column = n + (packing - packed) * kSide;
        Packing<true>({static_cast<const Bf16*>(p.b) + column * p.b_column, p.b_column, p.b_row},
                      std::min(kSide, p.columns - column), p.depth, packed_b + (packing - packed) * plan.deep * kStep);
      }
      packed += count;
      me.meet();
      for (; task < done + blocks * plan.parts; task = tasks.take()) {
        const int64_t block = (task - done) / plan.parts, part = (task - done) % plan.parts;
        multiply(block * plan.rows * kSide, n, count * part / plan.parts, count * (part + 1) / plan.parts);
      }
      done += blocks * plan.parts;
    }
  }

 private:
  const Bf16* a_at(int64_t row, int64_t k) const {
    return static_cast<const Bf16*>(p.a) + row * p.a_row + k * kTileDepth * p.a_column;
  }

  // A task: rows of C from m on, and strips [first, last) of its columns from n on.
  void multiply(int64_t m, int64_t n, int64_t first, int64_t last) {
    const int64_t end = std::min(m + plan.rows * kSide, p.rows);
    for (int64_t k = 0; k < plan.deep; k += kChunk)
      for (int64_t row = m; row < end; row += kPackedRows)
        multiply_chunk(row, std::min(kPackedRows, end - row), k, n, first, last, (row - m) / kSide);
  }

  // `rows` rows of it from m on, times the chunk of the depth from k on; `strip` strips of the task are before them.
  void multiply_chunk(int64_t m, int64_t rows, int64_t k, int64_t n, int64_t first, int64_t last, int64_t strip) {
    const int64_t deep = std::min(kChunk, plan.deep - k), depth = std::min(p.depth - k * kTileDepth, deep * kTileDepth);
    const bool whole = depth > 0 && depth % kTileDepth == 0 && rows % kSide == 0, ends = k + deep == plan.deep;
    const bool packs = !whole || p.a_column != 1 || p.a_row % kPage == 0;
    if (packs) Packing<false>({a_at(m, k), p.a_row, p.a_column}, rows, depth, packed_a);
    for (int64_t i = 0; i < strips(rows); ++i) {
      const int64_t row = m + i * kSide;
      const StripOfA a = packs ? StripOfA{packed_a + i * deep * kStep, kTileDepth, kTileNumbers, kStep}
                               : StripOfA{a_at(row, k), p.a_row, kTileRows * p.a_row, kTileDepth};
      for (int64_t j = first; j < last; ++j) {
        float* const to = sums + (plan.deep > kChunk ? (strip + i) * plan.columns + j : 0) * kSide * kSide;
        if (ends) fetch_c(row, n + j * kSide);
        multiply_strips(a, packed_b + (j * plan.deep + k) * kStep, depth > 0 ? deep : 0, to, k > 0);
        if (ends) finish(to, row, n + j * kSide);
      }
    }
  }

  // Take 32 rows of C away from other cores.
  void fetch_c(int64_t row, int64_t column) const {
    T* const c = static_cast<T*>(p.c) + column;
    for (int64_t i = row; i < std::min(row + kSide, p.rows); ++i) prefetch_to_write(c + i * p.c_row, 32);
  }

  // Write 32 rows and columns of C.
  void finish(const float* from, int64_t row, int64_t column) {
    const int64_t rows = std::min(kSide, p.rows - row);
    const int wide = int(std::min(kSide, p.columns - column)), low = std::min(wide, 16), high = wide - low;
    const T* const bias = static_cast<const T*>(p.bias) + column;
    const Vector<float> bias_low = p.bias ? load(bias, low) : Vector<float>{};
    const Vector<float> bias_high = p.bias && high ? load(bias + 16, high) : Vector<float>{};
    T* to = static_cast<T*>(p.c) + row * p.c_row + column;
    for (int64_t i = 0; i < rows; ++i, to += p.c_row, from += kSide) {
      const Vector<float> a = load(from) + (p.add ? load(to, low) : bias_low);
      const Vector<float> b = load(from + 16) + (p.add ? load(to + 16, high) : bias_high);
      if constexpr (sizeof(T) == sizeof(Bf16)) {
        if (wide == kSide) {
          const auto both = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
          std::memcpy(to, &both, sizeof both);
          continue;
        }
      }
      store(to, a, low);
      store(to + 16, b, high);
    }
  }
};

}  // namespace

size_t product_pairs_workspace(const Product& p) { return Plan(p).bytes(p.threads); }

void product_pairs(const Product& p, size_t number) {
  if (p.rows == 0 || p.columns == 0) return;
  Queue packings, tasks;
  parallel(p.threads, [&](Member& me) {
    if (number == sizeof(float))
      Share<float>(p, me).run(packings, tasks);
    else
      Share<Bf16>(p, me).run(packings, tasks);
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm

#endif
