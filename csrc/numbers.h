// Numbers of 16 bits as they lie in memory.
#pragma once

#include <cstdint>

namespace fastlm {

struct Bf16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

}  // namespace fastlm
