// Blocks that take a group of sequences through their steps together.
//
// At each step a warp waits for what it needs of the step before and multiplies; then the block's threads turn the sums
// into gates, publish what the team needs, and only then store what the caller asked for.
#pragma once

#include <type_traits>

#include "../gates.h"
#include "product.h"
#include "rnn.h"

namespace fastlm::cuda {

// What all blocks of a launch are told.
struct Task {
  Cell cell;
  int batch, hidden, directions, steps;
  bool packed;
  Plan plan;
  void* published;  // [directions][groups][steps][sequences of a group][row], all bits set before, of a grid
  int lengths[kPackedSequences];  // of packed sequences, the longest first
};

// A step t of the batch: its sequences b < alive lie in rows row + b. None is alive outside 0 ≤ t < T.
struct Step {
  const Task* all;
  int t, alive = 0;
  int64_t row = 0;

  __device__ Step(const Task& task, int t) : all(&task), t(t) {
    if (task.packed)
      for (int b = 0; b < task.batch; ++b) {
        alive += task.lengths[b] > t;
        row += task.lengths[b] < t ? task.lengths[b] : t;
      }
    else
      move(t);
  }

  __device__ void move(int to) {
    const Task& task = *all;
    const int before = alive;
    const bool up = to > t;
    t = to;
    if (!task.packed) {
      alive = t >= 0 && t < task.steps ? task.batch : 0;
      row = int64_t(t) * task.batch;
      return;
    }
    if (t < 0) {
      alive = 0;
      return;
    }
    if (up) {
      while (alive > 0 && task.lengths[alive - 1] <= t) --alive;
      row += before;
    } else {
      while (alive < task.batch && task.lengths[alive] > t) ++alive;
      row -= alive;
    }
  }
};

// Through L2, between the blocks of a cooperative launch. Every step has its place, and a number says by itself that it
// is there: a step costs one way to L2 and one back, without fences or flags. kSparing: see load().
template <class T, bool sparing>
struct Grid {
  static constexpr bool kSparing = sparing;
  T* published = nullptr;
  int slot;
  int64_t next;  // from a group's numbers to those of the group that the team takes after it

  __device__ Grid(const Task& task, int slot) : slot(slot), next(int64_t(task.plan.teams) * task.steps * slot) {}
  __device__ void take(const Task& task, int group) {  // counted through all directions
    published = static_cast<T*>(task.published) + keep(int64_t(group) * task.steps * slot);
  }
  __device__ T* at(int s, int turn = 0) const { return published + turn * next + int64_t(s) * slot; }
  __device__ void put(int s, int place, T value, int turn = 0) const { publish(at(s, turn) + place, value); }
  // The sums are read before the next step's are written. Not under a condition, even one that all threads share: ptxas
  // 13.0 joined it with the same one around `put`, let the threads of a warp meet again only behind both, and so they
  // came to the barrier apart: blocks waited for ever on an H200.
  __device__ void put_all() const { __syncthreads(); }
  __device__ static uint4 load(const uint4* place) { return load_shared_by_all<T>(place); }
  __device__ static bool complete(const uint4& x) { return cuda::complete<T>(x); }
};

// A unit of a sequence: a thread owns up to pairs_of them through all steps.
struct Pair {
  int local, column;   // of the block's units; of the group's sequences
  int unit, sequence;  // of all
  bool owned;

  Pair() = default;
  template <class Team>
  __device__ Pair(const Team& team, int local, int column, int turn = 0)
      : local(local),
        column(column),
        unit(team.unit(local)),
        sequence(team.first(turn) + column),
        owned(column < team.sequences(turn) && unit < team.task.hidden) {}
};

// A block in its team on a grid, on one group of sequences or, `abreast`, two: at each step one takes its turn after
// the other, and what it publishes is on its way meanwhile.
template <class P_, bool sparing, int abreast = 1>
struct Team {
  using P = P_;
  using T = typename P::Number;
  using X = Grid<T, sparing>;
  static constexpr bool kCluster = false;
  static constexpr int kBlock = kThreads, kAbreast = abreast;
  template <class A>
  static constexpr int kPairs = pairs_of(A::kBackward, P::kRows / 16, P::kSequences / 8);  // of a turn
  const Task& task;
  int gates;  // in a span of the depth
  int direction, team, slice, group = 0;
  T* weights;
  Wide<T>* part;  // a warp's sums, those of the next warp after them
  X exchange;

