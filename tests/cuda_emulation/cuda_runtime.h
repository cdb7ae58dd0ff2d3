// Enough of the CUDA runtime to run the kernels of csrc/cuda on the host, for tests: no speed, but every thread.
//
// All threads of all blocks of a launch are fibers of one operating system thread. They run one after the other until
// they wait, in an order that is drawn anew each round, and half of the warps sleep for some rounds: a result that
// depends on an order that CUDA does not promise comes out wrong. A launch in which nothing moves any more fails.
// Shared memory begins as NaN.
// FASTLM_EMULATED_BARRIERS=0 leaves __syncthreads out, to show that this is noticed; see emulated_device.h for waits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

#define CUDART_VERSION 13000

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };

struct cudaFuncAttributes {
  int ptxVersion;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

#pragma GCC push_options
#pragma GCC optimize("O2")

namespace emulation {

constexpr int kSharedMemory = 227 << 10;  // of a block
constexpr unsigned kCluster = 16;         // blocks at most

// Goes on where the stack `to` was left; `from` is told how to come back. swapcontext would ask the system for the mask
// of signals, and the sanitizer would clear the whole stack's shadow: 40 % of the tests' time.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
      "mov %rsp, (%rdi); mov %rsi, %rsp\n"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

struct Fiber {
  static constexpr size_t kStack = 64 << 10;
  std::unique_ptr<char[]> stack;
  void* left;  // where the stack was left
  bool waits, done = false;
  long phase;  // of its cluster, that it waits for
};

struct Block {
  std::unique_ptr<char[]> shared;
  unsigned arrived = 0, done = 0;
};

struct Cluster {
  unsigned arrived = 0;
  long phase = 0;
};

inline std::minstd_rand draw;
inline void* scheduler;  // where its stack was left
inline std::vector<Fiber> fibers;
inline std::vector<unsigned> ready;  // fibers of the next round
inline std::vector<Block> blocks;
inline std::vector<Cluster> clusters;
inline std::vector<std::function<void()>> late;  // stores on their way to what all blocks see
inline unsigned current, threads, cluster_blocks;
inline const std::function<void()>* body;
inline bool barriers = true;
inline long moves;  // grows whenever something happens that a waiting thread may wait for

inline bool unless_zero(const char* name) {
  const char* value = std::getenv(name);
  return !value || std::string(value) != "0";
}

inline Block& block() { return blocks[current / threads]; }
inline Cluster& cluster() { return clusters[current / threads / cluster_blocks]; }
inline uint4* dynamic_shared() { return reinterpret_cast<uint4*>(block().shared.get()); }
inline void yield() { switch_stack(&fibers[current].left, scheduler); }
inline void wake(unsigned first, unsigned count) {
  for (unsigned i = first; i < first + count; ++i)
    if (fibers[i].waits) {
      fibers[i].waits = false;
      ready.push_back(i);
    }
  ++moves;
}

inline void run_thread() {
  (*body)();
  fibers[current].done = true;
  ++block().done;
  ++moves;
  yield();
}

// Lets about one of `few` late stores arrive, in an order that is drawn.
inline void arrive(unsigned few) {
  size_t left = 0;
  for (size_t i = 0; i < late.size(); ++i) {
    std::swap(late[i], late[i + draw() % (late.size() - i)]);
    if (draw() % few == 0) {
      late[i]();
      ++moves;
    } else {
      std::swap(late[left++], late[i]);
    }
  }
  late.resize(left);
}

// Runs all threads of the launch; false where nothing moves any more.
inline bool run(unsigned count) {
  if (fibers.size() < count) fibers.resize(count);
  ready.clear();
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.done) fiber.stack.reset(new char[Fiber::kStack]);  // or it was given up, with marks of the sanitizer
    fiber.done = fiber.waits = false;
    fiber.phase = 0;
    void** const top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber.stack.get()) + Fiber::kStack) & ~15);
    std::fill_n(top - 8, 8, nullptr);  // registers, and two places by which a function's stack is aligned
    top[-2] = reinterpret_cast<void*>(run_thread);
    fiber.left = top - 8;
    ready.push_back(i);
  }
  unsigned done = 0;
  std::vector<bool> sleeps(count / 32);
  // Half of the warps sleep for eight rounds: a thousand rounds in which nothing moves are no chance.
  for (int idle = 0, round = 0; !ready.empty() && idle < 1000; ++round) {
    if (round % 8 == 0)
      for (size_t warp = 0; warp < sleeps.size(); ++warp) sleeps[warp] = draw() % 2;
    const long before = moves;
    arrive(4);
    std::vector<unsigned> now;
    now.swap(ready);
    for (size_t i = now.size(); i > 1; --i) std::swap(now[i - 1], now[draw() % i]);
    for (const unsigned i : now) {
      if (sleeps[i / 32]) {
        ready.push_back(i);
        continue;
      }
      current = i;
      threadIdx = dim3(i % threads);
      blockIdx = dim3(i / threads);
      switch_stack(&scheduler, fibers[i].left);
      if (fibers[i].done)
        ++done;
      else if (!fibers[i].waits)
        ready.push_back(i);
    }
    idle = moves == before ? idle + 1 : 0;
  }
  arrive(1);
  return done == count;
}

}  // namespace emulation

[[noreturn]] inline void __trap() { throw std::runtime_error("trap"); }

inline void __syncthreads() {
  using namespace emulation;
  if (!barriers) return yield();
  if (++block().arrived == threads) {
    block().arrived = 0;
    wake(current / threads * threads, threads);
  } else {
    fibers[current].waits = true;
  }
  yield();
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  using namespace emulation;
  barriers = unless_zero("FASTLM_EMULATED_BARRIERS");
  const std::function<void()> call = [&] { kernel(arguments...); };
  body = &call;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  threads = blockDim.x;
  bool clustered = false, together = false;
  cluster_blocks = gridDim.x;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension) {
      clustered = true;
      cluster_blocks = a.val.clusterDim.x;
    } else {
      together = a.val.cooperative;
    }
  }
  if (gridDim.x == 0 || threads == 0 || threads > 1024 || config->dynamicSmemBytes > kSharedMemory ||
      (clustered ? cluster_blocks - 1 >= kCluster : !together) || gridDim.x % cluster_blocks)
    return cudaErrorInvalidConfiguration;
  late.clear();
  blocks.clear();
  blocks.resize(gridDim.x);
  clusters.clear();
  clusters.resize(clustered ? gridDim.x / cluster_blocks : 0);
  for (Block& b : blocks) {
    b.shared.reset(new char[config->dynamicSmemBytes]);
    std::memset(b.shared.get(), 0xff, config->dynamicSmemBytes);
  }
  return run(gridDim.x * threads) ? cudaSuccess : cudaErrorLaunchFailure;
}

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const int most = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize ? emulation::kSharedMemory : 1;
  return value <= most ? cudaSuccess : cudaErrorInvalidConfiguration;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* found, Kernel, const cudaLaunchConfig_t* config) {
  const unsigned blocks = config->attrs->val.clusterDim.x;
  *found = blocks <= emulation::kCluster ? int(config->gridDim.x / blocks) : 0;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, Kernel, const cudaLaunchConfig_t*) {
  *size = emulation::kCluster;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* place, int value, size_t bytes, cudaStream_t) {
  std::memset(place, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "threads wait for ever" : "invalid configuration";
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

#pragma GCC pop_options
