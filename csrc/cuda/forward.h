// The forward pass: h of the step before is published, gates are made of it.
#pragma once

#include "team.h"

namespace fastlm::cuda {

struct Forward {
  static constexpr bool kBackward = false;
  Task task;
  RnnForward direction[2];
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
__device__ void run_group(const Forward& a, Team& team) {
  using T = typename Team::T;
  using V = Wide<T>;
  // Pairs of the first turn, then those of the second.
  constexpr int kOfTurn = Team::template kPairs<Forward>, kPairs = Team::kAbreast * kOfTurn;
  const Task& task = a.task;
  const RnnForward& d = a.direction[team.direction];
  const Cell cell = task.cell;
  const int H = task.hidden, gates = gates_of(cell), steps = team.steps();
  const bool reverse = team.direction == 1;
  const int chunks = team.chunks();
  const auto lane = team.lane();
  V h[kPairs], c[kPairs], bias[kOfTurn];
  Pair pairs[kPairs];
  int place[kOfTurn];
  const T* x_at[kPairs];  // in row 0
  T* y_at[kPairs];
  int64_t at[kPairs];     // of gates, c and `before`
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const Pair& pair = pairs[p] = team.pair(p % kOfTurn, p / kOfTurn);
    if (!pair.owned) continue;
    const int64_t state = int64_t(pair.sequence) * H + pair.unit;
    h[p] = widen(static_cast<const T*>(d.h0)[state]);
    place[p % kOfTurn] = team.place(pair.column, pair.unit, 0);
    team.publish(0, p / kOfTurn, p % kOfTurn, place[p % kOfTurn], 0, h[p]);
    c[p] = cell == Cell::lstm ? widen(static_cast<const T*>(d.c0)[state]) : V(0);
    bias[p % kOfTurn] = d.b_hn ? widen(static_cast<const T*>(d.b_hn)[pair.unit]) : V(0);
    x_at[p] = static_cast<const T*>(d.x) + keep(pair.sequence * d.x_row + pair.unit);
    y_at[p] = static_cast<T*>(d.y) + keep(pair.sequence * d.y_row + pair.unit);
    at[p] = keep(state);
  }
  team.published_all(0);

  T read[kPairs][4];  // W x + b on its way: whatever touches it waits for it
  const auto read_step = [&](const Step& step, int turn) {
#pragma unroll
    for (int p = turn * kOfTurn; p < (turn + 1) * kOfTurn; ++p) {
      if (!pairs[p].owned || pairs[p].sequence >= step.alive) continue;
      const T* from = x_at[p] + step.row * d.x_row;
#pragma unroll
      for (int g = 0; g < 4; ++g)
        if (g < gates) read[p][g] = from[int64_t(g) * H];
      if (d.before) static_cast<T*>(d.before)[at[p] + step.row * H] = to<T>(h[p]);
    }
  };
  V x[kPairs][4];
  const auto store_step = [&](const Step& step, int turn) {
#pragma unroll
    for (int p = turn * kOfTurn; p < (turn + 1) * kOfTurn; ++p) {
      if (!pairs[p].owned || pairs[p].sequence >= step.alive) continue;
      y_at[p][step.row * d.y_row] = to<T>(h[p]);
      if (!d.gates) continue;
      const int64_t here = at[p] + step.row * H;
      static_cast<Four<T>*>(d.gates)[here] = {to<T>(x[p][0]), to<T>(x[p][1]), to<T>(x[p][2]), to<T>(x[p][3])};
      if (cell == Cell::lstm) static_cast<V*>(d.c)[here] = c[p];
    }
  };
  Step now(task, reverse ? steps - 1 : 0), done = now, next = now;
#pragma unroll
  for (int turn = 0; turn < Team::kAbreast; ++turn) read_step(now, turn);
  for (int i = 0; i < steps; ++i) {
    next.move(reverse ? now.t - 1 : now.t + 1);
#pragma unroll
    for (int turn = 0; turn < Team::kAbreast; ++turn) {
      team.template multiply<4>(i, turn, lane, chunks, [&] { if (i > 0) store_step(done, turn); });
#pragma unroll
      for (int p = turn * kOfTurn; p < (turn + 1) * kOfTurn; ++p) {
        const Pair& pair = pairs[p];
        if (!pair.owned) continue;
        if (pair.sequence < now.alive) {
          V sums[4];
#pragma unroll
          for (int g = 0; g < 4; ++g) {  // those of gates that there are not are not used
            sums[g] = team.sum(p % kOfTurn, pair, g);
            x[p][g] = g < gates ? widen(read[p][g]) : V(0);
          }
          forward_gates<Math<T>>(cell, x[p], sums, bias[p % kOfTurn], h[p], c[p]);
        }
        if (i + 1 < steps) team.publish(i + 1, turn, p % kOfTurn, place[p % kOfTurn], 0, h[p]);
      }
      team.published_all(i + 1);  // not only where something was: see Grid::put_all
      read_step(next, turn);
    }
    done = now;
    now = next;
  }
#pragma unroll
  for (int turn = 0; turn < Team::kAbreast; ++turn) store_step(done, turn);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const Pair& pair = pairs[p];
    if (!pair.owned) continue;
    const int64_t state = int64_t(pair.sequence) * H + pair.unit;
    static_cast<T*>(d.hn)[state] = to<T>(h[p]);
    if (cell == Cell::lstm) static_cast<T*>(d.cn)[state] = to<T>(c[p]);
  }
  team.finish();
}

template <class Team>
__device__ void load_weights(const Forward& a, const Team& team) {
  using P = typename Team::P;
  using T = typename Team::T;
  const Plan& plan = a.task.plan;
  const int H = a.task.hidden, lane = int(threadIdx.x) % 32, rows = plan.units * gates_of(a.task.cell);
  const T* w_hh = static_cast<const T*>(a.direction[team.direction].w_hh);
  for (int row = int(threadIdx.x) / 32; row < P::kRows; row += kWarps) {
    const int unit = team.unit(row % plan.units);
    const T* from = w_hh + (int64_t(row / plan.units) * H + unit) * H;
#pragma unroll 8
    for (int k = lane; k < plan.depth; k += 32)
      team.weights[P::place(row, k, plan.depth)] =
          row < rows && unit < H && k < H ? P::operand(from[k]) : to<T>(Wide<T>(0));
  }
}

}  // namespace fastlm::cuda
