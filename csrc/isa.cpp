#include "isa.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>

namespace fastlm {

#define FASTLM_DECLARE(isa) \
  FASTLM_DECLARE_RNN(isa) FASTLM_DECLARE_RNN_DIRECT(isa) FASTLM_DECLARE_ROWS(isa) FASTLM_DECLARE_LOSS(isa) \
  FASTLM_DECLARE_PRODUCT(isa) FASTLM_DECLARE_ATTENTION(isa)

FASTLM_DECLARE(generic)
FASTLM_DECLARE(avx2)
FASTLM_DECLARE(avx512)
FASTLM_DECLARE_QUANT(avx512)
FASTLM_DECLARE_QUANT(amx)
FASTLM_DECLARE_RNN_PAIRS(avx512_bf16)
FASTLM_DECLARE_RNN_PAIRS(amx)
FASTLM_DECLARE_PRODUCT_PAIRS(amx)

namespace {

#define FASTLM_LOSS_KERNELS(isa) \
  {isa::loss_read, isa::loss_gradient, isa::divergence_read, isa::divergence_gradient}

#define FASTLM_RNN_KERNELS(isa, direct) \
  {isa::rnn_workspace, isa::rnn_forward, isa::rnn_backward, direct}

#define FASTLM_ATTENTION_KERNELS(isa) {isa::attention_forward, isa::attention_backward}

#define FASTLM_KERNELS(isa) \
  Kernels{#isa, FASTLM_RNN_KERNELS(isa, isa::rnn_direct), FASTLM_RNN_KERNELS(isa, isa::rnn_direct), isa::row_kernels(), \
          FASTLM_LOSS_KERNELS(isa), FASTLM_LOSS_KERNELS(isa), FASTLM_LOSS_KERNELS(isa), \
          isa::product_workspace, isa::product, isa::few_rows, \
          FASTLM_ATTENTION_KERNELS(isa), FASTLM_ATTENTION_KERNELS(isa), FASTLM_ATTENTION_KERNELS(isa)}

#ifdef FASTLM_AMX
// Linux gives a process the tile registers only if it asks: Documentation/arch/x86/xstate.rst.
bool tiles_granted() {
#if defined(FASTLM_EMULATED)  // tests/amx_emulation
  return true;
#elif defined(__linux__) && defined(__x86_64__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  const Features cpu;
  return cpu.amx_bf16 && cpu.amx_int8 && cpu.avx512_bf16 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#ifdef FASTLM_AVX512_BF16
bool dots_granted() {
#if defined(FASTLM_EMULATED)
  return true;
#else
  return Features().avx512_bf16;
#endif
}
#endif

}  // namespace

Kernels kernels;

// Intel SDM, CPUID leaf 7.
Features::Features() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    avx512_fp16 = d >> 23 & 1;
    const bool tiles = d >> 24 & 1;
    amx_bf16 = tiles && (d >> 22 & 1);
    amx_int8 = tiles && (d >> 25 & 1);
  }
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512_bf16 = a >> 5 & 1;
#endif
}

Kernels choose_kernels() {
  const char* names[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};
  const char* cap = std::getenv("FASTLM_MAX_ISA");
  constexpr int widest = 4;
  int most = widest;
  if (cap && *cap) {
    for (most = 0; std::string(names[most]) != cap; ++most)
      if (most == widest)
        throw std::runtime_error("FASTLM_MAX_ISA must be generic, avx2, avx512, avx512_bf16 or amx, got " +
                                 std::string(cap));
  }
  Kernels found = FASTLM_KERNELS(generic);
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool vnni = __builtin_cpu_supports("avx512vnni");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef FASTLM_AVX2
  if (most >= 1 && avx2) found = FASTLM_KERNELS(avx2);
#endif
#ifdef FASTLM_AVX512
  if (most >= 2 && avx512) found = FASTLM_KERNELS(avx512);
  if (most >= 2 && avx512 && vnni) {
    found.quantized_linear_workspace = avx512::quantized_linear_workspace;
    found.quantized_linear = avx512::quantized_linear;
  }
#endif
  // Those of pairs stand beside the kernels of AVX-512.
#ifdef FASTLM_AVX512_BF16
  if (most >= 3 && avx512 && dots_granted()) {
    found.pairs = "avx512_bf16";
    found.rnn_bf16 = FASTLM_RNN_KERNELS(avx512_bf16, nullptr);
    found.rnn_reduced = FASTLM_RNN_KERNELS(avx512_bf16, nullptr);
  }
#endif
#ifdef FASTLM_AMX
  if (most >= 4 && avx512 && tiles_granted()) {
    found.pairs = "amx";
    found.rnn_bf16 = FASTLM_RNN_KERNELS(amx, nullptr);
    found.rnn_reduced = FASTLM_RNN_KERNELS(amx, nullptr);
    found.reduced_from = Precision::high;
    found.product_pairs_workspace = amx::product_pairs_workspace;
    found.product_pairs = amx::product_pairs;
    if (vnni) {
      found.quantized_linear_workspace = amx::quantized_linear_workspace;
      found.quantized_linear = amx::quantized_linear;
    }
  }
#endif
#endif
  return found;
}

// AMD APM 3, CPUID leaf 1.
std::string cpu_of(const Kernels& kernels) {
  const std::string isa = kernels.name;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0, none = 0;
  if (isa == "avx512" && __get_cpuid(0, &none, &b, &c, &d) && __get_cpuid(1, &a, &none, &none, &none)) {
    if (b == signature_INTEL_ebx) return "intel";
    const unsigned family = (a >> 8 & 15) + (a >> 20 & 255);  // the second counts where the first is 15
    if (b == signature_AMD_ebx && family == 0x1a) return "zen5";
    return "avx2";  // others with AVX-512, such as Zen 4: what won by a margin with AVX2 did so on both of those too
  }
#endif
  return isa;
}

}  // namespace fastlm
