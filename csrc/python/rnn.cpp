// Recurrent layers: csrc/rnn.h.

#include <array>
#include <type_traits>

#include "tensors.h"

namespace fastlm {
namespace {

// Calls f with the kernels for numbers of so many bytes.
template <class F>
auto with_kernels(const RnnProblem& p, size_t number, const F& f) {
  const bool reduced = kernels.pairs && p.precision >= kernels.reduced_from && p.batch > 1;
  if (number == sizeof(double)) return f(kernels.rnn_f64);
  if (number == sizeof(float)) return f(reduced ? kernels.rnn_reduced : kernels.rnn_f32);
  if (!kernels.pairs) throw std::invalid_argument("rnn: kernels for 16 bits need AVX512_BF16 or AMX");
  return f(kernels.rnn_bf16);
}

// From (cell, reverse, steps, batch, hidden, projection, inputs, batch_sizes, threads, precision, first, last).
RnnProblem problem(const py::tuple& numbers) {
  const Pack n("rnn", numbers, 12);
  const RnnProblem found{static_cast<Cell>(n.size(0)), n.size(1) != 0, n.size(2), n.size(3), n.size(4), n.size(5),
                         n.size(6), n[7], static_cast<int>(n.size(8)), static_cast<Precision>(n.size(9)), n.size(10),
                         n.size(11)};
  if (n.size(0) < 0 || n.size(0) > 3 || n.size(9) < 0 || n.size(9) > 2 || found.steps < 1 || found.batch < 0 ||
      found.hidden < 1 || found.projection < 0 || (found.projection && found.cell != Cell::lstm) || found.inputs < 0 ||
      found.threads < 1 || found.first < 0 || found.first >= found.last || found.last > found.steps)
    throw std::invalid_argument("rnn: sizes out of range");
  return found;
}

template <class T, class Kernel>
void forward(Kernel kernel, const RnnProblem& p, const py::tuple& addresses, int64_t ld, bool train) {
  const Pack a("rnn_forward", addresses, 14);
  const RnnForward<T> call{a[0], a[1], a[2], a[3],  a[4],  a[5],  a[6],  ld,
                           a[7], a[8], a[9], a[10], a[11], a[12], train, a[13]};
  py::gil_scoped_release release;
  kernel(p, call);
}

template <class T, class Kernel>
void backward(Kernel kernel, const RnnProblem& p, const py::tuple& addresses, int64_t ld_gates, int64_t ld) {
  const Pack a("rnn_backward", addresses, 15);
  const RnnBackward<T> call{a[0], a[1], a[2], ld_gates, a[3], a[4],  a[5],  a[6], a[7],
                            a[8], a[9], a[10], ld,      a[11], a[12], a[13], a[14]};
  py::gil_scoped_release release;
  kernel(p, call);
}

template <class T, class Kernel>
void direct(Kernel kernel, const RnnProblem& p, int weights, int64_t inputs, const py::tuple& addresses, int64_t ld,
            bool train) {
  const Pack a("rnn_direct", addresses, 12);
  if (weights < 0 || weights > 3 || inputs < 1) throw std::invalid_argument("rnn_direct: sizes out of range");
  const RnnDirect<T> call{static_cast<Stored>(weights), inputs, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7],
                          ld, a[8], a[9], a[10], a[11], train, false};
  py::gil_scoped_release release;
  kernel(p, call);
}

// What numbers of a dtype are, by Stored.
constexpr Dtype kStored[] = {kFloat32, kFloat64, kBfloat16, kFloat16};
constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};

// Where tensors lie, 0 for None, each checked for what a kernel takes for granted: dense, on the CPU, and of what `kinds`
// names, a letter for each: n numbers, s what carries a state, w weights, each a Stored.
py::tuple addresses(const py::tuple& tensors, const std::string& kinds, Stored number, Stored state, Stored weight) {
  if (kinds.size() != tensors.size()) throw std::invalid_argument("addresses: a kind for each tensor");
  py::tuple found(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const py::handle t = tensors[i];
    if (t.is_none()) {
      found[i] = py::int_(0);
      continue;
    }
    const int wanted = int(kinds[i] == 's' ? state : kinds[i] == 'w' ? weight : number);
    const DenseTensor of = Torch::get().read(t);
    if (!dense(of) || !(of.dtype == kStored[wanted]))
      throw std::runtime_error("a kernel needs contiguous " + std::string(kNames[wanted]) + " on the CPU, got " +
                               std::string(py::str(t.attr("dtype"))) + " of strides " +
                               std::string(py::str(t.attr("stride")())) + " on " + std::string(py::str(t.attr("device"))));
    found[i] = py::int_(at(of).value);
  }
  return found;
}

