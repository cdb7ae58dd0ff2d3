// csrc/cuda/device.h on the host. What is stored for all to see gets there some rounds later, as chance will have it,
// each number on its own: nothing orders two of them. So does what a thread sends into another block of its cluster.
// FASTLM_EMULATED_WAITS=0 waits neither for what is published nor for clusters.
#pragma once

#include <cmath>
#include <cstring>

#pragma GCC push_options
#pragma GCC optimize("O2")

#define FASTLM_DYNAMIC_SHARED(name) uint4* const name = emulation::dynamic_shared()

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }

namespace emulation {

template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// The lanes of a warp meet: the last one to come runs `together`, then all go on.
struct Lane {
  const void* argument;
  unsigned arrived = 0;
};
inline std::vector<Lane> lanes;
template <class Together>
void meet(const void* argument, const Together& together) {
  const unsigned first = current / 32 * 32;
  if (lanes.size() < fibers.size()) lanes.resize(fibers.size());
  lanes[current].argument = argument;
  if (++lanes[first].arrived == 32) {
    lanes[first].arrived = 0;
    together(&lanes[first]);
    wake(first, 32);
  } else {
    fibers[current].waits = true;
  }
  yield();
}

struct Operands {
  float* c;
  uint32_t a[4], b[2];
};

// PTX ISA, fragments of mma.m16n8k16 (16 bits) and mma.m16n8k8 (TF32): lane 4·r + q.
template <int in_register, class Widen>
void multiply(const Lane* lanes, const Widen& widen) {
  constexpr int depth = 8 * in_register;
  float a[16][depth], b[8][depth];
  const auto at = [&](int lane) -> const Operands& { return *static_cast<const Operands*>(lanes[lane].argument); };
  for (int lane = 0; lane < 32; ++lane)
    for (int half = 0; half < 2; ++half)
      for (int e = 0; e < in_register; ++e) {
        const int row = lane / 4, k = (half * 4 + lane % 4) * in_register + e;
        a[row][k] = widen(at(lane).a[half * 2], e);
        a[row + 8][k] = widen(at(lane).a[half * 2 + 1], e);
        b[row][k] = widen(at(lane).b[half], e);
      }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column)
      for (int k = 0; k < depth; ++k)
        at(row % 8 * 4 + column / 2).c[row / 8 * 2 + column % 2] += a[row][k] * b[column][k];
}

}  // namespace emulation

namespace fastlm::cuda {

inline float widen(Bf16 x) { return emulation::bits<float>(uint32_t(x.bits) << 16); }
inline float widen(Fp16 x) { return emulation::bits<_Float16>(x.bits); }
inline void narrow(float x, Fp16& y) { y.bits = emulation::bits<uint16_t>(_Float16(x)); }
inline void narrow(float x, Bf16& y) {
  const uint32_t from = emulation::bits<uint32_t>(x);
  y.bits = uint16_t(std::isnan(x) ? 0x7fff : (from + 0x7fff + (from >> 16 & 1)) >> 16);
}
inline float round_tf32(float x) {
  return emulation::bits<float>(std::isnan(x) ? 0x7fffffff : (emulation::bits<uint32_t>(x) + 0x1000) & ~0x1fffu);
}

template <class T>
void mma(T, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const emulation::Operands mine{c, {a0, a1, a2, a3}, {b0, b1}};
  emulation::meet(&mine, [](const emulation::Lane* lanes) {
    emulation::multiply<4 / sizeof(T)>(lanes, [](uint32_t x, int e) {
      if constexpr (sizeof(T) == 4)
        return emulation::bits<float>(x & ~0x1fffu);
      else
        return widen(T{uint16_t(x >> 16 * e)});
    });
  });
}

inline int64_t keep(int64_t x) { return x; }
inline uint64_t nanoseconds() { return 0; }

inline void sync_warp() {
  emulation::meet(nullptr, [](const emulation::Lane*) {});
}

template <class T>
T swap_lanes(T x, int other) {
  struct {
    T mine, theirs;
  } both{x, x};
  using Both = decltype(both);
  emulation::meet(&both, [=](const emulation::Lane* lanes) {
    const auto at = [&](int lane) { return static_cast<Both*>(const_cast<void*>(lanes[lane].argument)); };
    for (int lane = 0; lane < 32; ++lane) at(lane)->theirs = at(lane ^ other)->mine;
  });
  return both.theirs;
}

inline const bool waits_for_others = emulation::unless_zero("FASTLM_EMULATED_WAITS");
template <class Bits>
void store_shared_by_all(Bits* place, Bits x) {
  emulation::late.push_back([=] { *place = x; });
}
template <class T>
uint4 load_shared_by_all(const uint4* place) {
  emulation::yield();
  uint4 x = *place;
  if (!waits_for_others) {  // as if all were there
    uint32_t* words[] = {&x.x, &x.y, &x.z, &x.w};
    for (uint32_t* word : words)
      if (*word >> 16 == 0xffff || (*word & 0xffff) == 0xffff) *word = 0x7fc07fc0;
  }
  return x;
}

constexpr bool kClusters = true, kWide = true;

// A barrier's bytes that are still to come, whether one thread has to say how many, and its phases.
struct BytesBarrier {
  int32_t bytes;
  int16_t unsaid, phase;

  static BytesBarrier& at(void* place) { return *static_cast<BytesBarrier*>(place); }
  void end() {
    if (bytes || unsaid) return;
    unsaid = 1;
    phase ^= 1;
    ++emulation::moves;
  }
};
inline void start_barrier(uint64_t* barrier) { BytesBarrier::at(barrier) = {0, 1, 0}; }
inline void expect(uint64_t* barrier, int bytes) {
  BytesBarrier& b = BytesBarrier::at(barrier);
  if (b.unsaid != 1 && waits_for_others) std::abort();
  b.bytes += bytes;
  b.unsaid = 0;
  b.end();
}
inline bool passed(uint64_t* barrier, int parity) {
  emulation::yield();
  return !waits_for_others || BytesBarrier::at(barrier).phase != parity;
}
struct Peer {
  char* address;
  const emulation::Block* block;
  Peer(const void* here, int rank) {
    using namespace emulation;
    const unsigned own = current / threads, peer = own / cluster_blocks * cluster_blocks + unsigned(rank);
    if (unsigned(rank) >= cluster_blocks) std::abort();
    block = &blocks[peer];
    address = block->shared.get() + (static_cast<const char*>(here) - blocks[own].shared.get());
  }
};
inline void send(Peer peer, int place, int barrier, uint4 x) {
  emulation::late.push_back([=] {
    if (waits_for_others && peer.block->done == emulation::threads) std::abort();  // its shared memory is another's
    std::memcpy(peer.address + place, &x, sizeof(x));
    BytesBarrier& b = BytesBarrier::at(peer.address + barrier);
    b.bytes -= int32_t(sizeof(x));
    b.end();
  });
}
inline void cluster_arrive() {
  using namespace emulation;
  Cluster& all = cluster();
  fibers[current].phase = all.phase + 1;
  if (++all.arrived == threads * cluster_blocks) {
    all.arrived = 0;
    ++all.phase;
  }
  ++moves;
}
inline void cluster_wait() {
  do emulation::yield();
  while (waits_for_others && emulation::cluster().phase < emulation::fibers[emulation::current].phase);
}

}  // namespace fastlm::cuda

#pragma GCC pop_options
