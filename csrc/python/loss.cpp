// Losses: an argument of Python is a tuple with the fields of the struct of that name in csrc/loss.h.

#include "arguments.h"

namespace fastlm {
namespace {

LossTile tile_of(const py::tuple& a) {
  const LossTile tile{a[0].cast<int64_t>(), a[1].cast<int64_t>(), a[2].cast<int64_t>(), a[3].cast<int>()};
  if (tile.rows < 0 || tile.cols < 0 || tile.first < 0 || tile.threads < 1)
    throw std::invalid_argument("loss: sizes out of range");
  return tile;
}

template <class S>
Logits<S> logits_of(const py::tuple& a) {
  return {at(a, 0), a[1].cast<int64_t>(), at(a, 2), a[3].cast<double>(), a[4].cast<double>()};
}

template <class S>
Targets<S> targets_of(const py::tuple& a) {
  return {at(a, 0), at(a, 1), at(a, 2), a[3].cast<int64_t>(), a[4].cast<double>(), a[5].cast<double>()};
}

// Calls f(kernels, S()) for the storage of `number` bytes: 2 is bfloat16.
template <class F>
void for_storage(int number, const F& f) {
  if (number == 4) f(kernels.loss_f32, float());
  else if (number == 8) f(kernels.loss_f64, double());
  else if (number == 2) f(kernels.loss_bf16, Bf16());
  else throw std::invalid_argument("loss: numbers have 2, 4 or 8 bytes");
}

template <class Kernel, class Problem>
void run_loss(Kernel kernel, const LossTile& tile, const Problem& problem) {
  py::gil_scoped_release release;
  kernel(tile, problem);
}

}  // namespace

void define_loss(py::module_& m) {
  using py::tuple;
  m.def("loss_read",
        [](int number, const tuple& tile, const tuple& logits, const tuple& targets, uintptr_t sums, bool entropy) {
          for_storage(number, [&](const auto& k, auto s) {
            using S = decltype(s);
            run_loss(k.read, tile_of(tile),
                     LossRead<S>{logits_of<S>(logits), targets_of<S>(targets), pointer<Compute<S>>(sums), entropy});
          });
        },
        "Run LossRead.");
  m.def("loss_gradient",
        [](int number, const tuple& tile, const tuple& logits, const tuple& targets, uintptr_t rows,
           uintptr_t gradient, int64_t stride, bool add) {
          for_storage(number, [&](const auto& k, auto s) {
            using S = decltype(s);
            run_loss(k.gradient, tile_of(tile),
                     LossGradient<S>{logits_of<S>(logits), targets_of<S>(targets), pointer<const Compute<S>>(rows),
                                     pointer<S>(gradient), stride, add});
          });
        },
        "Run LossGradient.");
  m.def("divergence_read",
        [](int number, const tuple& tile, const tuple& student, const tuple& teacher, int kind, double beta,
           uintptr_t rows, uintptr_t divergence) {
          for_storage(number, [&](const auto& k, auto s) {
            using S = decltype(s);
            run_loss(k.divergence_read, tile_of(tile),
                     DivergenceRead<S>{logits_of<S>(student), logits_of<S>(teacher), Divergence(kind), beta,
                                       pointer<const Compute<S>>(rows), pointer<Compute<S>>(divergence)});
          });
        },
        "Run DivergenceRead.");
  m.def("divergence_gradient",
        [](int number, const tuple& tile, const tuple& student, const tuple& teacher, int kind, double beta,
           uintptr_t rows, uintptr_t divergence, uintptr_t factor, uintptr_t gradient, int64_t stride) {
          for_storage(number, [&](const auto& k, auto s) {
            using S = decltype(s);
            run_loss(k.divergence_gradient, tile_of(tile),
                     DivergenceGradient<S>{logits_of<S>(student), logits_of<S>(teacher), Divergence(kind), beta,
                                           pointer<const Compute<S>>(rows), pointer<const Compute<S>>(divergence),
                                           pointer<const Compute<S>>(factor), pointer<S>(gradient), stride});
          });
        },
        "Run DivergenceGradient.");
}

}  // namespace fastlm
