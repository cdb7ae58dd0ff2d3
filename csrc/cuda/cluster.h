// Teams of a cluster whose weights stay in registers: 16 bits, at most 512 units, no more than one barrier a step.
//
// A block of 4 or 8 warps owns 4 units a warp, warp w its units 4w to 4w + 3. Numbers go straight into the shared
// memory of the block that needs them, with a barrier there that counts their bytes: a step costs one way through the
// cluster, and nobody waits but for what it needs. Two slots are enough: who sends step s + 2 has received s + 1 of all
// warps that read its receiver's slot s. A warp that sent nothing would not be waited for, and find the barrier two
// phases on, as if its own had not ended.
//
// Forward (Gather), all blocks receive h of all units. A warp's four units with their gates are the 16 rows of one
// product over the whole depth, so that the gates of a pair come out in two lanes and the block needs no barrier.
// Backward (Scatter), a block multiplies the gradients of its own gates, which its warps share in shared memory, with
// the weights from all units to them, and sends each owner its part of dh: half the bytes of all gates' gradients.
//
// An operand of 8 sequences and 16 of the depth are 256 bytes: for each quarter of the depth, 4 numbers of each
// sequence. In the last two quarters, sequences are exchanged by fours: what a half warp reads hits all banks once.
#pragma once

#include "backward.h"
#include "forward.h"

namespace fastlm::cuda {

FASTLM_INLINE constexpr int operand_place(int quarter, int sequence) {
  return quarter * 64 + (sequence ^ (quarter & 2) << 1) * 8;
}

// A block of the cluster that takes group `group` of direction `direction`.
template <class T_, int m_, int warps_>
struct Cluster {
  using T = T_;
  static constexpr bool kCluster = true;
  static constexpr int kBlock = 32 * warps_, kUnits = 4 * warps_, kAbreast = 1;
  template <class A>
  static constexpr int kPairs = 1;
  const Task& task;
  int gates, direction, team, group, slice, warp, lane_, row, quarter;
  char* shared;
  uint32_t w[m_][4];  // of the products, in the order of the instruction's operand

  __device__ Cluster(const Task& task, uint4* shared)
      : task(task),
        gates(gates_of(task.cell)),
        direction(int(blockIdx.x) / task.plan.slices / task.plan.teams),
        team(int(blockIdx.x) / task.plan.slices % task.plan.teams),
        group(team),
        slice(int(blockIdx.x) % task.plan.slices),
        warp(int(threadIdx.x) / 32),
        lane_(int(threadIdx.x) % 32),
        row(lane_ / 4),
        quarter(lane_ % 4),
        shared(reinterpret_cast<char*>(shared)) {}

  __device__ void take(int) {}
  __device__ int lane() const { return lane_; }
  __device__ int chunks() const { return 0; }
  __device__ int place(int, int, int) const { return 0; }
  __device__ int unit(int local) const { return slice * kUnits + local; }
  __device__ int first(int = 0) const { return group * 8; }
  __device__ int sequences(int = 0) const { return min(task.batch - first(), 8); }
  __device__ int steps() const { return task.packed ? task.lengths[first()] : task.steps; }

 protected:
  __device__ uint64_t* barrier(int s) const { return reinterpret_cast<uint64_t*>(shared) + s % 2; }
  // Whether at least one of sequences 2q and 2q + 1 is there: what is sent goes two by two.
  __device__ bool sends(int q) const { return 2 * q < sequences(); }
  __device__ int sent_pairs() const { return divide_up(sequences(), 2); }

  __device__ void begin(int bytes) const {
    if (threadIdx.x == 0)
      for (int s = 0; s < 2; ++s) {
        start_barrier(barrier(s));
        expect(barrier(s), bytes);
      }
    cluster_arrive();
    cluster_wait();
  }
  // For what is sent of step s; then expects what will be sent of step s + 2 to the same place.
  __device__ void receive(int s, int bytes) const {
    for (uint32_t polls = 0; !passed(barrier(s), s / 2 % 2); ++polls)
      if (polls == kPatience) __trap();
    if (threadIdx.x == 0) expect(barrier(s), bytes);
  }
};

template <class T, int m, int warps>
struct Gather : Cluster<T, m, warps> {
  using Base = Cluster<T, m, warps>;
  static constexpr int kSlot = m * 256;  // bytes
  int all, bytes;                            // steps; of one, that a block receives
  uint32_t mine = 0;                         // h that is next to be sent
  float sums[4];                             // of the pair: its gates'

  __device__ Gather(const Task& task, int, uint4* shared)
      : Base(task, shared), all(this->steps()), bytes(task.plan.slices * warps * this->sent_pairs() * kLoad) {
    uint4* const slots = reinterpret_cast<uint4*>(this->shared + kBarriers);
    for (int i = int(threadIdx.x); i < 2 * kSlot / kLoad; i += Base::kBlock) slots[i] = {0, 0, 0, 0};
    this->begin(bytes);
  }

