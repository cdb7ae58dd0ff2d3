// Enough of the CUDA runtime to run the kernels of csrc/cuda on the host, for tests: no speed, but every thread.
//
// A block's threads are fibers of one operating system thread. They run one after the other from barrier to barrier,
// in an order that is drawn anew each time, and so do the blocks of a launch: a result that depends on an order that
// CUDA does not promise comes out wrong. A barrier that not all threads of a block reach is an error.
// FASTLM_EMULATED_BARRIERS=0 leaves the barriers out, to show that this is noticed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

#define CUDART_VERSION 13000

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Fiber {
  static constexpr size_t kStack = 128 << 10;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done;
};

inline std::mt19937 draw;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline unsigned current;
inline const std::function<void()>* body;
inline bool barriers = true;

inline std::vector<unsigned> shuffled(unsigned n) {
  std::vector<unsigned> order(n);
  for (unsigned i = 0; i < n; ++i) order[i] = i;
  for (unsigned i = n; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
  return order;
}

inline void run_thread() {
  (*body)();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

// Runs one block; false where some threads wait at a barrier that others never reach.
inline bool run_block(unsigned threads) {
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_thread, 0);
  }
  for (unsigned done = 0; done == 0;) {
    for (const unsigned i : shuffled(threads)) {
      current = i;
      threadIdx = dim3(i);
      swapcontext(&scheduler, &fibers[i].context);
      done += fibers[i].done;
    }
    if (done != 0 && done != threads) return false;
  }
  return true;
}

}  // namespace emulation

inline void __syncthreads() {
  using namespace emulation;
  if (barriers) swapcontext(&fibers[current].context, &scheduler);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const char* without = std::getenv("FASTLM_EMULATED_BARRIERS");
  emulation::barriers = !without || std::string(without) != "0";
  const std::function<void()> body = [&] { kernel(arguments...); };
  emulation::body = &body;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (gridDim.x == 0 || blockDim.x == 0 || blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  for (const unsigned block : emulation::shuffled(gridDim.x)) {
    blockIdx = dim3(block, 0, 0);
    if (!emulation::run_block(blockDim.x)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "not all threads reached a barrier" : "invalid configuration";
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
