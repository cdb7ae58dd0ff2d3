// Losses of rows of logits: what a loss reads of them, and the gradient that it sends back.
//
// A call takes a tile: `rows` rows and `cols` of a row's classes, starting at class `first`. A caller that holds all
// classes makes one call, one that makes logits piece by piece makes several, and the rows' numbers add up.
// All pointers belong to the caller; nothing is allocated. S is how logits are stored (float, double, Bf16), C is
// what is computed with (double for double, else float).
#pragma once

#include <cstdint>

#include "numbers.h"

namespace fastlm {

struct LossTile {
  int64_t rows, cols, first;
  int threads;  // use at most so many
};

// Logits u = scale · softcap(z + bias), with softcap(a) = c·tanh(a / c).
template <class S>
struct Logits {
  const S* z;              // [rows, cols], rows `stride` numbers apart
  int64_t stride;
  const Compute<S>* bias;  // [cols]; null: none
  double softcap;          // c; 0: none
  double scale;            // an inverse temperature
};

// Targets t = weight · (share · soft + even) + hit · (class = target).
template <class S>
struct Targets {
  const int64_t* target;     // [rows], classes, others match none; null: none
  const Compute<S>* weight;  // [cols] of each class; null: 1
  const S* soft;             // [rows, cols], rows `stride` numbers apart; null: 0
  int64_t stride;
  double share, even;        // both 0: there is nothing but the target
};

// Row numbers that loss_read brings up to date: highest u; Σ exp(u - highest); Σ exp(u - highest)·(u - highest), only
// with `entropy`; u of the target; Σ t·u and Σ t, both without the hit. They start as -∞, 0, 0, 0, 0, 0.
constexpr int kLossSums = 6;

template <class S>
struct LossRead {
  Logits<S> logits;
  Targets<S> targets;
  Compute<S>* sums;  // [rows, kLossSums]
  bool entropy;
};

// gradient = (up · exp(u - highest) / total - down · t - hit · (class = target)) · softcap'(z + bias), t without the hit
template <class S>
struct LossGradient {
  Logits<S> logits;
  Targets<S> targets;
  const Compute<S>* rows;  // [rows, 5]: highest, total, up, down, hit; where the last three are 0 the gradient is 0
  S* gradient;             // [rows, cols] out, rows `stride` numbers apart; may be the logits unless `add`
  int64_t stride;
  bool add;                // to what is there
};

enum class Divergence : int { forward_kl, reverse_kl, jsd };

// With p = softmax of the student's u and q = softmax of the teacher's: forward_kl (β = 1) is Σ q·log(q/p), reverse_kl
// (β = 0) Σ p·log(p/q), jsd β Σ q·log(q/m) + (1 - β) Σ p·log(p/m) with m = β·q + (1 - β)·p.
template <class S>
struct DivergenceRead {
  Logits<S> student, teacher;
  Divergence kind;
  double beta;
  const Compute<S>* rows;  // [rows, 4]: highest and log Σ exp(u - highest) of the student, then of the teacher
  Compute<S>* divergence;  // [rows, 2], added to: Σ q·log(q/·), then Σ p·log(p/·), where the kind has them
};

// gradient = factor · (gradient of the divergence for the student's u)
template <class S>
struct DivergenceGradient {
  Logits<S> student, teacher;
  Divergence kind;
  double beta;
  const Compute<S>* rows;        // as above
  const Compute<S>* divergence;  // [rows, 2]
  const Compute<S>* factor;      // [rows]; where it is 0 the gradient is 0
  S* gradient;                   // [rows, cols] out, rows `stride` numbers apart; may be either's logits
  int64_t stride;
};

#define FASTLM_DECLARE_LOSS_OF(S)                                      \
  void loss_read(const LossTile&, const LossRead<S>&);                 \
  void loss_gradient(const LossTile&, const LossGradient<S>&);         \
  void divergence_read(const LossTile&, const DivergenceRead<S>&);     \
  void divergence_gradient(const LossTile&, const DivergenceGradient<S>&);

#define FASTLM_DECLARE_LOSS(isa)   \
  namespace isa {                  \
  FASTLM_DECLARE_LOSS_OF(float)    \
  FASTLM_DECLARE_LOSS_OF(double)   \
  FASTLM_DECLARE_LOSS_OF(Bf16)     \
  }

}  // namespace fastlm
