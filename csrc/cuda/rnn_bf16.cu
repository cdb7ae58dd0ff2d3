#include "kernels.h"

namespace fastlm::cuda {

Kernels kernels_bf16(const Plan& plan) { return choose<TensorProduct, Bf16>(plan); }

}  // namespace fastlm::cuda
