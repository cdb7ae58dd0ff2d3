// The backward pass: gradients of the gates of the step after are published, dh is made of them.
#pragma once

#include "team.h"

namespace fastlm::cuda {

struct Backward {
  Task task;
  RnnBackward direction[2];
};

// What gates need of a step to hand dh on.
template <class V>
struct Kept {
  V gates[4], state, before, dy;  // LSTM: c; else h
};

// Out of dh: gradients of the pre-activations in k.gates, in the order of the recurrent product; what reaches the step
// before past the product, in dh, and in dc.
template <class M, class V>
__device__ void backward_gates(Cell cell, Kept<V>& k, V& dh, V& dc) {
  V(&g)[4] = k.gates;
  if (cell == Cell::lstm) {
    lstm_backward<M>(g[0], g[1], g[2], g[3], k.state, k.before, V(dh), dc);
    dh = 0;
  } else if (cell == Cell::gru) {
    gru_backward<M>(g[0], g[1], g[2], g[3], k.before, dh);
    const V n = g[2];
    g[2] = g[3];
    g[3] = n;
  } else {
    g[0] = cell == Cell::tanh ? dh * (1 - k.state * k.state) : k.state <= 0 ? 0 : dh;
    dh = 0;
  }
}

template <class T>
__device__ Kept<Wide<T>> read_kept(const Task& task, const RnnBackward& d, const Pair& pair, const Step& now,
                                   const Step& before) {
  const int H = task.hidden;
  const int64_t row = now.row + pair.sequence, before_row = before.row + pair.sequence;
  const int64_t state = int64_t(pair.sequence) * H + pair.unit;
  const bool begins = pair.sequence >= before.alive;
  Kept<Wide<T>> k{};
  k.dy = widen(static_cast<const T*>(d.dy)[row * d.y_row + pair.unit]);
  if (task.cell == Cell::lstm) {
    const Wide<T>* c = static_cast<const Wide<T>*>(d.c);
    k.state = c[row * H + pair.unit];
    k.before = begins ? widen(static_cast<const T*>(d.c0)[state]) : c[before_row * H + pair.unit];
  } else {
    const T* y = static_cast<const T*>(d.y) + pair.unit;
    if (task.cell == Cell::gru)
      k.before = widen(begins ? static_cast<const T*>(d.h0)[state] : y[before_row * d.y_row]);
    else
      k.state = widen(y[row * d.y_row]);
  }
  if (d.gates) {
    const T* from = static_cast<const T*>(d.gates) + row * 4 * H + pair.unit;
#pragma unroll
    for (int g = 0; g < 4; ++g) k.gates[g] = widen(from[int64_t(g) * H]);
  }
  return k;
}

template <class Team>
__device__ void backward_group(const Backward& a, const Team& team) {
  using T = typename Team::T;
  using V = Wide<T>;
  const Task& task = a.task;
  const RnnBackward& d = a.direction[team.direction];
  const Cell cell = task.cell;
  const int H = task.hidden, steps = team.steps(), against = team.direction == 1 ? 1 : -1;
  Kept<V> kept[kPairs];
  V dh[kPairs], dc[kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const Pair pair(team, p);
    if (!pair.owned) continue;
    const int64_t state = int64_t(pair.sequence) * H + pair.unit;
    dh[p] = widen(static_cast<const T*>(d.dhn)[state]);
    dc[p] = cell == Cell::lstm ? widen(static_cast<const T*>(d.dcn)[state]) : V(0);
  }
  Step now(task, against < 0 ? steps - 1 : 0);
  for (int i = 0; i < steps; ++i) {
    Step before = now;
    before.move(now.t + against);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {  // read ahead of the wait
      const Pair pair(team, p);
      if (pair.owned && pair.sequence < now.alive) kept[p] = read_kept<T>(task, d, pair, now, before);
    }
    if (i > 0) team.multiply(i - 1);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const Pair pair(team, p);
      if (!pair.owned) continue;
      if (i > 0) dh[p] += team.sum(pair.local, pair.column);
      if (pair.sequence < now.alive) {
        dh[p] += kept[p].dy;
        backward_gates<Math<T>>(cell, kept[p], dh[p], dc[p]);
      }
#pragma unroll
      for (int g = 0; g < 4; ++g)
        if (g < team.gates)
          team.publish_number(i, pair.column, pair.unit, g, pair.sequence < now.alive ? kept[p].gates[g] : V(0));
    }
    team.published_all(i);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const Pair pair(team, p);
      if (!pair.owned || pair.sequence >= now.alive) continue;
      T* to_row = static_cast<T*>(d.dgates) + (now.row + pair.sequence) * d.dgates_row + pair.unit;
      const int turn = cell == Cell::gru ? 1 : 0;  // n r z and U_n h + b_hn: r z n of U h begin one later
#pragma unroll
      for (int g = 0; g < 4; ++g)
        if (g < team.gates + turn) to_row[int64_t((g + turn) % 4) * H] = to<T>(kept[p].gates[g]);
    }
    now = before;
  }
  team.multiply(steps - 1);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const Pair pair(team, p);
    if (!pair.owned) continue;
    const int64_t state = int64_t(pair.sequence) * H + pair.unit;
    static_cast<T*>(d.dh0)[state] = to<T>(dh[p] + team.sum(pair.local, pair.column));
    if (cell == Cell::lstm) static_cast<T*>(d.dc0)[state] = to<T>(dc[p]);
  }
  __syncthreads();  // the sums are read before the next group's are written
}

template <class P, class X>
__device__ void backward_block(const Backward& a, uint4* shared) {
  using T = typename P::Number;
  const Plan& plan = a.task.plan;
  const int H = a.task.hidden, lane = int(threadIdx.x) % 32, gates = gates_of(a.task.cell);
  Team<P, X> team(a.task, gates, shared);
  const T* w_hh = static_cast<const T*>(a.direction[team.direction].w_hh);
#pragma unroll 8
  for (int k = int(threadIdx.x) / 32; k < plan.depth; k += kWarps) {
    const int unit = k / (kSpan * gates) * kSpan + k % kSpan, gate = k / kSpan % gates;
    for (int row = lane; row < P::kRows; row += 32)
      team.weights[P::place(row, k, plan.depth)] = row < plan.units && team.unit(row) < H && unit < H
          ? P::operand(w_hh[(int64_t(gate) * H + unit) * H + team.unit(row)]) : to<T>(Wide<T>(0));
  }
  for (int group = team.team; group < plan.groups; group += plan.teams) {
    team.take(group);
    backward_group(a, team);
  }
}

template <class P, class X>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ Backward a) {
  FASTLM_DYNAMIC_SHARED(shared);
  if constexpr (kClusters || !X::kCluster) backward_block<P, X>(a, shared);
}

}  // namespace fastlm::cuda
