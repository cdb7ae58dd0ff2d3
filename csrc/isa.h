// Which kernels run: those of the widest instruction set that was built, that this CPU has and that FASTLM_MAX_ISA allows.

#pragma once

#include <string>

#include "attention.h"
#include "loss.h"
#include "product.h"
#include "quant.h"
#include "rnn.h"
#include "rows.h"

namespace fastlm {

template <class S>
struct LossKernels {
  void (*read)(const LossTile&, const LossRead<S>&);
  void (*gradient)(const LossTile&, const LossGradient<S>&);
  void (*divergence_read)(const LossTile&, const DivergenceRead<S>&);
  void (*divergence_gradient)(const LossTile&, const DivergenceGradient<S>&);
};

// The recurrent layer's kernels for one type of number.
template <class T>
struct RecurrentKernels {
  using Number = T;
  size_t (*workspace)(const RnnProblem&, bool, size_t);
  void (*forward)(const RnnProblem&, const RnnForward<T>&);
  void (*backward)(const RnnProblem&, const RnnBackward<T>&);
  void (*direct)(const RnnProblem&, const RnnDirect<T>&) = nullptr;  // not by pairs
};

template <class S>
struct AttentionKernels {
  size_t (*forward)(const Attention<S>&);
  size_t (*backward)(const Attention<S>&);
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;  // of the instruction set
  RecurrentKernels<float> rnn_f32;
  RecurrentKernels<double> rnn_f64;
  RowKernels rows;
  LossKernels<float> loss_f32;
  LossKernels<double> loss_f64;
  LossKernels<Bf16> loss_bf16;
  size_t (*product_workspace)(const Product&, size_t);
  void (*product)(const Product&, size_t);
  void (*few_rows)(const FewRows&, size_t);
  AttentionKernels<float> attention_f32;
  AttentionKernels<double> attention_f64;
  AttentionKernels<Bf16> attention_bf16;
  // Null where the CPU lacks byte products (VNNI).
  size_t (*quantized_linear_workspace)(const QuantizedLinear&) = nullptr;
  void (*quantized_linear)(const QuantizedLinear&) = nullptr;
  size_t (*product_pairs_workspace)(const Product&) = nullptr;  // null where tiles do not multiply
  void (*product_pairs)(const Product&, size_t) = nullptr;
  // What multiplies pairs of bfloat16, and its kernels; null where nothing does.
  const char* pairs = nullptr;
  RecurrentKernels<Bf16> rnn_bf16 = {};
  RecurrentKernels<float> rnn_reduced = {};      // float32 from this precision down: three products lose to
  Precision reduced_from = Precision::medium;    // float32's own vectors where they run at half the speed
};

// Chosen when Python loads the module.
extern Kernels kernels;

Kernels choose_kernels();

// Return whose speed a rule of `loses` knows, where AVX-512 is in use: two CPUs with one instruction set differ in what
// torch's libraries make of them (MKL runs AVX2 code on AMD). Elsewhere the instruction set alone.
std::string cpu_of(const Kernels& kernels);

// Features newer than the names that all compilers know for __builtin_cpu_supports.
struct Features {
  bool avx512_bf16 = false, avx512_fp16 = false, amx_bf16 = false, amx_int8 = false;

  Features();
};

}  // namespace fastlm
