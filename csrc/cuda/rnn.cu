// Launches of the recurrent layer's passes: see plan.h for who owns what, team.h for how the blocks work together.

#include "rnn.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastlm::cuda {
namespace {

Kernels kernels_of(Number number, const Plan& plan) {
  switch (number) {
    case Number::f32: return kernels_f32(plan);
    case Number::f64: return kernels_f64(plan);
    case Number::tf32: return kernels_tf32(plan);
    case Number::bf16: return kernels_bf16(plan);
    case Number::fp16: return kernels_fp16(plan);
  }
  return {};
}

void check(const char* name, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string(name) + ": CUDA refused the launch: " + cudaGetErrorString(status));
}

template <class A>
int resident_blocks(const char* name, Kernel<A> kernel, const Plan& plan, const Chip& chip) {
  int blocks = 0;
  // The most that there is, not what this plan takes: threads that launch other plans set the same attribute.
  check(name, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   chip.shared));
  check(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, size_t(plan.shared)));
  return blocks * chip.multiprocessors;
}

template <class A>
void launch(const char* name, const RnnPass& pass, bool backward, Kernel<A> Kernels::*which, A& a, void* stream) {
  const Layer& l = pass.layer;
  const Plan found = plan(l, backward, pass.chip);
  if (!found.blocks) throw std::runtime_error(std::string(name) + ": the recurrent weights do not fit the GPU");
  const Kernel<A> kernel = kernels_of(l.number, found).*which;
  if (resident_blocks(name, kernel, found, pass.chip) < found.blocks)
    throw std::runtime_error(std::string(name) + ": the GPU cannot hold all blocks at a time");
  char* const workspace = static_cast<char*>(pass.workspace);
  Task& task = a.task;
  task = Task{l.cell, l.batch, l.hidden, l.directions, int(pass.steps), pass.batch_sizes != nullptr, found,
              reinterpret_cast<int*>(workspace), workspace + flag_bytes(l, found), {}};
  if (task.packed) {
    if (l.batch > kPackedSequences) throw std::runtime_error(std::string(name) + ": too many packed sequences");
    for (int64_t t = 0; t < pass.steps; ++t)
      for (int64_t b = 0; b < pass.batch_sizes[t]; ++b) task.lengths[b] = int(t) + 1;
  }
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(found.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(found.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &together;
  config.numAttrs = 1;
  check(name, cudaMemsetAsync(workspace, 0, size_t(found.workspace), config.stream));
  check(name, cudaLaunchKernelEx(&config, kernel, a));
}

}  // namespace

void rnn_forward(const RnnPass& pass, const RnnForward* directions, bool train, void* stream) {
  Forward a{};
  std::copy_n(directions, pass.layer.directions, a.direction);
  a.train = train;
  launch("rnn_forward", pass, false, &Kernels::forward, a, stream);
}

void rnn_backward(const RnnPass& pass, const RnnBackward* directions, void* stream) {
  Backward a{};
  std::copy_n(directions, pass.layer.directions, a.direction);
  launch("rnn_backward", pass, true, &Kernels::backward, a, stream);
}

int rnn_resident_blocks(const Layer& layer, bool backward, const Chip& chip) {
  const Plan found = plan(layer, backward, chip);
  if (!found.blocks) return 0;
  const Kernels kernels = kernels_of(layer.number, found);
  return backward ? resident_blocks("rnn_backward", kernels.backward, found, chip)
                  : resident_blocks("rnn_forward", kernels.forward, found, chip);
}

int built_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace fastlm::cuda
