// Numbers of 16 bits as they lie in memory, and what is computed with.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastlm {

struct Bf16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

}  // namespace fastlm
