#include "kernels.h"

namespace fastlm::cuda {

Kernels kernels_f32(const Plan& plan) { return choose<ScalarProduct, float>(plan); }

}  // namespace fastlm::cuda
