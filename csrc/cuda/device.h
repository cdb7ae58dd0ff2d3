// What the recurrent kernels need of the hardware beyond C++: number formats, matrix products of a warp, memory that
// blocks share, clusters of blocks. Tests compile the kernels against an emulation of it (tests/cuda_emulation).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

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

// As the lower of two: the instruction that makes two is faster than the one that makes one.
__device__ inline void narrow(float x, Bf16& y) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(0.f), "f"(x));
  y.bits = uint16_t(two);
}
__device__ inline void narrow(float x, Fp16& y) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(0.f), "f"(x));
  y.bits = uint16_t(two);
}

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

// 2^x and 1/x with an error of two units in the last place; what is below the normal numbers is zero.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline void sync_warp() { __syncwarp(); }
// What the lane whose number differs in the bits of `other` holds.
__device__ inline uint32_t swap_lanes(uint32_t x, int other) { return __shfl_xor_sync(0xffffffff, x, other); }
__device__ inline float swap_lanes(float x, int other) { return __shfl_xor_sync(0xffffffff, x, other); }

__device__ inline uint64_t nanoseconds() {
  uint64_t x;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(x));
  return x;
}

// An offset that stays in registers, where the compiler would compute it again at each step.
__device__ inline int64_t keep(int64_t x) {
  asm("" : "+l"(x));
  return x;
}

// Stores that all blocks see at some time, each as a whole, in any order; and loads that see what is there. Nothing
// here orders other memory, so the compiler is not told to keep other loads where they are.
__device__ inline void store_shared_by_all(uint16_t* place, uint16_t x) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(place), "h"(x));
}
__device__ inline void store_shared_by_all(uint32_t* place, uint32_t x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(place), "r"(x));
}
__device__ inline void store_shared_by_all(uint64_t* place, uint64_t x) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(place), "l"(x));
}
template <class T>
__device__ inline uint4 load_shared_by_all(const uint4* place) {
  uint4 x;
  if constexpr (sizeof(T) == 8) {
    uint64_t low, high;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(place));
    x = {uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)};
  } else {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(place));
  }
  return x;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif
// Whether ptxas 13.0 keeps four sums of a warp beside 128 registers of weights: for compute capability 10.0 it spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kWide = false;
#else
constexpr bool kWide = true;
#endif

// What a block stores before it arrives is seen in its cluster after the wait.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// A barrier in shared memory that counts bytes. Its phase ends when as many have come as were expected, by one thread;
// `passed` then, of whether that of a parity has ended. Only shared memory is read after it, so its scope is the block:
// that of the cluster would drop the L1 cache each time.
__device__ inline uint32_t in_shared(const void* place) { return uint32_t(__cvta_generic_to_shared(place)); }
__device__ inline void start_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(in_shared(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(in_shared(barrier)), "r"(bytes)
               : "memory");
}
__device__ inline bool passed(const uint64_t* barrier, int parity) {
  uint32_t found;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(found)
      : "r"(in_shared(barrier)), "r"(parity)
      : "memory");
  return found;
}

// Shared memory of the cluster's block `rank` as this block sees it, from the place that `here` is in this one's.
struct Peer {
  uint32_t address;
  __device__ Peer(const void* here, int rank) {
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(in_shared(here)), "r"(rank));
  }
};
// Stores at `place` bytes from the peer's beginning and counts the bytes at its `barrier`. Nothing waits for it.
__device__ inline void send(Peer peer, int place, int barrier, uint4 x) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   peer.address + place),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(peer.address + barrier)
               : "memory");
}

}  // namespace fastlm::cuda
#endif

namespace fastlm::cuda {

template <int bytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};
template <>
struct BitsOf<8> {
  using type = uint64_t;
};

// A number is published where all bits were set before, a NaN that no other number is taken for: whoever loads it sees
// by the number itself whether it is there. One with just these bits is published as another NaN.
template <class T>
__device__ inline void publish(T* place, T value) {
  using Bits = typename BitsOf<sizeof(T)>::type;
  Bits bits;
  memcpy(&bits, &value, sizeof(T));
  constexpr Bits most = Bits(~Bits(0)) - 1;
  store_shared_by_all(reinterpret_cast<Bits*>(place), bits < most ? bits : most);
}

// Whether all numbers of x have been published.
template <class T>
__device__ inline bool complete(const uint4& x) {
  if constexpr (sizeof(T) == 8) return (x.x & x.y) != ~0u && (x.z & x.w) != ~0u;
  if constexpr (sizeof(T) == 4) return x.x != ~0u && x.y != ~0u && x.z != ~0u && x.w != ~0u;
  const auto missing = [](uint32_t two) { return (0xfffefffeu - two) & two & 0x80008000u; };  // a half of all ones
  return (missing(x.x) | missing(x.y) | missing(x.z) | missing(x.w)) == 0;
}

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

// The gates of a unit, as they lie in memory: one load or store.
template <class T>
struct alignas(sizeof(T) > 4 ? 16 : 4 * sizeof(T)) Four {
  T of[4];
};

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
