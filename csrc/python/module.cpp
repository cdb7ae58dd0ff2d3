// fastlm._native: what Python sees of the kernels. The GIL is released while one runs.

#include "tensors.h"

PYBIND11_MODULE(_native, m) {
  using namespace fastlm;
  Torch::get();
  kernels = choose_kernels();
  const Features cpu;
  m.doc() = "Kernels in C++ and CUDA; see csrc/*.h for what each pointer means.";
  m.attr("isa") = kernels.name;
  m.attr("cpu") = cpu_of(kernels);
  m.attr("pairs") = kernels.pairs;
  m.attr("vnni") = kernels.quantized_linear != nullptr;
  m.attr("tiles") = kernels.product_pairs != nullptr;
  // What torch computes with; whoever caps our kernels below AVX-512 to stand for another CPU caps torch alike.
  const bool wide = m.attr("isa").cast<std::string>() == "avx512";
  m.attr("bf16_arithmetic") = wide && cpu.avx512_bf16;
  m.attr("fp16_arithmetic") = wide && cpu.avx512_fp16;
  m.attr("amx") = wide && cpu.amx_int8;
  define_rnn(m);
  define_rows(m);
  define_linear(m);
  define_loss(m);
  define_attention(m);
#ifdef FASTLM_CUDA
  define_cuda(m.def_submodule("cuda", "The kernels for NVIDIA GPUs."));
#endif
}
