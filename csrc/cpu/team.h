// A parallel region whose threads meet at a barrier after each time step.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif
#include <sched.h>

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Waits by spinning, because a step takes microseconds, and after a millisecond gives the core to whoever else wants it.
// Not sooner: who yields to a busy process gets the core back milliseconds later, and the whole team waits for that at
// every step (benchmarks/LOG.md, 2026-11-24, one core busy).
constexpr int kSpins = 20000;

struct alignas(128) Barrier {
  int64_t arrived = 0;

  void wait(int64_t target) {
    __atomic_fetch_add(&arrived, 1, __ATOMIC_ACQ_REL);
    for (int spins = 0; __atomic_load_n(&arrived, __ATOMIC_ACQUIRE) < target; ++spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins >= kSpins) sched_yield();
    }
  }
};

struct Member {
  int index, count;
  Barrier& barrier;
  int64_t met = 0;

  void meet() { barrier.wait(++met * count); }
  // This member's share [begin, end) of n things.
  int64_t begin(int64_t n) const { return n * index / count; }
  int64_t end(int64_t n) const { return n * (index + 1) / count; }
};

// Numbers from 0 on, each for one of the members that take them: a share for whoever is free, because a core may be
// slower than the others.
class Queue {
  int64_t next_ = 0;

 public:
  int64_t take() { return __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED); }
};

template <class Body>
void parallel(int threads, const Body& body) {
  Barrier barrier;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      Member member{omp_get_thread_num(), omp_get_num_threads(), barrier};
      body(member);
    }
    return;
  }
#endif
  Member alone{0, 1, barrier};
  body(alone);
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