  __device__ Pair pair(int, int) const {
    return {*this, this->warp * 4 + this->row % 4, this->quarter * 2 + this->row / 4};
  }
  __device__ void publish(int, int, int, int, int, float value) {
    const T x = to<T>(value);
    mine = x.bits;
  }
  // Lanes of one quarter have the four units of two sequences: they put them together, and send them to a block each.
  __device__ void published_all(int s) const {
    if (s >= all) return;
    const int operand = this->slice * warps + this->warp, row = this->row, quarter = this->quarter;
    const uint32_t one = swap_lanes(mine, 4);
    const uint32_t two = row & 1 ? mine << 16 | one : one << 16 | mine, other = swap_lanes(two, 8);
    const uint32_t low = row & 2 ? other : two, high = row & 2 ? two : other;
    const uint32_t its_low = swap_lanes(low, 16), its_high = swap_lanes(high, 16);
    const uint4 x = row & 4 ? uint4{its_low, its_high, low, high} : uint4{low, high, its_low, its_high};
    if (!this->sends(quarter)) return;  // every warp sends, also of units that there are not: see above
    const int place = kBarriers + s % 2 * kSlot + operand / 4 * 256;
    const int in_operand = operand % 4 * 64 + (quarter ^ (operand & 2)) * kLoad;
    for (int peer = row; peer < this->task.plan.slices; peer += 8)
      send(Peer(this->shared, peer), place + in_operand, s % 2 * 8, x);
  }
  __device__ void finish() const {
    cluster_arrive();
    cluster_wait();
  }

  template <int, class Meanwhile>
  __device__ void multiply(int s, int, int, int, const Meanwhile& meanwhile) {
    meanwhile();
    this->receive(s, bytes);
    constexpr int kChains = kWide ? 8 : 2;  // products that do not wait for each other
    float c[kChains][4] = {};
    const char* from = this->shared + kBarriers + s % 2 * kSlot + operand_place(this->quarter, this->row);
#pragma unroll
    for (int k = 0; k < m; ++k) {
      const uint2 x = *reinterpret_cast<const uint2*>(from + k * 256);
      const uint32_t(&w)[4] = this->w[k];
      mma(T(), c[k % kChains], w[0], w[1], w[2], w[3], x.x, x.y);
    }
    // A lane of rows 0 to 3 has two gates of two sequences, the one 16 behind it the other two: each takes a sequence.
    const bool second = this->row >= 4;
    float (&x)[4] = c[0];
#pragma unroll
    for (int chain = 1; chain < kChains; ++chain)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] += c[chain][e];
    const float upper = swap_lanes(second ? x[0] : x[1], 16), lower = swap_lanes(second ? x[2] : x[3], 16);
    sums[0] = second ? upper : x[0];
    sums[1] = second ? lower : x[2];
    sums[2] = second ? x[1] : upper;
    sums[3] = second ? x[3] : lower;
  }
  __device__ float sum(int, const Pair&, int gate) const { return sums[gate]; }
};

template <class T, int m, int warps>
struct Scatter : Cluster<T, m, warps> {
  using Base = Cluster<T, m, warps>;
  static constexpr int kTargets = m / warps;  // of 16 units each, for which a warp multiplies
  static constexpr int kOfBlock = warps / 4;  // of the targets: a block's
  int slot, bytes, now = 0;                    // bytes of one, and that a block receives; what is read
  uint32_t mine[2] = {};                       // gradients of the pair's gates

  __device__ Scatter(const Task& task, int, uint4* shared)
      : Base(task, shared),
        slot(cluster_slot(true, warps, m, task.plan.slices)),
        bytes(task.plan.slices * kOfBlock * 8 * this->sent_pairs() * kLoad) {
    this->begin(bytes);
  }

  __device__ Pair pair(int, int) const {
    const int lane = this->lane_;
    return {*this, this->warp * 4 + lane / 16 * 2 + lane % 4 / 2, lane / 4 % 4 * 2 + lane % 2};
  }
  __device__ void publish(int, int, int, int, int gate, float value) {
    const uint32_t bits = to<T>(value).bits;
    uint32_t& two = mine[gate / 2];
    two = gate % 2 ? two | bits << 16 : bits;
  }
  // Into shared memory of this block, where `own` says.
  __device__ void published_all(int s) const {
    const int lane = this->lane_, unit = lane / 16 * 2 + lane % 4 / 2, sequence = lane / 4 % 4 * 2 + lane % 2;
    *reinterpret_cast<uint2*>(own(s) + this->warp * 256 + operand_place(unit, sequence)) = uint2{mine[0], mine[1]};
    __syncthreads();
  }