  __device__ Team(const Task& task, int gates, uint4* shared)
      : task(task),
        gates(gates),
        direction(int(blockIdx.x) / task.plan.slices / task.plan.teams),
        team(int(blockIdx.x) / task.plan.slices % task.plan.teams),
        slice(int(blockIdx.x) % task.plan.slices),
        weights(reinterpret_cast<T*>(shared)),
        part(reinterpret_cast<Wide<T>*>(weights + P::place(P::kRows - 1, task.plan.depth - 1, task.plan.depth) + 1)),
        exchange(task, P::kSequences * task.plan.row) {}

  __device__ void take(int next) {
    group = next;
    exchange.take(task, direction * task.plan.groups + next);
    if (task.hidden % kSpan)
      for (int turn = 0; turn < abreast; ++turn) publish_padding(turn);
    __syncthreads();  // the weights are there
  }
  // The warp's chunks of the depth, and where this thread begins.
  __device__ int first_chunk() const { return int(threadIdx.x) / 32 * divide_up(all_chunks(), kWarps); }
  __device__ int chunks() const { return min(all_chunks() - first_chunk(), divide_up(all_chunks(), kWarps)); }
  __device__ typename P::Lane lane() const {
    return {weights, part + int(threadIdx.x) / 32 * kPart, task.plan, first_chunk(), chunks()};
  }
  __device__ int unit(int local) const { return slice * task.plan.units + local; }
  __device__ int first(int turn = 0) const { return (group + turn * task.plan.teams) * P::kSequences; }
  __device__ int sequences(int turn = 0) const { return min(task.batch - first(turn), P::kSequences); }
  __device__ int steps() const { return task.packed ? task.lengths[first()] : task.steps; }  // of the longest

  // Where a number lies in what is published.
  __device__ int place(int sequence, int unit, int gate) const {
    return sequence * task.plan.row + (unit / kSpan * gates + gate) * kSpan + unit % kSpan;
  }
  __device__ Pair pair(int p, int turn) const {
    const int index = int(threadIdx.x) + p * kThreads;
    return {*this, index % task.plan.units, index / task.plan.units, turn};
  }
  __device__ void publish(int s, int turn, int, int place, int gate, Wide<T> value) const {
    exchange.put(s, place + gate * kSpan, P::operand(to<T>(value)), turn);
  }
  __device__ void published_all(int) const { exchange.put_all(); }
  __device__ void finish() const {}

  // Multiplies with what was published s-th, up to kChunks chunks at a time; then sum() of a pair and gate is what came
  // out. Runs `meanwhile` where the block would only wait.
  template <int kChunks, class Meanwhile>
  __device__ void multiply(int s, int turn, const typename P::Lane& lane, int chunks,
                           const Meanwhile& meanwhile) const {
    P::template multiply<X, kChunks>(lane, exchange.at(s, turn) + lane.published, sequences(turn), chunks, meanwhile);
    __syncthreads();
  }
  __device__ Wide<T> sum(int, const Pair& pair, int gate) const {
    const int row = min(gate, gates_of(task.cell) - 1) * task.plan.units + pair.local;
    Wide<T> total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total += part[i * kPart + pair.column * part_row(P::kRows / 16) + row];
    return total;
  }

 private:
  static constexpr int kPart = P::kSequences * part_row(P::kRows / 16);

  __device__ int all_chunks() const { return task.plan.depth * int(sizeof(T)) / kChunk; }

  // The depth from the last unit on is zero at all steps, of which the blocks of the team take some each.
  __device__ void publish_padding(int turn) const {
    const int count = kSpan - task.hidden % kSpan;
    for (int s = slice; s < steps(); s += task.plan.slices)
      for (int i = int(threadIdx.x); i < sequences(turn) * gates * count; i += kThreads)
        publish(s, turn, 0, place(i / count / gates, task.hidden + i % count, i / count % gates), 0, 0);
  }
};

struct Accurate {
  __device__ static float sigmoid(float x) { return 1 / (1 + expf(-x)); }
  __device__ static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
  __device__ static float tanh(float x) { return tanhf(x); }
  __device__ static double tanh(double x) { return ::tanh(x); }
};

// Absolute errors below 1e-6: for gates that are rounded to 16 bits.
struct Fast {
  static constexpr float kLog2E = 1.44269504f;
  __device__ static float sigmoid(float x) { return reciprocal_fast(1 + exp2_fast(-kLog2E * x)); }
  __device__ static float tanh(float x) { return 1 - 2 * reciprocal_fast(1 + exp2_fast(2 * kLog2E * x)); }
};

template <class T>
using Math = std::conditional_t<sizeof(T) == 2, Fast, Accurate>;

}  // namespace fastlm::cuda
