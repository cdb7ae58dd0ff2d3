// How the panels of a step are shared: by the speed that each member of the team has shown, because a core may be
// slower than the others for long: a small one, or one whose other hyperthread is busy. Who makes a panel changes no number.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

#include "team.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int kMostPaced = 16;  // members; a larger team keeps equal shares
constexpr int kPeriod = 8;      // steps after which shares may change

// What the members tell each other: of the steps of a period the fastest, because one that the system interrupted says
// nothing; for periods in turn.
struct alignas(128) Paces {
  int64_t fastest[2][kMostPaced];
};

struct SteadyClock {
  static int64_t now() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
};

// Each member keeps a copy, and all are alike.
template <class Clock = SteadyClock>
class SharesOf {
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  Member& me_;
  Paces& paces_;
  const int64_t panels_;
  const bool paced_;
  int64_t edges_[kMostPaced + 1];  // member i makes the panels edges[i] ≤ panel < edges[i + 1]
  int64_t fastest_ = kNever, steps_ = 0, began_ = 0;

 public:
  SharesOf(Member& me, Paces& paces, int64_t panels)
      : me_(me), paces_(paces), panels_(panels), paced_(me.count > 1 && me.count <= kMostPaced && panels >= me.count) {
    for (int i = 0; paced_ && i <= me.count; ++i) edges_[i] = panels * i / me.count;
    if (paced_) began_ = Clock::now();
  }
  int members() const { return me_.count; }
  // This member's share [begin, end) of as many panels, or of others.
  int64_t begin(int64_t panels) const { return paced_ ? edges_[me_.index] * panels / panels_ : me_.begin(panels); }
  int64_t end(int64_t panels) const { return paced_ ? edges_[me_.index + 1] * panels / panels_ : me_.end(panels); }

  // The end of a step.
  void meet() {
    if (!paced_) return me_.meet();
    fastest_ = std::min(fastest_, Clock::now() - began_);
    const int64_t period = steps_ / kPeriod;
    const bool ends = ++steps_ % kPeriod == 0;
    int64_t* const all = paces_.fastest[period % 2];
    if (ends) all[me_.index] = fastest_;
    me_.meet();
    if (ends) {
      share(all);
      fastest_ = kNever;
    }
    began_ = Clock::now();
  }

 private:
  void share(const int64_t* times) {
    double speeds[kMostPaced], all = 0, slowest = 0;
    for (int i = 0; i < me_.count; ++i) {
      const double time = double(std::max<int64_t>(times[i], 1));
      speeds[i] = double(edges_[i + 1] - edges_[i]) / time;
      all += speeds[i];
      slowest = std::max(slowest, time);
    }
    int64_t next[kMostPaced + 1] = {};
    double before = 0, expected = 0;
    for (int i = 0; i < me_.count; ++i) {
      before += speeds[i];
      const int64_t left = me_.count - 1 - i;  // members, each of which keeps a panel: its speed would stay unknown
      const auto fair = int64_t(double(panels_) * before / all + 0.5);
      next[i + 1] = left ? std::clamp(fair, next[i] + 1, panels_ - left) : panels_;
      expected = std::max(expected, double(next[i + 1] - next[i]) / speeds[i]);
    }
    if (expected < 0.95 * slowest) std::copy(next, next + me_.count + 1, edges_);
  }
};

using Shares = SharesOf<>;

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
