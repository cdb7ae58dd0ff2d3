// Teams of many clusters, backward, for layers whose weights need most of the chip: what is published goes through L2,
// as on a grid, sums through the shared memory of a cluster.
//
// The team's blocks are a plane: block (i, j) is the j-th of cluster i. Its weights are from the units of all blocks
// (·, j), a column, to those of all blocks (i, ·), its row. So it reads from L2 what its column alone published, makes
// sums for all units of its cluster, and sends each owner there its own, who adds them up. A block reads one part in
// kPlane of what it would on a grid; where that is most of a step, the way of the sums costs less.
//
// In the order of the product's rows, an owner's lie side by side.
#pragma once

#include "cluster.h"

namespace fastlm::cuda {

template <class P_>
struct Plane {
  using P = P_;
  using T = typename P::Number;
  static constexpr bool kCluster = true;
  static constexpr int kBlock = kThreads, kAbreast = 1;
  static constexpr int kOwned = P::kRows / kPlane;  // rows of an owner
  static constexpr int kPart = P::kSequences * part_row(P::kRows / 16), kSlot = P::kRows * P::kSequences;
  static constexpr int kGroups = kSlot / 4;  // of four rows of a sequence: what a thread adds up at a time
  template <class A>
  static constexpr int kPairs = divide_up(kOwned * P::kSequences, kThreads);
  const Task& task;
  int gates, direction, team, slice, rank, group = 0, received = 0;  // steps before this group's
  T* weights;
  float* part;
  float* slots;  // [2][kPlane][sequences][kOwned]
  uint64_t* barriers;
  Grid<T, true> exchange;

  __device__ Plane(const Task& task, int gates, uint4* shared)
      : task(task),
        gates(gates),
        direction(int(blockIdx.x) / task.plan.slices / task.plan.teams),
        team(int(blockIdx.x) / task.plan.slices % task.plan.teams),
        slice(int(blockIdx.x) % task.plan.slices),
        rank(slice % kPlane),
        weights(reinterpret_cast<T*>(shared) + kBarriers / sizeof(T)),
        part(reinterpret_cast<float*>(weights + P::place(P::kRows - 1, task.plan.depth - 1, task.plan.depth) + 1)),
        slots(part + kWarps * kPart),
        barriers(reinterpret_cast<uint64_t*>(shared)),
        exchange(task, kPlane * P::kSequences * task.plan.row) {
    if (threadIdx.x == 0)
      for (int s = 0; s < 2; ++s) {
        start_barrier(barriers + s);
        expect(barriers + s, kSlot * 4);
      }
    cluster_arrive();
    cluster_wait();
  }

  __device__ void take(int next) {
    if (next != team) received += steps();
    group = next;
    exchange.take(task, direction * task.plan.groups + next);
    publish_padding();
    __syncthreads();  // the weights are there
  }
  __device__ int first_chunk() const { return int(threadIdx.x) / 32 * divide_up(all_chunks(), kWarps); }
  __device__ int chunks() const { return min(all_chunks() - first_chunk(), divide_up(all_chunks(), kWarps)); }
  __device__ typename P::Lane lane() const {
    return {weights, part + int(threadIdx.x) / 32 * kPart, task.plan, first_chunk(), chunks()};
  }
  // Of this block, and of the block of a rank of this cluster, or of a cluster and this block's rank.
  __device__ int unit(int local) const { return slice * task.plan.units + local; }
  __device__ int unit_of_rank(int rank, int local) const { return unit(local) + (rank - this->rank) * task.plan.units; }
  __device__ int unit_of_column(int place) const {
    return (place / task.plan.units * kPlane + rank) * task.plan.units + place % task.plan.units;
  }
  __device__ int first(int = 0) const { return group * P::kSequences; }
  __device__ int sequences(int = 0) const { return min(task.batch - first(), P::kSequences); }
  __device__ int steps() const { return task.packed ? task.lengths[first()] : task.steps; }
  __device__ Pair pair(int p, int) const {
    const int index = int(threadIdx.x) + p * kThreads;
    return {*this, index % task.plan.units, index / task.plan.units};
  }

  // Where a number of this block lies in what is published.
  __device__ int place(int sequence, int unit, int gate) const {
    return column_place(sequence, slice / kPlane * task.plan.units + unit % task.plan.units, gate);
  }
  __device__ void publish(int s, int, int, int place, int gate, float value) const {
    exchange.put(s, place + gate * kSpan, to<T>(value));
  }
  __device__ void published_all(int) const {}
  __device__ void finish() const {}

