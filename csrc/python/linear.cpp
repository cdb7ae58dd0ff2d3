// Products and quantized layers: csrc/product.h, csrc/quant.h.

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>

#include "tensors.h"

namespace fastlm {
namespace {

QuantizedLinear quantized(int kind, int number, int64_t rows, int64_t in, int64_t out, int64_t group, int threads) {
  if (kind < 0 || kind > 2 || number < 0 || number > 2 || rows < 1 || in < 1 || out < 1 || threads < 1 ||
      (kind == 1 && in > 131072) || (kind == 2 && group != 32 && group != 64 && group != 128))
    throw std::invalid_argument("quantized_linear: sizes out of range");
  if (!kernels.quantized_linear) throw std::runtime_error("quantized_linear: this CPU has no AVX-512 VNNI");
  QuantizedLinear p{};
  p.kind = static_cast<QuantizedWeight>(kind), p.number = static_cast<Number>(number);
  p.rows = rows, p.in = in, p.out = out, p.group = group, p.threads = threads;
  return p;
}

// A tensor's sizes, the last one replaced.
std::vector<int64_t> shape_of(const DenseTensor& t, int64_t last) {
  std::vector<int64_t> shape(t.shape, t.shape + t.dimensions);
  shape.back() = last;
  return shape;
}

int64_t rows_of(const DenseTensor& t) {
  return std::accumulate(t.shape, t.shape + t.dimensions - 1, int64_t(1), std::multiplies<int64_t>());
}

// `quantized_linear` without gradients, checks and result included: y, or None where the arguments are not what a
// kernel can take, for whatever reason. They come as the caller gave them.
py::object quantized_at_once(int kind, int64_t group, int threads, int64_t most_rows, bool frozen, py::handle x,
                             py::handle weight, py::handle scale, py::handle bias) {
  Tensors tensors;
  const DenseTensor of_x = tensors.read(x), of_w = tensors.read(weight);
  if (!tensors.fits || of_x.dimensions < 1 || of_w.dimensions != 2) return py::none();
  const auto trains = [&](py::handle t) { return !frozen && t.attr("requires_grad").cast<bool>(); };
  constexpr Dtype numbers[] = {kFloat32, kBfloat16, kFloat16};
  const int number = int(std::find(numbers, numbers + 3, of_x.dtype) - numbers);
  const int64_t in = of_x.shape[of_x.dimensions - 1], out = of_w.shape[0], rows = rows_of(of_x);
  if (number > 2 || rows > most_rows || trains(x) || (!bias.is_none() && (number || trains(bias)))) return py::none();
  QuantizedLinear p = quantized(kind, number, rows, in, out, group, threads);
  const int64_t groups = (in + group - 1) / group;
  p.x = at(of_x);
  p.weight = tensors.address(weight, kind == 2 ? kUint8 : kInt8, {out, kind == 2 ? (in + 1) / 2 : in});
  p.scale = kind == 2 ? tensors.address(scale, kFloat32, {out, groups}) : tensors.address(scale, kFloat32, {out});
  if (!bias.is_none()) p.bias = tensors.address(bias, kFloat32, {out});
  if (!tensors.fits) return py::none();
  Address to{};
  const py::object y = tensors.result(x, of_x.dtype, shape_of(of_x, out), to);
  p.y = to;
  if (!tensors.fits) return py::none();
  struct Line {
    alignas(64) char bytes[64];
  };
  {
    py::gil_scoped_release release;
    const std::unique_ptr<Line[]> workspace(new Line[kernels.quantized_linear_workspace(p) / sizeof(Line) + 1]);
    p.workspace = workspace.get();
    kernels.quantized_linear(p);
  }
  return y;
}

// The same of `linear` of few rows in float32 or bfloat16.
py::object linear_at_once(py::handle x, py::handle weight, py::handle bias, int threads) {
  if (threads < 1) throw std::invalid_argument("linear_at_once: threads out of range");
  Tensors tensors;
  const DenseTensor of_x = tensors.read(x), of_w = tensors.read(weight);
  const Dtype dtype = of_x.dtype;
  const bool fits = tensors.fits && of_x.dimensions > 0 && of_w.dimensions == 2 && of_w.dtype == dtype;
  if (!fits || !(dtype == kFloat32 || dtype == kBfloat16) || of_x.shape[of_x.dimensions - 1] != of_w.shape[1])
    return py::none();
  const int64_t out = of_w.shape[0], in = of_w.shape[1];
  FewRows p{rows_of(of_x), in, out, at(of_x), at(of_w), in,
            bias.is_none() ? Address{0} : tensors.address(bias, dtype, {out}), nullptr, threads};
  Address to{};
  const py::object y = tensors.fits ? tensors.result(x, dtype, shape_of(of_x, out), to) : py::none();
  if (!tensors.fits) return py::none();
  p.y = to;
  {
    py::gil_scoped_release release;
    kernels.few_rows(p, dtype.bits / 8);
  }
  return y;
}

void check_product(int threads, size_t number, bool pairs) {
  if (pairs && !kernels.product_pairs) throw std::runtime_error("product: this CPU has no AMX");
  if (threads < 1 || (number != sizeof(float) && number != (pairs ? sizeof(Bf16) : sizeof(double))))
    throw std::invalid_argument("product: threads or size of a number out of range");
}

}  // namespace

void define_linear(py::module_& m) {
  m.def("product_workspace",
        [](int64_t rows, int64_t depth, int64_t columns, int threads, size_t number, bool pairs) {
          Product call{};
          call.rows = rows, call.depth = depth, call.columns = columns, call.threads = threads;
          check_product(threads, number, pairs);
          return pairs ? kernels.product_pairs_workspace(call) : kernels.product_workspace(call, number);
        },
        "Return the bytes of workspace that a call needs.");
  m.def("product",
        [](const py::tuple& sizes, const py::tuple& addresses, bool add, int threads, size_t number, bool pairs) {
          const Pack n("product", sizes, 8), a("product", addresses, 5);
          check_product(threads, number, pairs);
          const Product call{n.size(0), n.size(1), n.size(2), a[0], n.size(3), n.size(4), a[1],   n.size(5),
                             n.size(6), a[2],      a[3],      n.size(7), add, threads,   a[4]};
          py::gil_scoped_release release;
          (pairs ? kernels.product_pairs : kernels.product)(call, number);
        },
        "Run Product: sizes M, K, N and strides of A, of B and of C's rows; addresses of A, B, bias, C, workspace. `pairs`: "
        "A and B are bfloat16, and `number` is the bytes of a number of C.");
  m.def("few_rows",
        [](const py::tuple& sizes, const py::tuple& addresses, int threads, size_t number) {
          const Pack n("few_rows", sizes, 4), a("few_rows", addresses, 4);
          if (threads < 1 || (number != sizeof(float) && number != sizeof(Bf16)))
            throw std::invalid_argument("few_rows: threads or size of a number out of range");
          const FewRows call{n.size(0), n.size(1), n.size(2), a[0], a[1], n.size(3), a[2], a[3], threads};
          py::gil_scoped_release release;
          kernels.few_rows(call, number);
        },
        "Run FewRows: sizes rows, depth, columns, w_row; addresses of x, w, bias, y.");
  m.def("linear_at_once", &linear_at_once, "Run FewRows with its checks and its result; None where a kernel cannot.");
  m.def("quantized_linear_workspace",
        [](int kind, int number, int64_t rows, int64_t in, int64_t out, int64_t group, int threads) {
          return kernels.quantized_linear_workspace(quantized(kind, number, rows, in, out, group, threads));
        },
        "Return the bytes of workspace that a call needs.");
  m.def("quantized_linear",
        [](int kind, int number, int64_t rows, int64_t in, int64_t out, int64_t group, int threads,
           const py::tuple& addresses) {
          const Pack a("quantized_linear", addresses, 6);
          QuantizedLinear p = quantized(kind, number, rows, in, out, group, threads);
          p.x = a[0], p.weight = a[1], p.scale = a[2], p.bias = a[3], p.y = a[4], p.workspace = a[5];
          py::gil_scoped_release release;
          kernels.quantized_linear(p);
        },
        "Run QuantizedLinear: addresses of x, weight, scale, bias, y, workspace.");
  m.def("quantized_linear_at_once", &quantized_at_once,
        "Run QuantizedLinear with its result; None where a kernel cannot.");
}

}  // namespace fastlm
