// Blocks that take a group of sequences through their steps together.
//
// At each step a warp waits for what it needs of the step before and multiplies; then the block's threads turn the sums
// into gates, publish what the team needs, say so, and only then store what the caller asked for. Two slots are enough:
// a block publishes step s after its warps have together waited for s - 1 of the whole team, so everybody is done with
// s - 2.
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
  int* flags;       // [directions][groups][slices], zero before, of a grid
  void* published;  // [directions][groups][2][sequences of a group][row], zero before, of a grid
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

// Two ways to exchange what is published s-th: `put` a number of it, say that this block's are there, wait for those of
// the slices first ≤ i < last, and `load` them. Slot s % 2 is where it lies.

// Through L2, between the blocks of a cooperative launch. A flag says how much its block has published; a warp waits for
// the blocks that it reads from and for no others.
template <class T>
struct Grid {
  static constexpr bool kCluster = false;
  T* published = nullptr;
  int* flags = nullptr;  // of the team
  int slot, slice;

  __device__ Grid(const Task&, void*, int slot, int slice) : slot(slot), slice(slice) {}
  __device__ void take(const Task& task, int group) {  // counted through all directions
    published = static_cast<T*>(task.published) + int64_t(group) * 2 * slot;
    flags = task.flags + group * task.plan.slices;
  }
  __device__ void put(int s, int at, T value) const { publish(published + s % 2 * slot + at, value); }
  __device__ void put_all(int s) const {
    __syncthreads();
    if (threadIdx.x == 0) raise(flags + slice, s + 1);
  }
  __device__ void wait(int s, int first, int last) const {
    for (int i = first + int(threadIdx.x) % 32; i < last; i += 32)
      while (flag(flags + i) <= s) {
      }
    sync_warp();
  }
  __device__ static uint4 load(const uint4* place) { return load_published(place); }
};

// Through shared memory, between the blocks of a cluster: each has all that is published, and one barrier orders it.
template <class T>
struct Cluster {
  static constexpr bool kCluster = true;
  T* published;
  int slot, slice, blocks;

  __device__ Cluster(const Task& task, void* shared, int slot, int slice)
      : published(static_cast<T*>(shared)), slot(slot), slice(slice), blocks(task.plan.slices) {
    for (int i = int(threadIdx.x); i < 2 * slot; i += kThreads) published[i] = to<T>(Wide<T>(0));
    cluster_arrive();
    cluster_wait();
  }
  __device__ void take(const Task&, int) {}
  __device__ void put(int s, int at, T value) const {
    for (int i = 0; i < blocks; ++i) {  // each begins with another, or all would write to one at a time
      const int peer = slice + i < blocks ? slice + i : slice + i - blocks;
      store_in_peer(published + s % 2 * slot + at, peer, value);
    }
  }
  __device__ void put_all(int) const { cluster_arrive(); }
  __device__ void wait(int, int, int) const { cluster_wait(); }
  __device__ static uint4 load(const uint4* place) { return *place; }
};

// A block in its team, on one group of sequences.
template <class P_, class X_>
struct Team {
  using P = P_;
  using X = X_;
  using T = typename P::Number;
  const Task& task;
  int gates;  // in a span of the depth
  int direction, team, slice, group = 0;
  int chunks, each, parts;  // of the depth: in all, of a warp, and how many warps have any
  T* weights;
  Wide<T>* part;
  X exchange;

  __device__ Team(const Task& task, int gates, uint4* shared)
      : task(task),
        gates(gates),
        direction(int(blockIdx.x) / task.plan.slices / task.plan.teams),
        team(int(blockIdx.x) / task.plan.slices % task.plan.teams),
        slice(int(blockIdx.x) % task.plan.slices),
        chunks(task.plan.depth * int(sizeof(T)) / kChunk),
        each(divide_up(chunks, kWarps)),
        parts(divide_up(chunks, each)),
        weights(reinterpret_cast<T*>(shared)),
        part(reinterpret_cast<Wide<T>*>(weights + P::place(P::kRows - 1, task.plan.depth - 1, task.plan.depth) + 1)),
        exchange(task, part_of(kWarps), P::kSequences * task.plan.row, slice) {}

  __device__ void take(int next) {
    group = next;
    exchange.take(task, direction * task.plan.groups + next);
  }
  __device__ int unit(int local) const { return slice * task.plan.units + local; }
  __device__ int first() const { return group * P::kSequences; }
  __device__ int sequences() const { return min(task.batch - first(), P::kSequences); }
  __device__ int steps() const { return task.packed ? task.lengths[first()] : task.steps; }  // of the longest

  __device__ void publish_number(int s, int sequence, int unit, int gate, Wide<T> value) const {
    const int k = (unit / kSpan * gates + gate) * kSpan + unit % kSpan;
    exchange.put(s, sequence * task.plan.row + k, P::operand(to<T>(value)));
  }
  __device__ void published_all(int s) const { exchange.put_all(s); }

  // Multiplies with what was published s-th; then sum() is what came out.
  __device__ void multiply(int s) const {
    const int warp = int(threadIdx.x) / 32, from = warp * each, until = min(chunks, from + each);
    wait(s, from, until);
    if (from < until)
      P::template multiply<X>(weights, exchange.published + s % 2 * exchange.slot, sequences(), task.plan, from, until,
                              part_of(warp));
    __syncthreads();
  }
  __device__ Wide<T> sum(int row, int sequence) const {
    Wide<T> total = 0;
    for (int i = 0; i < parts; ++i) total += part_of(i)[sequence * part_row(P::kRows / 16) + row];
    return total;
  }

 private:
  __device__ Wide<T>* part_of(int warp) const { return part + warp * P::kSequences * part_row(P::kRows / 16); }

  // The warp waits for the blocks whose units lie in the spans of these chunks.
  __device__ void wait(int s, int from, int until) const {
    const int span = kSpan * gates, numbers = kChunk / int(sizeof(T)), units = task.plan.units;
    const int begin = from * numbers / span * kSpan, end = min(task.hidden, divide_up(until * numbers, span) * kSpan);
    exchange.wait(s, begin / units, from < until ? divide_up(end, units) : 0);
  }
};

// A unit of a sequence: a thread owns up to kPairs of them through all steps.
struct Pair {
  int local, column;   // of the block's units; of the group's sequences
  int unit, sequence;  // of all
  bool owned;

  template <class Team>
  __device__ Pair(const Team& team, int p) {
    const int units = team.task.plan.units, index = int(threadIdx.x) + p * kThreads;
    local = index % units;
    column = index / units;
    unit = team.unit(local);
    sequence = team.first() + column;
    owned = column < team.sequences() && unit < team.task.hidden;
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
  __device__ static float sigmoid(float x) { return __fdividef(1, 1 + __expf(-x)); }
  __device__ static float tanh(float x) { return 1 - __fdividef(2, 1 + __expf(2 * x)); }
};

template <class T>
using Math = std::conditional_t<sizeof(T) == 2, Fast, Accurate>;

}  // namespace fastlm::cuda
