// The kernels for NVIDIA GPUs: csrc/cuda/rnn.h.

#ifdef FASTLM_CUDA

#include <pybind11/stl.h>

#include "../cuda/rnn.h"
#include "arguments.h"

namespace fastlm {
namespace {

// From (cell, number, batch, hidden, directions, exchange).
cuda::Layer layer_of(const py::tuple& a) {
  const auto at = [&](int i) { return a[i].cast<int>(); };
  const cuda::Layer l{static_cast<Cell>(at(0)), static_cast<cuda::Number>(at(1)), at(2), at(3), at(4),
                      static_cast<cuda::Exchange>(at(5))};
  if (a.size() != 6 || at(0) < 0 || at(0) > 3 || at(1) < 0 || at(1) > 4 || l.batch < 1 || l.hidden < 1 ||
      l.directions < 1 || l.directions > 2 || at(5) < 0 || at(5) > 3)
    throw std::invalid_argument("rnn: sizes out of range");
  return l;
}

// From (multiprocessors, shared, cluster, planes).
cuda::Chip chip_of(const py::tuple& a) {
  if (a.size() != 4) throw std::invalid_argument("rnn: a chip is four numbers");
  return {a[0].cast<int>(), a[1].cast<int>(), a[2].cast<int>(), a[3].cast<int>()};
}

}  // namespace

void define_cuda(py::module_ m) {
  m.attr("built_version") = cuda::built_version();
  m.attr("packed_sequences") = cuda::kPackedSequences;
  m.def("driver_version", &cuda::driver_version,
        "Return the newest CUDA version that the installed driver knows, as 1000·major + 10·minor; 0: no driver.");
  m.def("rnn_plan",
        [](const py::tuple& layer, bool backward, const py::tuple& chip) -> py::object {
          const cuda::Layer l = layer_of(layer);
          const cuda::Plan p = cuda::plan(l, backward, chip_of(chip));
          if (!p.blocks) return py::none();
          using py::literals::operator""_a;
          return py::dict("exchange"_a = int(p.exchange), "held"_a = p.held, "abreast"_a = p.abreast, "ranks"_a = p.ranks,
                          "warps"_a = p.warps, "m_tiles"_a = p.m_tiles, "n_tiles"_a = p.n_tiles, "units"_a = p.units,
                          "slices"_a = p.slices, "groups"_a = p.groups, "teams"_a = p.teams,
                          "turns"_a = p.turns, "depth"_a = p.depth, "row"_a = p.row,
                          "blocks"_a = p.blocks, "shared"_a = p.shared, "workspace"_a = p.workspace,
                          "cost"_a = p.cost);
        },
        "Return cuda::plan of a layer (cell, number, batch, hidden, directions, exchange) on a chip (multiprocessors, "
        "bytes of shared memory that a block may use, blocks of a cluster, clusters of a plane); None where nothing "
        "fits.");
  m.def("rnn_fits",
        [](const py::tuple& layer, bool backward, const py::tuple& chip) {
          return cuda::rnn_fits(layer_of(layer), backward, chip_of(chip));
        },
        "Return whether the current GPU holds the blocks of the pass that wait for each other at a time.");
  m.def("largest_cluster", &cuda::largest_cluster,
        "Return how many blocks a cluster may have on the current GPU, whose blocks may use so many bytes of shared "
        "memory; 0: it has no clusters.");
  m.def("planes",
        [](int shared, uintptr_t stream) { return cuda::planes(shared, pointer<void>(stream)); },
        "Return how many clusters of a plane, one cooperative launch, the current GPU holds, whose blocks may use so "
        "many bytes of shared memory; 0: none. Queues a launch that does nothing on the stream.");
  m.def("exchange_alone",
        [](bool cluster, int blocks, int teams, int bytes, int steps, uintptr_t workspace, uintptr_t nanoseconds,
           uintptr_t stream) {
          if (blocks < 1 || teams < 1 || bytes < 1 || steps < 2) throw std::invalid_argument("exchange: out of range");
          cuda::exchange_alone({cluster, blocks, teams, bytes, steps, pointer<void>(workspace),
                                pointer<uint64_t>(nanoseconds)}, pointer<void>(stream));
        },
        "Queue ExchangeAlone on a stream.");
  const auto pass_of = [](const py::tuple& layer, const py::tuple& chip, int64_t steps, uintptr_t batch_sizes,
                          uintptr_t workspace) {
    if (steps < 1 || steps > INT32_MAX) throw std::invalid_argument("rnn: sizes out of range");
    return cuda::RnnPass{layer_of(layer), steps, pointer<const int64_t>(batch_sizes), chip_of(chip),
                         pointer<void>(workspace)};
  };
  m.def("rnn_forward",
        [=](const py::tuple& layer, const py::tuple& chip, int64_t steps, uintptr_t batch_sizes, uintptr_t workspace,
            const std::vector<std::tuple<py::tuple, int64_t, int64_t>>& directions, uintptr_t stream) {
          const cuda::RnnPass pass = pass_of(layer, chip, steps, batch_sizes, workspace);
          if (int(directions.size()) != pass.layer.directions) throw std::invalid_argument("rnn: directions");
          cuda::RnnForward d[2] = {};
          for (size_t i = 0; i < directions.size(); ++i) {
            const Pack a("rnn_forward", std::get<0>(directions[i]), 11);
            d[i] = {a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10],
                    std::get<1>(directions[i]), std::get<2>(directions[i])};
          }
          py::gil_scoped_release release;
          cuda::rnn_forward(pass, d, pointer<void>(stream));
        },
        "Queue RnnForward on a stream; a direction is (addresses, x_row, y_row), in the order of its fields.");
  m.def("rnn_backward",
        [=](const py::tuple& layer, const py::tuple& chip, int64_t steps, uintptr_t batch_sizes, uintptr_t workspace,
            const std::vector<std::tuple<py::tuple, int64_t, int64_t>>& directions, uintptr_t stream) {
          const cuda::RnnPass pass = pass_of(layer, chip, steps, batch_sizes, workspace);
          if (int(directions.size()) != pass.layer.directions) throw std::invalid_argument("rnn: directions");
          cuda::RnnBackward d[2] = {};
          for (size_t i = 0; i < directions.size(); ++i) {
            const Pack a("rnn_backward", std::get<0>(directions[i]), 12);
            d[i] = {a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11],
                    std::get<1>(directions[i]), std::get<2>(directions[i])};
          }
          py::gil_scoped_release release;
          cuda::rnn_backward(pass, d, pointer<void>(stream));
        },
        "Queue RnnBackward on a stream; a direction is (addresses, y_row, dgates_row), in the order of its fields.");
}

}  // namespace fastlm

#endif
