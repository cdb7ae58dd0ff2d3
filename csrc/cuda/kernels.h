// The kernels that exist: for each number format those of all tiles, a source file each, so that they compile in
// parallel.
#pragma once

#include <utility>

#include "backward.h"
#include "cluster.h"
#include "forward.h"
#include "plane.h"

namespace fastlm::cuda {

template <class A>
using Kernel = void (*)(A);

template <class Team, class A>
__global__ void __launch_bounds__(Team::kBlock, 1) kernel(const __grid_constant__ A a) {
  FASTLM_DYNAMIC_SHARED(shared);
  if constexpr (kClusters || !Team::kCluster) {
    Team team(a.task, A::kBackward ? gates_of(a.task.cell) : 1, shared);
    load_weights(a, team);
    for (int group = team.team; group < a.task.plan.groups;
         group += a.task.plan.teams * Team::kAbreast) {
      team.take(group);
      run_group(a, team);
    }
  }
}

struct Kernels {
  Kernel<Forward> forward;
  Kernel<Backward> backward;
};

// Of the plan's tiles.
Kernels kernels_f32(const Plan&);
Kernels kernels_f64(const Plan&);
Kernels kernels_tf32(const Plan&);
Kernels kernels_bf16(const Plan&);
Kernels kernels_fp16(const Plan&);

template <template <class, int, int> class Product, class T, int m, int n>
void take_grid(const Plan& plan, Kernels& found) {
  using P = Product<T, m, n>;
  if (plan.m_tiles != m || plan.n_tiles != n) return;
  if constexpr (tiles_exist(P::kTensorCore, false, m, n)) {
    found.forward = kernel<Team<P, false>, Forward>;
    if constexpr (sizeof(T) == 2)
      if (plan.held) found.forward = plan.abreast == 2 ? kernel<Team<HeldProduct<T, m, n, kHeld>, true, 2>, Forward>
                                                       : kernel<Team<HeldProduct<T, m, n, kHeld>, true>, Forward>;
  }
  if constexpr (tiles_exist(P::kTensorCore, true, m, n)) found.backward = kernel<Team<P, false>, Backward>;
}

template <class T, int m, int warps>
void take_cluster(const Plan& plan, Kernels& found) {
  if (plan.m_tiles == m && plan.warps == warps)
    found = {kernel<Gather<T, m, warps>, Forward>, kernel<Scatter<T, m, warps>, Backward>};
}

template <class T, int m, int n>
void take_plane(const Plan& plan, Kernels& found) {
  using P = std::conditional_t<m == kPlaneTiles[0], HeldProduct<T, m, n, 2>, TensorProduct<T, m, n>>;
  if (plan.m_tiles == m && plan.n_tiles == n) found.backward = kernel<Plane<P>, Backward>;
}

template <template <class, int, int> class Product, class T, int... i>
void choose_grid(const Plan& plan, Kernels& found, std::integer_sequence<int, i...>) {
  (take_grid<Product, T, kTiles[i / 3], kTiles[i % 3]>(plan, found), ...);
}

template <template <class, int, int> class Product, class T>
Kernels choose(const Plan& plan) {
  Kernels found{};
  if (plan.exchange == Exchange::grid) choose_grid<Product, T>(plan, found, std::make_integer_sequence<int, 9>());
  if constexpr (sizeof(T) == 2) {
    if (plan.exchange == Exchange::cluster) {
      take_cluster<T, 16, kWarps / 2>(plan, found);
      take_cluster<T, 16, kWarps>(plan, found);
      take_cluster<T, 32, kWarps>(plan, found);
    }
    if (plan.exchange == Exchange::plane) {
      take_plane<T, kPlaneTiles[0], 1>(plan, found);
      take_plane<T, kPlaneTiles[0], 2>(plan, found);
      take_plane<T, kPlaneTiles[1], 1>(plan, found);
      take_plane<T, kPlaneTiles[1], 2>(plan, found);
    }
  }
  return found;
}

}  // namespace fastlm::cuda
