// Norms, gated units, rotary embeddings and softmax: csrc/rows.h.

#include "arguments.h"

namespace fastlm {

void define_rows(py::module_& m) {
  m.def("norm_forward",
        [](const py::tuple& sizes, const py::tuple& addresses, float eps, bool bf16, int threads) {
          const Pack n("norm_forward", sizes, 4), a("norm_forward", addresses, 8);
          const NormForward call{n.size(0), n.size(1), a[0], n.size(2), a[1], n.size(3), a[2],   a[3],
                                 a[4],      a[5],      a[6], a[7],      eps,  bf16,      threads};
          py::gil_scoped_release release;
          kernels.rows.norm_forward(call);
        },
        "Run NormForward: sizes rows, cols, x_row, residual_row; addresses of x, residual, weight, bias, y, sum, mean, "
        "rstd.");
  m.def("norm_backward",
        [](const py::tuple& sizes, const py::tuple& addresses, bool bf16, int threads) {
          const Pack n("norm_backward", sizes, 3), a("norm_backward", addresses, 10);
          const NormBackward call{n.size(0), n.size(1), a[0], n.size(2), a[1], a[2], a[3],   a[4],
                                  a[5],      a[6],      a[7], a[8],      a[9], bf16, threads};
          py::gil_scoped_release release;
          kernels.rows.norm_backward(call);
        },
        "Run NormBackward: sizes rows, cols, x_row; addresses of x, dy, dsum, weight, mean, rstd, dx, dweight, dbias, "
        "workspace.");
  m.def("gated",
        [](bool backward, int kind, const py::tuple& sizes, const py::tuple& addresses, bool bf16, int threads) {
          if (kind < 0 || kind > 2) throw std::invalid_argument("gated: unknown kind");
          const Pack n("gated", sizes, 4), a("gated", addresses, 5);
          const Gated call{static_cast<Gate>(kind), n.size(0), n.size(1), a[0], n.size(2), a[1], n.size(3), a[2], a[3],
                           a[4], bf16, threads};
          py::gil_scoped_release release;
          backward ? kernels.rows.gated_backward(call) : kernels.rows.gated_forward(call);
        },
        "Run Gated: sizes rows, cols, a_row, b_row; addresses of a, b, dy, y, db.");
  m.def("rotary",
        [](bool interleaved, bool inverse, const py::tuple& sizes, const py::tuple& addresses, bool bf16, int threads) {
          const Pack n("rotary", sizes, 14), a("rotary", addresses, 4);
          const Rotary call{n.size(0), n.size(1), n.size(2), n.size(3), n.size(4),
                            a[0], {n.size(5), n.size(6), n.size(7)}, a[1], {n.size(8), n.size(9), n.size(10)},
                            a[2], a[3], {n.size(11), n.size(12), n.size(13)},
                            interleaved, inverse, bf16, threads};
          py::gil_scoped_release release;
          kernels.rows.rotary(call);
        },
        "Run Rotary: sizes B, H, S, D, half, then the strides of x, y and the tables; addresses of x, y, cos, sin.");
  m.def("softmax",
        [](const py::tuple& sizes, const py::tuple& addresses, float scale, bool bf16, int threads) {
          const Pack n("softmax", sizes, 9), a("softmax", addresses, 4);
          const Softmax call{n.size(0), n.size(1), a[0], n.size(2), a[1],
                             {n.size(3), n.size(4)}, {n.size(5), n.size(6), n.size(7), n.size(8)},
                             a[2], a[3], scale, bf16, threads};
          py::gil_scoped_release release;
          kernels.rows.softmax(call);
        },
        "Run Softmax: sizes rows, cols, x_row, mask_sizes, mask_strides; addresses of x, mask, y, workspace.");
}

}  // namespace fastlm
