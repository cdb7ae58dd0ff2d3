// What the recurrent kernels need of the hardware beyond C++: number formats, matrix products of a warp, flags between
// blocks, clusters of blocks. Tests compile the kernels against an emulation of it (tests/cuda_emulation).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastlm::cuda {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

}  // namespace fastlm::cuda

#ifdef FASTLM_EMULATED
#include <emulated_device.h>
#else

#define FASTLM_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]

namespace fastlm::cuda {

__device__ inline float widen(Bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float widen(Fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

__device__ inline void narrow(float x, Bf16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ inline void narrow(float x, Fp16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// x rounded to the 11 bits that a TF32 product reads.
__device__ inline float round_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}

// c[16, 8] += a[16, 32 bytes] · b[32 bytes, 8], spread over a warp: PTX ISA, mma.m16n8k16 and (TF32) mma.m16n8k8.
#define FASTLM_MMA(T, shape, type)                                                                                   \
  __device__ inline void mma(T, float(&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,       \
                             uint32_t b1) {                                                                          \
    asm("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
        "{%0, %1, %2, %3};"                                                                                          \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                             \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                     \
  }
FASTLM_MMA(Bf16, "m16n8k16", "bf16")
FASTLM_MMA(Fp16, "m16n8k16", "f16")
FASTLM_MMA(float, "m16n8k8", "tf32")
#undef FASTLM_MMA

__device__ inline void sync_warp() { __syncwarp(); }

// What is stored by `publish`, then ordered by __syncthreads and a thread's `raise`, is seen by `load_published` of
// other blocks after their `flag` has returned the value.
template <class T>
__device__ inline void publish(T* place, T value) {
  *place = value;
}
__device__ inline uint4 load_published(const uint4* place) {  // not __ldcg, which the compiler may move past a flag
  uint4 x;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(place)
               : "memory");
  return x;
}
__device__ inline void raise(int* flag, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ inline int flag(const int* place) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(place) : "memory");
  return value;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif

// Stores into the shared memory of the cluster's block `rank`, at the place that `place` is in this block's. What is
// stored is seen by all threads of the cluster after all of them have arrived and they have waited.
template <class T>
__device__ inline void store_in_peer(T* place, int rank, T value) {
  uint32_t address;
  const uint32_t here = uint32_t(__cvta_generic_to_shared(place));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(here), "r"(rank));
  if constexpr (sizeof(T) == 2)
    asm volatile("st.shared::cluster.b16 [%0], %1;" ::"r"(address), "h"(value.bits) : "memory");
  else
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

}  // namespace fastlm::cuda
#endif

namespace fastlm::cuda {

// The type of sums, states and gate mathematics.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(double x, double& y) { y = x; }

template <class T>
__device__ inline T to(Wide<T> x) {
  T y;
  narrow(x, y);
  return y;
}

}  // namespace fastlm::cuda
