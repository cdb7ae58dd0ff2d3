// Launches of the recurrent layer's passes: see plan.h for who owns what, team.h, cluster.h and plane.h for how
// the blocks work together.

#include "rnn.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "launch.h"

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

// Lets the kernel use all shared memory, whatever this plan takes: threads that launch other plans set the same.
template <class A>
void permit(const char* name, Kernel<A> kernel, bool cluster, int shared) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  check(name, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  if (cluster) check(name, cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

template <class A>
bool fits(const char* name, Kernel<A> kernel, const Plan& plan, const Chip& chip) {
  permit(name, kernel, plan.ranks, chip.shared);
  int found = 0;
  if (plan.ranks) {
    const Launch launch(plan.ranks, false, plan.blocks, plan.warps, plan.shared);
    check(name, cudaOccupancyMaxActiveClusters(&found, kernel, &launch.config));
    return found * plan.ranks >= (plan.exchange == Exchange::cluster ? 1 : plan.blocks);  // or each cluster by itself
  }
  check(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, kThreads, size_t(plan.shared)));
  return found * chip.multiprocessors >= plan.blocks;
}

template <class A>
void launch(const char* name, const RnnPass& pass, bool backward, Kernel<A> Kernels::*which, A& a, void* stream) {
  const Layer& l = pass.layer;
  const Plan found = plan(l, backward, pass.chip);
  if (!found.blocks) throw std::runtime_error(std::string(name) + ": the recurrent weights do not fit the GPU");
  const Kernel<A> kernel = kernels_of(l.number, found).*which;
  if (!fits(name, kernel, found, pass.chip))
    throw std::runtime_error(std::string(name) + ": the GPU cannot hold all blocks at a time");
  Task& task = a.task;
  task = Task{l.cell, l.batch, l.hidden, l.directions, int(pass.steps), pass.batch_sizes != nullptr, found,
              pass.workspace, {}};
  if (task.packed) {
    if (l.batch > kPackedSequences) throw std::runtime_error(std::string(name) + ": too many packed sequences");
    for (int64_t t = 0; t < pass.steps; ++t)
      for (int64_t b = 0; b < pass.batch_sizes[t]; ++b) task.lengths[b] = int(t) + 1;
  }
  const Launch how(found.ranks, found.exchange != Exchange::cluster, found.blocks, found.warps, found.shared, stream);
  if (found.workspace)
    check(name, cudaMemsetAsync(pass.workspace, 0xff, size_t(found.workspace * pass.steps), how.config.stream));
  check(name, cudaLaunchKernelEx(&how.config, kernel, a));
}

}  // namespace

void rnn_forward(const RnnPass& pass, const RnnForward* directions, void* stream) {
  Forward a{};
  std::copy_n(directions, pass.layer.directions, a.direction);
  launch("rnn_forward", pass, false, &Kernels::forward, a, stream);
}

void rnn_backward(const RnnPass& pass, const RnnBackward* directions, void* stream) {
  Backward a{};
  std::copy_n(directions, pass.layer.directions, a.direction);
  launch("rnn_backward", pass, true, &Kernels::backward, a, stream);
}

bool rnn_fits(const Layer& layer, bool backward, const Chip& chip) {
  const Plan found = plan(layer, backward, chip);
  if (!found.blocks) return false;
  const Kernels kernels = kernels_of(layer.number, found);
  return backward ? fits("rnn_backward", kernels.backward, found, chip)
                  : fits("rnn_forward", kernels.forward, found, chip);
}

int largest_cluster(int shared) {
  constexpr int kMost = 16;
  const Layer layer{Cell::lstm, Number::bf16, 1, kSpan * kMost, 1, Exchange::cluster};
  const Plan found = plan(layer, false, {kMost, shared, kMost, 0});
  if (!found.blocks) return 0;
  const Kernel<Forward> kernel = kernels_of(layer.number, found).forward;
  cudaFuncAttributes built{};
  check("largest_cluster", cudaFuncGetAttributes(&built, kernel));
  if (built.ptxVersion < 90) return 0;  // the code that runs here was written for older GPUs
  permit("largest_cluster", kernel, true, shared);
  const Launch launch(found.ranks, false, found.blocks, found.warps, found.shared);
  int blocks = 0;
  check("largest_cluster", cudaOccupancyMaxPotentialClusterSize(&blocks, kernel, &launch.config));
  return std::min(blocks, kMost);
}

int built_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace fastlm::cuda
