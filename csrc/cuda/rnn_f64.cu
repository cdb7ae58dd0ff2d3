#include "kernels.h"

namespace fastlm::cuda {

Kernels kernels_f64(const Plan& plan) { return choose<ScalarProduct, double>(plan); }

}  // namespace fastlm::cuda