  template <int kChunks, class Meanwhile>
  __device__ void multiply(int s, int, const typename P::Lane& lane, int chunks, const Meanwhile& meanwhile) const {
    P::template multiply<Grid<T, true>, kChunks>(
        lane, exchange.at(s) + rank * P::kSequences * task.plan.row + lane.published, sequences(), chunks, meanwhile);
    __syncthreads();
    const int slot = slot_of(s) * kSlot;
#pragma unroll
    for (int i = 0; i < divide_up(kGroups, kThreads); ++i) {
      const int four = int(threadIdx.x) + i * kThreads, row = four % (P::kRows / 4) * 4, column = four / (P::kRows / 4);
      if (four >= kGroups) continue;
      float total[4] = {};
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const uint4 x = *reinterpret_cast<const uint4*>(part + warp * kPart + column * part_row(P::kRows / 16) + row);
        float of_warp[4];
        memcpy(of_warp, &x, sizeof(x));
#pragma unroll
        for (int e = 0; e < 4; ++e) total[e] += of_warp[e];
      }
      uint4 x;
      memcpy(&x, total, sizeof(x));
      const int place = slot + (rank * P::kSequences + column) * kOwned + row % kOwned;
      const auto from_barriers = reinterpret_cast<char*>(slots + place) - reinterpret_cast<char*>(barriers);
      send(Peer(barriers, row / kOwned), int(from_barriers), slot_of(s) * 8, x);
    }
    __syncthreads();  // the sums are read before the next step's are written
    uint64_t* const barrier = barriers + slot_of(s);
    for (uint32_t polls = 0; !passed(barrier, (received + s) / 2 % 2); ++polls)
      if (polls == kPatience) __trap();
    if (threadIdx.x == 0) expect(barrier, kSlot * 4);
    now = s;
  }
  __device__ float sum(int, const Pair& pair, int) const {
    const float* from = slots + slot_of(now) * kSlot + pair.column * kOwned + pair.local;
    float total = 0;
#pragma unroll
    for (int i = 0; i < kPlane; ++i) total += from[i * P::kSequences * kOwned];
    return total;
  }

 private:
  mutable int now = 0;

  __device__ int slot_of(int s) const { return (received + s) % 2; }
  __device__ int all_chunks() const { return task.plan.depth * int(sizeof(T)) / kChunk; }
  __device__ int column_place(int sequence, int place, int gate) const {
    return (rank * P::kSequences + sequence) * task.plan.row + (place / kSpan * gates + gate) * kSpan + place % kSpan;
  }
  // The column's depth from the last unit on is zero at all steps, of which its blocks take some each.
  __device__ void publish_padding() const {
    const int clusters = task.plan.slices / kPlane, all = task.plan.depth / gates;
    int units = 0;  // of the column
    while (units < clusters * task.plan.units && unit_of_column(units) < task.hidden) ++units;
    const int count = all - units;
    if (count == 0) return;
    for (int s = slice / kPlane; s < steps(); s += clusters)
      for (int i = int(threadIdx.x); i < sequences() * gates * count; i += kThreads)
        publish(s, 0, 0, column_place(i / count / gates, units + i % count, i / count % gates), 0, 0);
  }
};

template <class P>
__device__ void load_weights(const Backward& a, const Plane<P>& team) {
  using T = typename P::Number;
  constexpr int kOwned = Plane<P>::kOwned;
  const Plan& plan = a.task.plan;
  const int H = a.task.hidden, lane = int(threadIdx.x) % 32, gates = team.gates;
  const T* w_hh = static_cast<const T*>(a.direction[team.direction].w_hh);
#pragma unroll 4
  for (int k = int(threadIdx.x) / 32; k < plan.depth; k += kWarps) {
    const int column = team.unit_of_column(k / (kSpan * gates) * kSpan + k % kSpan), gate = k / kSpan % gates;
    for (int row = lane; row < P::kRows; row += 32) {
      const int local = row % kOwned, unit = team.unit_of_rank(row / kOwned, local);
      team.weights[P::place(row, k, plan.depth)] = local < plan.units && unit < H && column < H
          ? w_hh[(int64_t(gate) * H + column) * H + unit] : to<T>(0);
    }
  }
}

}  // namespace fastlm::cuda
