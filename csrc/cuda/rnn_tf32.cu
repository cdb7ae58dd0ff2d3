#include "kernels.h"

namespace fastlm::cuda {

Kernels kernels_tf32(const Plan& plan) { return choose<TensorProduct, float>(plan); }

}  // namespace fastlm::cuda
