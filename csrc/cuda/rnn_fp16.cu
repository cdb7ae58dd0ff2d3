#include "kernels.h"

namespace fastlm::cuda {

Kernels kernels_fp16(const Plan& plan) { return choose<TensorProduct, Fp16>(plan); }

}  // namespace fastlm::cuda
