// The instructions that kernels for AMX and AVX512_BF16 use, in plain C++, for machines without them: `g++ -include
// tiles.h`.
//
// Tiles belong to a thread, as in the processor. What the processor refuses (a tile without a shape, shapes that do
// not fit each other) ends the process with a message. FASTLM_TILE_FAULT plants an error, to show that it is noticed:
// "row": loads leave the last row out, and vectors the last sum; "pair": the second number of each pair is not multiplied.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulation {

struct Tile {
  int rows = 0, bytes = 0;
  alignas(64) unsigned char data[16][64];
};

inline thread_local Tile tiles[8];

inline void demand(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "invalid tile instruction: %s\n", what);
  std::abort();
}

inline bool fault(const char* name) {
  static const char* const planted = std::getenv("FASTLM_TILE_FAULT");
  return planted && !std::strcmp(planted, name);
}

inline Tile& tile(int i) {
  demand(tiles[i].rows > 0, "the tile has no shape");
  return tiles[i];
}

inline void zero(int i) { std::memset(tile(i).data, 0, sizeof tiles[i].data); }

inline void load_config(const void* address) {
  unsigned char c[64];
  std::memcpy(c, address, 64);
  demand(reinterpret_cast<uintptr_t>(address) % 64 == 0, "the configuration is not aligned");  // stricter than it must be
  demand(c[0] == 1, "palette");
  for (int i = 1; i < 16; ++i) demand(c[i] == 0, "reserved bytes and start row");
  for (int i = 0; i < 16; ++i) {
    const int bytes = c[16 + 2 * i] + 256 * c[17 + 2 * i], rows = c[48 + i];
    demand(bytes <= 64 && rows <= 16 && (bytes == 0) == (rows == 0) && (i < 8 || rows == 0), "rows and bytes");
    if (i >= 8) continue;
    tiles[i].rows = rows;
    tiles[i].bytes = bytes;
    std::memset(tiles[i].data, 0, sizeof tiles[i].data);
  }
}

inline void release() {
  for (Tile& t : tiles) t.rows = t.bytes = 0;
}

inline void load(int i, const void* base, int64_t stride) {
  Tile& t = tile(i);
  zero(i);
  for (int r = 0; r < t.rows - fault("row"); ++r)
    std::memcpy(t.data[r], static_cast<const unsigned char*>(base) + r * stride, t.bytes);
}

inline void store(int i, void* base, int64_t stride) {
  const Tile& t = tile(i);
  for (int r = 0; r < t.rows; ++r) std::memcpy(static_cast<unsigned char*>(base) + r * stride, t.data[r], t.bytes);
}

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }

inline float number(const unsigned char* p) {
  const uint32_t bits = uint32_t(p[0] | p[1] << 8) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return flush(x);
}

// Even and odd numbers of the depth are summed apart, each by fused multiply-adds from zero, then added to the tile;
// denormal numbers count as zero throughout (Intel SDM, TDPBF16PS).
inline void dot(int sums, int left, int right) {
  Tile &c = tile(sums), &a = tile(left), &b = tile(right);
  demand(sums != left && sums != right && left != right, "tiles must differ");
  demand(a.rows == c.rows && b.bytes == c.bytes && a.bytes == b.rows * 4, "shapes do not fit");
  const int columns = c.bytes / 4;
  static const bool with_odd = !fault("pair");
  for (int m = 0; m < c.rows; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < b.rows; ++k) {
      const float x = number(a.data[m] + 4 * k), y = with_odd ? number(a.data[m] + 4 * k + 2) : 0;
      for (int n = 0; n < columns; ++n) {
        even[n] = flush(std::fma(x, number(b.data[k] + 4 * n), even[n]));
        odd[n] = flush(std::fma(y, number(b.data[k] + 4 * n + 2), odd[n]));
      }
    }
    for (int n = 0; n < columns; ++n) {
      float x;
      std::memcpy(&x, c.data[m] + 4 * n, 4);
      x = flush(flush(x) + flush(even[n] + odd[n]));
      std::memcpy(c.data[m] + 4 * n, &x, 4);
    }
  }
}

// TDPBSSD: four signed bytes of the depth at a time, sums of 32 bits that wrap.
inline void dot_bytes(int sums, int left, int right) {
  Tile &c = tile(sums), &a = tile(left), &b = tile(right);
  demand(sums != left && sums != right && left != right, "tiles must differ");
  demand(a.rows == c.rows && b.bytes == c.bytes && a.bytes == b.rows * 4, "shapes do not fit");
  static const int together = fault("pair") ? 3 : 4;
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      uint32_t x;
      std::memcpy(&x, c.data[m] + 4 * n, 4);
      for (int k = 0; k < b.rows; ++k)
        for (int i = 0; i < together; ++i)
          x += uint32_t(int8_t(a.data[m][4 * k + i]) * int8_t(b.data[k][4 * n + i]));
      std::memcpy(c.data[m] + 4 * n, &x, 4);
    }
}

// VDPBF16PS: the odd numbers' product is added first, each by a fused multiply-add; denormal numbers count as zero.
inline __m512 dot_vectors(__m512 sums, const __m512bh& left, const __m512bh& right) {
  float out[16];
  unsigned char a[64], b[64];
  std::memcpy(out, &sums, 64);
  std::memcpy(a, &left, 64);
  std::memcpy(b, &right, 64);
  static const bool with_odd = !fault("pair");
  static const int last = 16 - fault("row");
  for (int i = 0; i < last; ++i) {
    const float odd = with_odd ? flush(std::fma(number(a + 4 * i + 2), number(b + 4 * i + 2), flush(out[i]))) : out[i];
    out[i] = flush(std::fma(number(a + 4 * i), number(b + 4 * i), odd));
  }
  return _mm512_loadu_ps(out);
}

// VCVTNEPS2BF16: to nearest even, denormal numbers to zero, a NaN stays one.
inline __m256i narrow(__m512 v) {
  uint32_t bits[16];
  uint16_t out[16];
  std::memcpy(bits, &v, 64);
  for (int i = 0; i < 16; ++i) {
    const uint32_t x = bits[i], exponent = x >> 23 & 255;
    if (exponent == 0)
      out[i] = uint16_t(x >> 16 & 0x8000);
    else if (exponent == 255 && x << 9)
      out[i] = uint16_t(x >> 16 | 64);
    else
      out[i] = uint16_t((x + 0x7fff + (x >> 16 & 1)) >> 16);
  }
  __m256i result;
  std::memcpy(&result, out, 32);
  return result;
}

// VCVTNE2PS2BF16: the numbers of `low` first.
inline __m512i narrow_two(__m512 high, __m512 low) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low)), narrow(high), 1);
}

}  // namespace emulation

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_stream_loadd
#define _tile_loadconfig emulation::load_config
#define _tile_release emulation::release
#define _tile_loadd emulation::load
#define _tile_stored emulation::store
#define _tile_zero emulation::zero
#define _tile_dpbf16ps emulation::dot
#define _tile_dpbssd emulation::dot_bytes
#define _tile_stream_loadd emulation::load
#define _mm512_dpbf16_ps emulation::dot_vectors
#define _mm512_cvtneps_pbh emulation::narrow
#define _mm512_cvtne2ps_pbh emulation::narrow_two

#define __AVX512BF16__ 1  // simd.h narrows as such a processor does
