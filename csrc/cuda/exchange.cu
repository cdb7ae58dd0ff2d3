// An exchange alone: see rnn.h.

#include <algorithm>

#include "device.h"
#include "launch.h"
#include "product.h"
#include "rnn.h"

namespace fastlm::cuda {
namespace {

constexpr int kAtOnce = 4;  // loads of a thread

// The part of block `slice` in `count` pieces.
FASTLM_INLINE int part_of(int slice, int count, int blocks) { return int(int64_t(slice) * count / blocks); }

__global__ void __launch_bounds__(kThreads, 1) through_l2(const __grid_constant__ ExchangeAlone a) {
  const int slice = int(blockIdx.x) % a.blocks, team = int(blockIdx.x) / a.blocks;
  const int pieces = divide_up(a.bytes, kLoad), thread = int(threadIdx.x);
  const int first = part_of(slice, pieces * 4, a.blocks), last = part_of(slice + 1, pieces * 4, a.blocks);
  uint4* const all = static_cast<uint4*>(a.workspace) + int64_t(team) * a.steps * pieces;
  uint64_t begin = 0;
  for (int s = 0; s < a.steps; ++s) {
    uint4* const now = all + int64_t(s) * pieces;
    for (int word = first + thread; word < last; word += kThreads)
      store_shared_by_all(reinterpret_cast<uint32_t*>(now) + word, uint32_t(s));
    for (int i = thread; i < pieces; i += kAtOnce * kThreads) {
      uint4 found[kAtOnce];
      for (uint32_t polls = 0;; ++polls) {
        bool complete = true;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          if (i + j * kThreads < pieces) found[j] = load_shared_by_all<float>(now + i + j * kThreads);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          if (i + j * kThreads < pieces) complete &= cuda::complete<float>(found[j]);
        if (complete) break;
        if (polls == kPatience) __trap();
      }
    }
    __syncthreads();
    if (s == 0) begin = nanoseconds();
  }
  if (blockIdx.x == 0 && thread == 0) *a.nanoseconds = nanoseconds() - begin;
}

__global__ void __launch_bounds__(kThreads, 1) through_cluster(const __grid_constant__ ExchangeAlone a) {
  FASTLM_DYNAMIC_SHARED(shared);
  if constexpr (kClusters) {
    const int slice = int(blockIdx.x) % a.blocks, pieces = divide_up(a.bytes, kLoad), thread = int(threadIdx.x);
    const int first = part_of(slice, pieces, a.blocks), mine = part_of(slice + 1, pieces, a.blocks) - first;
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared);
    if (thread == 0)
      for (int s = 0; s < 2; ++s) {
        start_barrier(barriers + s);
        expect(barriers + s, pieces * kLoad);
      }
    cluster_arrive();
    cluster_wait();
    uint64_t begin = 0;
    const bool sends = thread < mine * a.blocks;  // nobody would wait for another thread: see cluster.h
    for (int s = 0; s < a.steps && sends; ++s) {
      for (int i = thread; i < mine * a.blocks; i += kThreads) {
        const int peer = (slice + i / mine) % a.blocks;
        send(Peer(shared, peer), kBarriers + (s % 2 * pieces + first + i % mine) * kLoad, s % 2 * 8,
             {uint32_t(s), uint32_t(s), uint32_t(s), uint32_t(s)});
      }
      for (uint32_t polls = 0; !passed(barriers + s % 2, s / 2 % 2); ++polls)
        if (polls == kPatience) __trap();
      if (thread == 0) expect(barriers + s % 2, pieces * kLoad);
      if (s == 0) begin = nanoseconds();
    }
    if (a.steps > 0 && blockIdx.x == 0 && thread == 0) *a.nanoseconds = nanoseconds() - begin;
    cluster_arrive();
    cluster_wait();
  }
}

}  // namespace

void exchange_alone(const ExchangeAlone& a, void* stream) {
  const char* const name = "exchange_alone";
  if (a.cluster && a.bytes <= kLoad * (a.blocks - 1)) throw std::runtime_error(std::string(name) + ": too few bytes");
  const int64_t slot = int64_t(divide_up(a.bytes, kLoad)) * kLoad;
  const int shared = a.cluster ? int(kBarriers + 2 * slot) : 0;
  const auto kernel = a.cluster ? through_cluster : through_l2;
  const void* const function = reinterpret_cast<const void*>(kernel);
  check(name, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  if (a.cluster) check(name, cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  const Launch how(a.cluster ? a.blocks : 0, !a.cluster, a.blocks * a.teams, kWarps, shared, stream);
  if (!a.cluster)
    check(name, cudaMemsetAsync(a.workspace, 0xff, size_t(slot * a.steps * a.teams), how.config.stream));
  check(name, cudaLaunchKernelEx(&how.config, kernel, a));
}

int planes(int shared, void* stream) {
  const void* const function = reinterpret_cast<const void*>(through_cluster);
  const int alone = shared / 2 + 1;  // on a multiprocessor
  const Launch one(kPlane, false, kPlane, kWarps, alone);
  int found = 0;
  if (cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&found, through_cluster, &one.config) != cudaSuccess || !found) {
    cudaGetLastError();  // no planes then, and no error of the call that asked
    return 0;
  }
  const Launch all(kPlane, true, found * kPlane, kWarps, alone, stream);
  if (cudaLaunchKernelEx(&all.config, through_cluster, ExchangeAlone{true, kPlane, found, 0, 0, nullptr, nullptr}) ==
      cudaSuccess)
    return found;
  cudaGetLastError();
  return 0;
}

}  // namespace fastlm::cuda
