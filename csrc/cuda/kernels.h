// The kernels that exist: for each number format those of all tiles, a source file each, so that they compile in
// parallel.
#pragma once

#include <utility>

#include "backward.h"
#include "forward.h"
#include "plane.h"
#include "resident.h"

namespace fastlm::cuda {

template <class A>
using Kernel = void (*)(A);

template <class Team, class A>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ A a) {
  FASTLM_DYNAMIC_SHARED(shared);
  if constexpr (kClusters || !Team::kCluster) {
    Team team(a.task, A::kBackward ? gates_of(a.task.cell) : 1, shared);
    load_weights(a, team);
    for (int group = team.team; group < a.task.plan.groups; group += a.task.plan.teams) {
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

template <template <class, int, int> class Product, class T, bool cluster, int m, int n, bool sparing = false>
void take(const Plan& plan, Kernels& found) {
  using P = Product<T, m, n>;
  using Ahead = std::conditional_t<sparing, HeldProduct<T, m, n, kHeld>, P>;
  using X = std::conditional_t<cluster, Cluster<T>, Grid<T, sparing>>;
  if (plan.cluster != cluster || plan.sparing != sparing || plan.m_tiles != m || plan.n_tiles != n) return;
  if constexpr (tiles_exist(P::kTensorCore, false, cluster, m, n) && (!sparing || held_exists(m, n)))
    found.forward = kernel<Team<Ahead, X>, Forward>;
  if constexpr (tiles_exist(P::kTensorCore, true, cluster, m, n)) found.backward = kernel<Team<P, X>, Backward>;
}

template <template <class, int, int> class Product, class T, int... i>
Kernels choose(const Plan& plan, std::integer_sequence<int, i...>) {
  Kernels found{};
  (take<Product, T, i / 16 == 1, kTiles[i / 4 % 4], kTiles[i % 4]>(plan, found), ...);
  if constexpr (sizeof(T) == 2)
    ((i < 16 ? take<Product, T, false, kTiles[i / 4 % 4], kTiles[i % 4], true>(plan, found) : void()), ...);
  return found;
}

// Those whose weights stay in registers: `m_tiles` products of a warp.
template <class T, int m, int n>
void take_resident(const Plan& plan, Kernels& found) {
  if (plan.m_tiles != m || plan.n_tiles != n) return;
  found.forward = kernel<Gather<T, m, n>, Forward>;
  if constexpr (resident_exists(true, m, n)) found.backward = kernel<Scatter<T, m, n>, Backward>;
}

template <class T, int m, int n>
void take_plane(const Plan& plan, Kernels& found) {
  using P = std::conditional_t<m == 4, HeldProduct<T, m, n, 2>, TensorProduct<T, m, n>>;
  if (plan.m_tiles != m || plan.n_tiles != n) return;
  if constexpr (plane_exists(false, m, n)) found.forward = kernel<Plane<P, kPlaneRanks[0], false>, Forward>;
  if constexpr (plane_exists(true, m, n)) found.backward = kernel<Plane<P, kPlaneRanks[1], true>, Backward>;
}

template <template <class, int, int> class Product, class T>
Kernels choose(const Plan& plan) {
  if constexpr (sizeof(T) == 2) {
    if (plan.resident) {
      Kernels found{};
      take_resident<T, 16, 1>(plan, found);
      take_resident<T, 16, 2>(plan, found);
      take_resident<T, 32, 1>(plan, found);
      take_resident<T, 32, 2>(plan, found);
      return found;
    }
    if (!plan.cluster && plan.ranks) {
      Kernels found{};
      take_plane<T, 4, 1>(plan, found);
      take_plane<T, 4, 2>(plan, found);
      take_plane<T, 4, 4>(plan, found);
      take_plane<T, 6, 1>(plan, found);
      take_plane<T, 6, 2>(plan, found);
      return found;
    }
  }
  return choose<Product, T>(plan, std::make_integer_sequence<int, 32>());
}

}  // namespace fastlm::cuda
