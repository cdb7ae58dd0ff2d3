// The backward pass: gradients of the gates of the step after are published, dh is made of them.
#pragma once

#include "team.h"

namespace fastlm::cuda {

struct Backward {
  static constexpr bool kBackward = true;
  Task task;
  RnnBackward direction[2];
};

// What gates need of a step to hand dh on, as it lies in memory: whatever touches it waits for it.
template <class T>
struct Read {
  Four<T> gates;
  T dy, h, h_before;      // of an LSTM, h_before is c0 where a sequence begins
  Wide<T> c, c_before;
  bool begins;
};

template <class V>
struct Kept {
  V gates[4], state, before;  // LSTM: c; else h
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
__device__ Kept<Wide<T>> kept_of(const Read<T>& read, Cell cell) {
  Kept<Wide<T>> k{};
  if (cell == Cell::lstm) {
    k.state = read.c;
    k.before = read.begins ? widen(read.h_before) : read.c_before;
  } else if (cell == Cell::gru) {
    k.before = widen(read.h_before);
  } else {
    k.state = widen(read.h);
    return k;
  }
#pragma unroll
  for (int g = 0; g < 4; ++g) k.gates[g] = widen(read.gates.of[g]);
  return k;
}

template <class Team>
__device__ void run_group(const Backward& a, Team& team) {
  using T = typename Team::T;
  using V = Wide<T>;
  constexpr int kPairs = Team::template kPairs<Backward>;
  const Task& task = a.task;
  const RnnBackward& d = a.direction[team.direction];
  const Cell cell = task.cell;
  const int H = task.hidden, steps = team.steps(), against = team.direction == 1 ? 1 : -1, chunks = team.chunks();
  const auto lane = team.lane();
  V dh[kPairs], dc[kPairs];
  Pair pairs[kPairs];
  int place[kPairs];
  const T *dy_at[kPairs], *y_at[kPairs];  // in row 0
  const Four<T>* gates_at[kPairs];
  const V* c_at[kPairs];
  T* dgates_at[kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const Pair& pair = pairs[p] = team.pair(p, 0);
    if (!pair.owned) continue;
    const int64_t state = int64_t(pair.sequence) * H + pair.unit, in_y = pair.sequence * d.y_row + pair.unit;
    dh[p] = widen(static_cast<const T*>(d.dhn)[state]);
    dc[p] = cell == Cell::lstm ? widen(static_cast<const T*>(d.dcn)[state]) : V(0);
    place[p] = team.place(pair.column, pair.unit, 0);
    dy_at[p] = static_cast<const T*>(d.dy) + keep(in_y);
    y_at[p] = static_cast<const T*>(d.y) + keep(in_y);
    dgates_at[p] = static_cast<T*>(d.dgates) + keep(pair.sequence * d.dgates_row + pair.unit);
    if (d.gates) gates_at[p] = static_cast<const Four<T>*>(d.gates) + keep(state);
    if (d.c) c_at[p] = static_cast<const V*>(d.c) + keep(state);
  }

  Read<T> read[kPairs], ahead[kPairs];  // of this step; of the next one, on its way
  // `after`: the step visited before `step`, whose c_before is c of this one.
  const auto read_ahead = [&](const Step& step, const Step& before, int after) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const Pair& pair = pairs[p];
      if (!pair.owned || pair.sequence >= step.alive) continue;
      const int64_t state = int64_t(pair.sequence) * H + pair.unit;
      Read<T>& r = ahead[p];
      r.begins = pair.sequence >= before.alive;
      r.dy = dy_at[p][step.row * d.y_row];
      if (cell == Cell::lstm) {
        r.c = pair.sequence < after ? read[p].c_before : c_at[p][step.row * H];
        if (r.begins)
          r.h_before = static_cast<const T*>(d.c0)[state];
        else
          r.c_before = c_at[p][before.row * H];
      } else if (cell == Cell::gru) {
        r.h_before = r.begins ? static_cast<const T*>(d.h0)[state] : y_at[p][before.row * d.y_row];
      } else {
        r.h = y_at[p][step.row * d.y_row];
      }
      if (d.gates) r.gates = gates_at[p][step.row * H];
    }
  };
  Kept<V> kept[kPairs];
  const auto store_step = [&](const Step& step) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      if (!pairs[p].owned || pairs[p].sequence >= step.alive) continue;
      T* to_row = dgates_at[p] + step.row * d.dgates_row;
      const int turn = cell == Cell::gru ? 1 : 0;  // n r z and U_n h + b_hn: r z n of U h begin one later
#pragma unroll
      for (int g = 0; g < 4; ++g)
        if (g < team.gates + turn) to_row[int64_t((g + turn) % 4) * H] = to<T>(kept[p].gates[g]);
    }
  };
  const auto take_ahead = [&] {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) read[p] = ahead[p];
  };
  Step now(task, against < 0 ? steps - 1 : 0), done = now, next = now;
  next.move(now.t + against);
  Step later = next;
  later.move(next.t + against);
  read_ahead(now, next, 0);
  take_ahead();
  read_ahead(next, later, now.alive);
  for (int i = 0;; ++i) {
    if (i > 0)
      team.template multiply<8>(i - 1, 0, lane, chunks, [&] {
        take_ahead();
        read_ahead(next, later, now.alive);
        store_step(done);
      });
    if (i == steps) break;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const Pair& pair = pairs[p];
      if (!pair.owned) continue;
      if (i > 0) dh[p] += team.sum(p, pair, 0);
      if (pair.sequence < now.alive) {
        dh[p] += widen(read[p].dy);
        kept[p] = kept_of(read[p], cell);
        backward_gates<Math<T>>(cell, kept[p], dh[p], dc[p]);
      }
#pragma unroll
      for (int g = 0; g < 4; ++g)
        if (g < team.gates)
          team.publish(i, 0, p, place[p], g, pair.sequence < now.alive ? kept[p].gates[g] : V(0));
    }
    team.published_all(i);
    done = now;
    now = next;
    next = later;
    later.move(later.t + against);
  }
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const Pair& pair = pairs[p];
    if (!pair.owned) continue;
    const int64_t state = int64_t(pair.sequence) * H + pair.unit;
    static_cast<T*>(d.dh0)[state] = to<T>(dh[p] + team.sum(p, pair, 0));
    if (cell == Cell::lstm) static_cast<T*>(d.dc0)[state] = to<T>(dc[p]);
  }
  __syncthreads();  // the sums are read before the next group's are written
}

template <class Team>
__device__ void load_weights(const Backward& a, const Team& team) {
  using P = typename Team::P;
  using T = typename Team::T;
  const Plan& plan = a.task.plan;
  const int H = a.task.hidden, lane = int(threadIdx.x) % 32, gates = team.gates;
  const T* w_hh = static_cast<const T*>(a.direction[team.direction].w_hh);
#pragma unroll 8
  for (int k = int(threadIdx.x) / 32; k < plan.depth; k += kWarps) {
    const int unit = k / (kSpan * gates) * kSpan + k % kSpan, gate = k / kSpan % gates;
    for (int row = lane; row < P::kRows; row += 32)
      team.weights[P::place(row, k, plan.depth)] = row < plan.units && team.unit(row) < H && unit < H
          ? P::operand(w_hh[(int64_t(gate) * H + unit) * H + team.unit(row)]) : to<T>(Wide<T>(0));
  }
}

}  // namespace fastlm::cuda
