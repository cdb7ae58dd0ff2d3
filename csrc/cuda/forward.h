// The forward pass: h of the step before is published, gates are made of it.
#pragma once

#include "team.h"

namespace fastlm::cuda {

struct Forward {
  Task task;
  RnnForward direction[2];
  bool train;
};

// Out of W x + b in x, the recurrent sums, and the state before: gates in x, the next state in h and c.
template <class M, class V>
__device__ void forward_gates(Cell cell, V (&x)[4], const V (&sums)[4], V bias, V& h, V& c) {
  if (cell == Cell::lstm) {
    for (int g = 0; g < 4; ++g) x[g] += sums[g];
    lstm_forward<M>(x[0], x[1], x[2], x[3], V(c), c, h);
  } else if (cell == Cell::gru) {
    x[0] += sums[0];
    x[1] += sums[1];
    x[3] = sums[2] + bias;
    gru_forward<M>(x[0], x[1], x[2], x[3], V(h), h);
  } else {
    const V sum = x[0] + sums[0];
    h = cell == Cell::tanh ? M::tanh(sum) : sum < 0 ? 0 : sum;  // a NaN stays
  }
}

template <class Team>
__device__ void forward_group(const Forward& a, const Team& team) {
  using T = typename Team::T;
  using V = Wide<T>;
  const Task& task = a.task;
  const RnnForward& d = a.direction[team.direction];
  const Cell cell = task.cell;
  const int H = task.hidden, gates = gates_of(cell), steps = team.steps();
  const bool reverse = team.direction == 1;
  T* const all_gates = static_cast<T*>(d.gates);
  V x[kPairs][4], h[kPairs], c[kPairs], bias[kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const Pair pair(team, p);
    if (!pair.owned) continue;
    const int64_t state = int64_t(pair.sequence) * H + pair.unit;
    h[p] = widen(static_cast<const T*>(d.h0)[state]);
    c[p] = cell == Cell::lstm ? widen(static_cast<const T*>(d.c0)[state]) : V(0);
    bias[p] = d.b_hn ? widen(static_cast<const T*>(d.b_hn)[pair.unit]) : V(0);
    team.publish_number(0, pair.column, pair.unit, 0, h[p]);
  }
  team.published_all(0);
  Step now(task, reverse ? steps - 1 : 0);
  for (int i = 0; i < steps; ++i) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {  // read ahead of the wait
      const Pair pair(team, p);
      if (!pair.owned || pair.sequence >= now.alive) continue;
      const T* from = all_gates + (now.row + pair.sequence) * d.gates_row + pair.unit;
#pragma unroll
      for (int g = 0; g < 4; ++g) x[p][g] = g < gates ? widen(from[int64_t(g) * H]) : V(0);
    }
    team.multiply(i);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const Pair pair(team, p);
      if (!pair.owned) continue;
      if (pair.sequence < now.alive) {
        if (d.before) static_cast<T*>(d.before)[(now.row + pair.sequence) * H + pair.unit] = to<T>(h[p]);
        V sums[4];
#pragma unroll
        for (int g = 0; g < 4; ++g)
          sums[g] = g < gates ? team.sum(g * task.plan.units + pair.local, pair.column) : V(0);
        forward_gates<Math<T>>(cell, x[p], sums, bias[p], h[p], c[p]);
      }
      if (i + 1 < steps) team.publish_number(i + 1, pair.column, pair.unit, 0, h[p]);
    }
    if (i + 1 < steps) team.published_all(i + 1);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const Pair pair(team, p);
      if (!pair.owned || pair.sequence >= now.alive) continue;
      const int64_t row = now.row + pair.sequence;
      static_cast<T*>(d.y)[row * d.y_row + pair.unit] = to<T>(h[p]);
      if (!a.train || gates == 1) continue;
      T* keep = all_gates + row * d.gates_row + pair.unit;
#pragma unroll
      for (int g = 0; g < 4; ++g) keep[int64_t(g) * H] = to<T>(x[p][g]);
      if (cell == Cell::lstm) static_cast<V*>(d.c)[row * H + pair.unit] = c[p];
    }
    now.move(reverse ? now.t - 1 : now.t + 1);
  }
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const Pair pair(team, p);
    if (!pair.owned) continue;
    const int64_t state = int64_t(pair.sequence) * H + pair.unit;
    static_cast<T*>(d.hn)[state] = to<T>(h[p]);
    if (cell == Cell::lstm) static_cast<T*>(d.cn)[state] = to<T>(c[p]);
  }
  __syncthreads();  // the sums are read before the next group's are written
}

template <class P, class X>
__device__ void forward_block(const Forward& a, uint4* shared) {
  using T = typename P::Number;
  const Plan& plan = a.task.plan;
  const int H = a.task.hidden, lane = int(threadIdx.x) % 32, rows = plan.units * gates_of(a.task.cell);
  Team<P, X> team(a.task, 1, shared);
  const T* w_hh = static_cast<const T*>(a.direction[team.direction].w_hh);
  for (int row = int(threadIdx.x) / 32; row < P::kRows; row += kWarps) {
    const int unit = team.unit(row % plan.units);
    const T* from = w_hh + (int64_t(row / plan.units) * H + unit) * H;
#pragma unroll 8
    for (int k = lane; k < plan.depth; k += 32)
      team.weights[P::place(row, k, plan.depth)] =
          row < rows && unit < H && k < H ? P::operand(from[k]) : to<T>(Wide<T>(0));
  }
  for (int group = team.team; group < plan.groups; group += plan.teams) {
    team.take(group);
    forward_group(a, team);
  }
}

template <class P, class X>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Forward a) {
  FASTLM_DYNAMIC_SHARED(shared);
  if constexpr (kClusters || !X::kCluster) forward_block<P, X>(a, shared);
}

}  // namespace fastlm::cuda
