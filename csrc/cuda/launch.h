// Launches of blocks that wait for each other, and what CUDA says of them.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "plan.h"

namespace fastlm::cuda {

inline void check(const char* name, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string(name) + ": CUDA refused the launch: " + cudaGetErrorString(status));
}

// How blocks are launched: all that wait for each other are on the chip together, or CUDA refuses.
struct Launch {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};

  // `cluster`: blocks of one, or 0. `together`: all blocks of the launch wait for each other.
  Launch(int cluster, bool together, int blocks, int warps, int shared, void* stream = nullptr) {
    if (cluster) {
      cudaLaunchAttribute& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeClusterDimension;
      a.val.clusterDim.x = unsigned(cluster);
      a.val.clusterDim.y = a.val.clusterDim.z = 1;
    }
    if (together) {
      cudaLaunchAttribute& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeCooperative;
      a.val.cooperative = 1;
    }
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(32 * warps));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
  }
  Launch(const Launch&) = delete;
};

}  // namespace fastlm::cuda