// One step of one layer without gradients, checks and results included, because a stream calls for every token and
// Python takes longer than the kernel: (y, hn) or (y, hn, cn), or None where the arguments are not what a kernel can
// take, for whatever reason. They come as the caller gave them: hx is a tensor or a sequence of them, params are w_ih,
// w_hh and, where `biased`, b_ih and b_hh. Where x is [B, I] and states are [B, H], as a cell has them, the results are
// (hn,) or (hn, cn) alike. Layers of fewer hidden units than `least`, of more sequences than `most`, and of float64
// unless `doubles`, are left to others.
py::object rnn_step(int cell, int64_t least, int64_t most, int threads, bool biased, bool batch_first, bool doubles,
                    py::handle x, py::handle hx, py::handle params) {
  if (cell < 0 || cell > 3 || threads < 1) throw std::invalid_argument("rnn_step: sizes out of range");
  const int states = cell == 0 ? 2 : 1, gates = cell == 0 ? 4 : cell == 1 ? 3 : 1;
  const auto listed = [](py::handle all, Py_ssize_t count) {
    return (PyTuple_Check(all.ptr()) || PyList_Check(all.ptr())) && PySequence_Fast_GET_SIZE(all.ptr()) == count;
  };
  const auto item = [](py::handle all, int i) { return py::handle(PySequence_Fast_GET_ITEM(all.ptr(), i)); };
  const bool alone = states == 1 && !listed(hx, 1);
  if (!(alone || listed(hx, states)) || !listed(params, biased ? 4 : 2)) return py::none();
  Tensors tensors;
  const DenseTensor of_x = tensors.read(x), of_w = tensors.read(item(params, 1));
  const bool bare = of_x.dimensions == 2;
  if (!tensors.fits || (!bare && (of_x.dimensions != 3 || of_x.shape[batch_first ? 1 : 0] != 1)) || of_w.dimensions != 2)
    return py::none();
  const Dtype dtype = of_x.dtype;
  const bool single = dtype == kFloat32;
  const int64_t batch = of_x.shape[!bare && !batch_first], inputs = of_x.shape[of_x.dimensions - 1];
  const int64_t rows = of_w.shape[0], hidden = of_w.shape[1];
  if (!(single || (doubles && dtype == kFloat64)) || !(of_w.dtype == dtype) || rows != gates * hidden || hidden < least || batch > most)
    return py::none();
  const auto state = [&](py::handle t) {
    return bare ? tensors.address(t, dtype, {batch, hidden}) : tensors.address(t, dtype, {1, batch, hidden});
  };
  Address from[7] = {at(of_x), tensors.address(item(params, 0), dtype, {rows, inputs}), at(of_w)};
  for (int i = 3; i < 5 && biased; ++i) from[i] = tensors.address(item(params, i - 1), dtype, {rows});
  for (int i = 0; i < states; ++i) from[5 + i] = state(alone ? hx : item(hx, i));
  if (!tensors.fits) return py::none();
  py::tuple results(states + !bare);
  Address to[3] = {};
  for (int i = bare; i <= states; ++i) {
    const py::object like = Torch::get().empty_like(alone ? hx : item(hx, i == 2));
    to[i] = state(like);
    results[i - bare] = like;
  }
  if (!tensors.fits) return py::none();
  if (bare) to[0] = to[1];  // which a kernel then writes twice
  const RnnProblem p{Cell(cell), false, 1, batch, hidden, 0, 0, nullptr, threads, Precision::highest, 0, 1};
  static bool back = false;  // the GIL guards it; either way gives the same numbers
  back = !back;
  const auto call = [&, against = back](const auto& kernel, auto zero, Stored stored) {
    using T = decltype(zero);
    const RnnDirect<T> a{stored,  inputs,  from[0], from[1], from[2], from[3], from[4], from[5],
                         from[6], nullptr, 0, to[0],   nullptr, to[1],   to[2],   false,   against};
    py::gil_scoped_release release;
    kernel.direct(p, a);
  };
  if (single)
    call(kernels.rnn_f32, 0.0f, Stored::f32);
  else
    call(kernels.rnn_f64, 0.0, Stored::f64);
  return results;
}

}  // namespace

void define_rnn(py::module_& m) {
  m.def("addresses",
        [](const py::tuple& tensors, const std::string& kinds, int number, int state, int weight) {
          for (const int stored : {number, state, weight})
            if (stored < 0 || stored > 3) throw std::invalid_argument("addresses: no such numbers");
          return addresses(tensors, kinds, Stored(number), Stored(state), Stored(weight));
        },
        "Return where tensors lie, 0 for None; raise where a kernel could not take one.");
  m.def("rnn_step", &rnn_step,
        "Run one step of one layer without gradients: RnnDirect with its results; None where a kernel cannot.");
  m.def("rnn_workspace",
        [](const py::tuple& sizes, bool backward, size_t number) {
          const RnnProblem p = problem(sizes);
          return with_kernels(p, number, [&](const auto& k) { return k.workspace(p, backward, number); });
        },
        "Return the bytes of workspace that a call needs.");
  m.def("rnn_forward",
        [](const py::tuple& sizes, size_t number, int64_t ld, bool train, const py::tuple& addresses) {
          const RnnProblem p = problem(sizes);
          with_kernels(p, number, [&](const auto& k) {
            forward<typename std::decay_t<decltype(k)>::Number>(k.forward, p, addresses, ld, train);
          });
        },
        "Run RnnForward: addresses of w_hh, w_hr, w_ih, x, bias, b_hn, gates, h0, c0, y, c, hn, cn, workspace.");
  m.def("rnn_backward",
        [](const py::tuple& sizes, size_t number, int64_t ld_gates, int64_t ld, const py::tuple& addresses) {
          const RnnProblem p = problem(sizes);
          with_kernels(p, number, [&](const auto& k) {
            backward<typename std::decay_t<decltype(k)>::Number>(k.backward, p, addresses, ld_gates, ld);
          });
        },
        "Run RnnBackward: addresses of w_hh, w_hr, gates, y, c, h0, c0, dy, dhn, dcn, dgates, db, dh0, dc0, workspace.");
  m.def("rnn_direct",
        [](const py::tuple& sizes, size_t number, int64_t ld, bool train, const py::tuple& addresses, int weights,
           int64_t inputs) {
          const RnnProblem p = problem(sizes);
          if (number == 4)
            direct<float>(kernels.rnn_f32.direct, p, weights, inputs, addresses, ld, train);
          else
            direct<double>(kernels.rnn_f64.direct, p, weights, inputs, addresses, ld, train);
        },
        "Run RnnDirect: addresses of x, w_ih, w_hh, b_ih, b_hh, h0, c0, gates, y, c, hn, cn.");
}

}  // namespace fastlm
