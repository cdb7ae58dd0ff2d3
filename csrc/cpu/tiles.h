// The tile registers of a thread (AMX): 0 to 3 are sums, 4 and 5 multiply 6 and 7, which are whole.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fastlm {
namespace FASTLM_ISA {
namespace {

class TileRegisters {
 public:
  static constexpr int kRows = 16;

  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  ~TileRegisters() {
    if (first_) _tile_release();
  }

  // Give tile 4 `first` rows and tile 5 `second`, 0: unused. Contents are lost when that changes something.
  void shape(int first, int second) {
    if (first == first_ && second == second_) return;
    first_ = first;
    second_ = second;
    Configuration c;
    const int rows[8] = {first, first, second, second, first, second, kRows, kRows};
    for (int i = 0; i < 8; ++i) {
      c.rows[i] = uint8_t(rows[i]);
      c.bytes[i] = rows[i] ? 64 : 0;
    }
    __asm__ volatile("" : : "r"(&c) : "memory");  // GCC's intrinsic owns up to reading the first 8 bytes only
    _tile_loadconfig(&c);
  }

 private:
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  int first_ = 0, second_ = 0;
};

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
