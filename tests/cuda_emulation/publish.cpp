// Whether a number, whatever its bits, is seen where it is published, and seen missing where it is not; and whether who
// waits for what never comes gives up. Says on stderr what is wrong.

#include "product.h"

#include <cstdio>

using namespace fastlm::cuda;

template <class T, class Bits>
int wrong(uint64_t first, uint64_t count) {
  constexpr int each = kLoad / sizeof(T);
  constexpr Bits missing = Bits(~Bits(0)), sign = Bits(Bits(1) << (8 * sizeof(T) - 1));
  union {
    uint4 group;
    Bits bits[each];
  } places;
  int found = 0;
  for (uint64_t i = first; i < first + count; ++i) {
    const Bits bits = Bits(i);
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    for (const Bits others : {Bits(0), Bits(sign - 1), sign, Bits(missing - 1), missing})
      for (int place = 0; place < each; ++place) {
        std::fill_n(places.bits, each, others);
        places.bits[place] = missing;
        found += complete<T>(places.group);
        publish(reinterpret_cast<T*>(places.bits) + place, value);
        emulation::arrive(1);
        found += complete<T>(places.group) != (others != missing);
        found += places.bits[place] != (bits == missing ? missing - 1 : bits);
      }
  }
  if (found) std::fprintf(stderr, "%d wrong of %zu bytes\n", found, sizeof(T));
  return found;
}

struct Never {
  static constexpr bool kSparing = false;
  static uint4 load(const uint4*) { return {~0u, 0, 0, 0}; }
  static bool complete(const uint4& x) { return fastlm::cuda::complete<Bf16>(x); }
};

bool gives_up() {
  uint4 to[1][1];
  try {
    load<Never>(to, nullptr, 0, 0, 1, [](int) { return true; }, [] {});
    return false;
  } catch (const std::runtime_error&) {
    return true;
  }
}

int main() {
  int found = wrong<Bf16, uint16_t>(0, 1 << 16);
  found += wrong<Fp16, uint16_t>(0, 1 << 16);
  for (const uint32_t first : {0u, 0x3f800000u, 0x7f7ffff0u, 0x7fbffff0u, 0x7ffffff0u, 0xff7ffff0u, 0xfffffff0u}) {
    found += wrong<float, uint32_t>(first, 16);
    found += wrong<double, uint64_t>(uint64_t(first | 15) << 32 | 0xfffffff0, 16);
  }
  return found || !gives_up();
}