  template <int, class Meanwhile>
  __device__ void multiply(int s, int, int, int, const Meanwhile& meanwhile) {
    float c[kTargets][4] = {};
    const char* from = own(s) + operand_place(this->quarter, this->row);
#pragma unroll
    for (int k = 0; k < warps; ++k) {
      const uint2 x = *reinterpret_cast<const uint2*>(from + k * 256);
#pragma unroll
      for (int i = 0; i < kTargets; ++i) {
        const uint32_t(&w)[4] = this->w[i * warps + k];
        mma(T(), c[i], w[0], w[1], w[2], w[3], x.x, x.y);
      }
    }
#pragma unroll
    for (int i = 0; i < kTargets; ++i) {
      const int target = this->warp * kTargets + i;
      if (target / kOfBlock >= this->task.plan.slices) continue;
      const Peer peer(this->shared, target / kOfBlock);
      const int at = (this->slice * kOfBlock + target % kOfBlock) * 32 + this->lane_;
      const int place = kBarriers + s % 2 * slot + at * kLoad;
      if (this->sends(this->quarter)) {
        uint4 x;
        memcpy(&x, c[i], sizeof(x));
        send(peer, place, s % 2 * 8, x);
      }
    }
    meanwhile();
    this->receive(s, bytes);
    now = s;
  }
  __device__ float sum(int, const Pair&, int) const {
    const int in_slot = this->warp * 32 + this->lane_;
    const float* from = reinterpret_cast<const float*>(this->shared + kBarriers + now % 2 * slot) + in_slot;
    float total[2] = {};
#pragma unroll 4
    for (int i = 0; i < m / kOfBlock; i += 2) {
      if (i < this->task.plan.slices) total[0] += from[i * Base::kBlock];
      if (i + 1 < this->task.plan.slices) total[1] += from[(i + 1) * Base::kBlock];
    }
    return total[0] + total[1];
  }

 private:
  __device__ char* own(int s) const { return this->shared + kBarriers + 2 * slot + s % 2 * own_gates(warps); }
};

// Two numbers side by side, zero where they are not wanted.
template <class T>
__device__ uint32_t two_of(const T* from, bool first, bool second) {
  return uint32_t(first ? from[0].bits : 0) | uint32_t(second ? from[1].bits : 0) << 16;
}

template <class T, int m, int warps>
__device__ void load_weights(const Forward& a, Gather<T, m, warps>& team) {
  const int H = a.task.hidden;
  const T* w_hh = static_cast<const T*>(a.direction[team.direction].w_hh);
  const bool whole = H % 4 == 0 && reinterpret_cast<uintptr_t>(w_hh) % 8 == 0;
#pragma unroll
  for (int second = 0; second < 2; ++second) {  // rows r and r + 8
    const int gate = team.row / 4 * 2 + second, unit = team.unit(team.warp * 4 + team.row % 4);
    const bool wanted = gate < gates_of(a.task.cell) && unit < H;
    const T* from = w_hh + (int64_t(gate) * H + unit) * H + team.quarter * 4;
#pragma unroll
    for (int k = 0; k < m; ++k) {
      const int left = wanted ? H - (k * 16 + team.quarter * 4) : 0;
      uint2 x{0, 0};
      if (whole) {
        if (left > 0) x = *reinterpret_cast<const uint2*>(from + k * 16);
      } else {
        x = {two_of(from + k * 16, left > 0, left > 1), two_of(from + k * 16 + 2, left > 2, left > 3)};
      }
      team.w[k][second] = x.x;
      team.w[k][2 + second] = x.y;
    }
  }
}

// A lane's rows are the units 2r and 2r + 1 of 16, its part of the depth the four gates of one unit.
template <class T, int m, int warps>
__device__ void load_weights(const Backward& a, Scatter<T, m, warps>& team) {
  const int H = a.task.hidden;
  const T* w_hh = static_cast<const T*>(a.direction[team.direction].w_hh);
  const bool whole = H % 2 == 0 && reinterpret_cast<uintptr_t>(w_hh) % 4 == 0;
#pragma unroll
  for (int i = 0; i < m / warps; ++i) {
    const int left = H - ((team.warp * (m / warps) + i) * 16 + team.row * 2);
#pragma unroll
    for (int k = 0; k < warps; ++k) {
      const int unit = team.unit(k * 4 + team.quarter);
      uint32_t x[4];  // of a gate: both rows
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        const bool wanted = gate < team.gates && unit < H && left > 0;
        const T* from = w_hh + (int64_t(gate) * H + unit) * H + H - left;
        const bool second = wanted && left > 1;
        x[gate] = !whole ? two_of(from, wanted, second) : wanted ? *reinterpret_cast<const uint32_t*>(from) : 0;
      }
      uint32_t(&w)[4] = team.w[i * warps + k];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        w[half * 2] = (x[half * 2] & 0xffff) | x[half * 2 + 1] << 16;
        w[half * 2 + 1] = x[half * 2] >> 16 | (x[half * 2 + 1] & 0xffff0000);
      }
    }
  }
}

}  // namespace fastlm::cuda
