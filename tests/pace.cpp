// Members of known speeds share panels by csrc/cpu/pace.h: `pace PANELS COST...`, a member for each cost of a panel.
// Prints how many panels each one made in the first step and in the last, and ends with an error where a panel was not
// made exactly once in a step.
#define FASTLM_ISA generic
#include "pace.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

struct CountingClock {
  static thread_local int64_t time;
  static int64_t now() { return time; }
};
thread_local int64_t CountingClock::time = 0;

int main(int count, char** words) {
  using namespace fastlm::generic;
  constexpr int kSteps = 100;
  const int64_t panels = std::atoll(words[1]);
  const int members = count - 2;
  std::vector<int> made(size_t(kSteps) * panels);
  std::vector<int64_t> first(members), last(members);
  Paces paces;
  parallel(members, [&](Member& me) {
    SharesOf<CountingClock> shares(me, paces, panels);
    for (int step = 0; step < kSteps; ++step) {
      for (int64_t i = shares.begin(panels); i < shares.end(panels); ++i) {
        __atomic_fetch_add(&made[step * panels + i], 1, __ATOMIC_RELAXED);
        CountingClock::time += std::atoll(words[2 + me.index]);
      }
      if (step % 5 == 3) CountingClock::time += 1000000;  // the system interrupts
      (step ? last : first)[me.index] = shares.end(panels) - shares.begin(panels);
      shares.meet();
    }
  });
  for (const int n : made)
    if (n != 1) return 1;
  for (const auto* all : {&first, &last}) {
    for (const int64_t n : *all) std::printf("%d ", int(n));
    std::printf("\n");
  }
}
