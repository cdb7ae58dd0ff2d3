// What Python sees of the kernels. Addresses arrive as integers, checked by the caller; the GIL is released.

#include <pybind11/pybind11.h>
#ifdef FASTLM_CUDA
#include <pybind11/stl.h>
#endif

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "attention.h"
#include "loss.h"
#include "product.h"
#include "quant.h"
#include "rnn.h"
#include "rows.h"
#ifdef FASTLM_CUDA
#include "cuda/rnn.h"
#endif

namespace py = pybind11;

namespace fastlm {
FASTLM_DECLARE_RNN(generic)
FASTLM_DECLARE_RNN_DIRECT(generic)
FASTLM_DECLARE_ROWS(generic)
FASTLM_DECLARE_LOSS(generic)
FASTLM_DECLARE_PRODUCT(generic)
FASTLM_DECLARE_ATTENTION(generic)
#ifdef FASTLM_AVX2
FASTLM_DECLARE_RNN(avx2)
FASTLM_DECLARE_RNN_DIRECT(avx2)
FASTLM_DECLARE_ROWS(avx2)
FASTLM_DECLARE_LOSS(avx2)
FASTLM_DECLARE_PRODUCT(avx2)
FASTLM_DECLARE_ATTENTION(avx2)
#endif
#ifdef FASTLM_AVX512
FASTLM_DECLARE_RNN(avx512)
FASTLM_DECLARE_RNN_DIRECT(avx512)
FASTLM_DECLARE_ROWS(avx512)
FASTLM_DECLARE_LOSS(avx512)
FASTLM_DECLARE_PRODUCT(avx512)
FASTLM_DECLARE_ATTENTION(avx512)
FASTLM_DECLARE_QUANT(avx512)
#endif
#ifdef FASTLM_AVX512_BF16
FASTLM_DECLARE_RNN_PAIRS(avx512_bf16)
#endif
#ifdef FASTLM_AMX
FASTLM_DECLARE_RNN_PAIRS(amx)
#endif
}  // namespace fastlm

namespace {

using namespace fastlm;

template <class S>
struct LossKernels {
  void (*read)(const LossTile&, const LossRead<S>&);
  void (*gradient)(const LossTile&, const LossGradient<S>&);
  void (*divergence_read)(const LossTile&, const DivergenceRead<S>&);
  void (*divergence_gradient)(const LossTile&, const DivergenceGradient<S>&);
};

// The recurrent layer's kernels for one type of number.
template <class T>
struct RecurrentKernels {
  using Number = T;
  size_t (*workspace)(const RnnProblem&, bool, size_t);
  void (*forward)(const RnnProblem&, const RnnForward<T>&);
  void (*backward)(const RnnProblem&, const RnnBackward<T>&);
  void (*direct)(const RnnProblem&, const RnnDirect<T>&) = nullptr;  // not by pairs
};

template <class S>
struct AttentionKernels {
  size_t (*forward)(const Attention<S>&);
  size_t (*backward)(const Attention<S>&);
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;  // of the instruction set
  RecurrentKernels<float> rnn_f32;
  RecurrentKernels<double> rnn_f64;
  RowKernels rows;
  LossKernels<float> loss_f32;
  LossKernels<double> loss_f64;
  LossKernels<Bf16> loss_bf16;
  size_t (*product_workspace)(const Product&, size_t);
  void (*product)(const Product&, size_t);
  AttentionKernels<float> attention_f32;
  AttentionKernels<double> attention_f64;
  AttentionKernels<Bf16> attention_bf16;
  // Null where the CPU lacks byte products (VNNI).
  size_t (*quantized_linear_workspace)(const QuantizedLinear&) = nullptr;
  void (*quantized_linear)(const QuantizedLinear&) = nullptr;
  // What multiplies pairs of bfloat16, and its kernels; null where nothing does.
  const char* pairs = nullptr;
  RecurrentKernels<Bf16> rnn_bf16 = {};
  RecurrentKernels<float> rnn_reduced = {};      // float32 from this precision down: three products lose to
  Precision reduced_from = Precision::medium;    // float32's own vectors where they run at half the speed
};

#define FASTLM_LOSS_KERNELS(isa) \
  {isa::loss_read, isa::loss_gradient, isa::divergence_read, isa::divergence_gradient}

#define FASTLM_RNN_KERNELS(isa, direct) \
  {isa::rnn_workspace, isa::rnn_forward, isa::rnn_backward, direct}

#define FASTLM_ATTENTION_KERNELS(isa) {isa::attention_forward, isa::attention_backward}

#define FASTLM_KERNELS(isa) \
  Kernels{#isa, FASTLM_RNN_KERNELS(isa, isa::rnn_direct), FASTLM_RNN_KERNELS(isa, isa::rnn_direct), isa::row_kernels(), \
          FASTLM_LOSS_KERNELS(isa), FASTLM_LOSS_KERNELS(isa), FASTLM_LOSS_KERNELS(isa), \
          isa::product_workspace, isa::product, \
          FASTLM_ATTENTION_KERNELS(isa), FASTLM_ATTENTION_KERNELS(isa), FASTLM_ATTENTION_KERNELS(isa)}

// Features newer than the names that all compilers know for __builtin_cpu_supports: Intel SDM, CPUID leaf 7.
struct Features {
  bool avx512_bf16 = false, avx512_fp16 = false, amx = false;

  Features() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
      avx512_fp16 = d >> 23 & 1;
      amx = (d >> 22 & 1) && (d >> 24 & 1);  // bfloat16 and the tiles themselves
    }
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512_bf16 = a >> 5 & 1;
#endif
  }
};

#ifdef FASTLM_AMX
// Linux gives a process the tile registers only if it asks: Documentation/arch/x86/xstate.rst.
bool tiles_granted() {
#if defined(FASTLM_EMULATED)  // tests/amx_emulation
  return true;
#elif defined(__linux__) && defined(__x86_64__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  const Features cpu;
  return cpu.amx && cpu.avx512_bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#ifdef FASTLM_AVX512_BF16
bool dots_granted() {
#if defined(FASTLM_EMULATED)
  return true;
#else
  return Features().avx512_bf16;
#endif
}
#endif

// The widest set that was built, that this CPU has, and that FASTLM_MAX_ISA allows.
Kernels choose_kernels() {
  const char* names[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};
  const char* cap = std::getenv("FASTLM_MAX_ISA");
  constexpr int widest = 4;
  int most = widest;
  if (cap && *cap) {
    for (most = 0; std::string(names[most]) != cap; ++most)
      if (most == widest)
        throw std::runtime_error("FASTLM_MAX_ISA must be generic, avx2, avx512, avx512_bf16 or amx, got " +
                                 std::string(cap));
  }
  Kernels found = FASTLM_KERNELS(generic);
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef FASTLM_AVX2
  if (most >= 1 && avx2) found = FASTLM_KERNELS(avx2);
#endif
#ifdef FASTLM_AVX512
  if (most >= 2 && avx512) found = FASTLM_KERNELS(avx512);
  if (most >= 2 && avx512 && __builtin_cpu_supports("avx512vnni")) {
    found.quantized_linear_workspace = avx512::quantized_linear_workspace;
    found.quantized_linear = avx512::quantized_linear;
  }
#endif
  // Those of pairs stand beside the kernels of AVX-512.
#ifdef FASTLM_AVX512_BF16
  if (most >= 3 && avx512 && dots_granted()) {
    found.pairs = "avx512_bf16";
    found.rnn_bf16 = FASTLM_RNN_KERNELS(avx512_bf16, nullptr);
    found.rnn_reduced = FASTLM_RNN_KERNELS(avx512_bf16, nullptr);
  }
#endif
#ifdef FASTLM_AMX
  if (most >= 4 && avx512 && tiles_granted()) {
    found.pairs = "amx";
    found.rnn_bf16 = FASTLM_RNN_KERNELS(amx, nullptr);
    found.rnn_reduced = FASTLM_RNN_KERNELS(amx, nullptr);
    found.reduced_from = Precision::high;
  }
#endif
#endif
  return found;
}

// Whose speed a rule of `loses` knows, where AVX-512 is in use: two CPUs with one instruction set differ in what torch's
// libraries make of them (MKL runs AVX2 code on AMD). Elsewhere the instruction set alone. AMD APM 3, CPUID leaf 1.
std::string cpu_of(const Kernels& kernels) {
  const std::string isa = kernels.name;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0, none = 0;
  if (isa == "avx512" && __get_cpuid(0, &none, &b, &c, &d) && __get_cpuid(1, &a, &none, &none, &none)) {
    if (b == signature_INTEL_ebx) return "intel";
    const unsigned family = (a >> 8 & 15) + (a >> 20 & 255);  // the second counts where the first is 15
    if (b == signature_AMD_ebx && family == 0x1a) return "zen5";
  }
#endif
  return isa;
}

Kernels kernels;

// Calls f with the kernels for numbers of so many bytes.
template <class F>
auto with_kernels(const RnnProblem& p, size_t number, const F& f) {
  const bool reduced = kernels.pairs && p.precision >= kernels.reduced_from && p.batch > 1;
  if (number == sizeof(double)) return f(kernels.rnn_f64);
  if (number == sizeof(float)) return f(reduced ? kernels.rnn_reduced : kernels.rnn_f32);
  if (!kernels.pairs) throw std::invalid_argument("rnn: kernels for 16 bits need AVX512_BF16 or AMX");
  return f(kernels.rnn_bf16);
}

template <class P>
P* pointer(uintptr_t address) {
  return reinterpret_cast<P*>(address);
}

// One of the addresses that Python passes, as a pointer to whatever is wanted.
struct Address {
  uintptr_t value;
  template <class P>
  operator P*() const {
    return pointer<P>(value);
  }
};

// From (cell, reverse, steps, batch, hidden, projection, inputs, batch_sizes, threads, precision, first, last).
RnnProblem problem(const py::tuple& p) {
  if (p.size() != 12) throw std::invalid_argument("rnn: expected 12 numbers");
  const auto at = [&](int i) { return p[i].cast<int64_t>(); };
  const RnnProblem found{static_cast<Cell>(at(0)), at(1) != 0, at(2), at(3), at(4), at(5), at(6),
                         pointer<const int64_t>(p[7].cast<uintptr_t>()), static_cast<int>(at(8)),
                         static_cast<Precision>(at(9)), at(10), at(11)};
  if (at(0) < 0 || at(0) > 3 || at(9) < 0 || at(9) > 2 || found.steps < 1 || found.batch < 0 || found.hidden < 1 ||
      found.projection < 0 || (found.projection && found.cell != Cell::lstm) || found.inputs < 0 ||
      found.threads < 1 || found.first < 0 || found.first >= found.last || found.last > found.steps)
    throw std::invalid_argument("rnn: sizes out of range");
  return found;
}

template <class T, class Kernel>
void forward(Kernel kernel, const RnnProblem& p, const py::tuple& a, bool train) {
  if (a.size() != 14) throw std::invalid_argument("rnn_forward: expected 14 addresses");
  const auto at = [&](int i) { return Address{a[i].cast<uintptr_t>()}; };
  const RnnForward<T> call{at(0), at(1), at(2), at(3),  at(4),  at(5),  at(6), at(7),
                           at(8), at(9), at(10), at(11), at(12), train, at(13)};
  py::gil_scoped_release release;
  kernel(p, call);
}

template <class T, class Kernel>
void backward(Kernel kernel, const RnnProblem& p, const py::tuple& a, int64_t ld) {
  if (a.size() != 14) throw std::invalid_argument("rnn_backward: expected 14 addresses");
  const auto at = [&](int i) { return Address{a[i].cast<uintptr_t>()}; };
  const RnnBackward<T> call{at(0), at(1), at(2), at(3),  at(4), at(5),  at(6), at(7),
                            at(8), at(9), at(10), ld,    at(11), at(12), at(13)};
  py::gil_scoped_release release;
  kernel(p, call);
}

template <class T, class Kernel>
void direct(Kernel kernel, const RnnProblem& p, int weights, int64_t inputs, const py::tuple& a, bool train) {
  if (a.size() != 12) throw std::invalid_argument("rnn_direct: expected 12 addresses");
  if (weights < 0 || weights > 3 || inputs < 1) throw std::invalid_argument("rnn_direct: sizes out of range");
  const auto at = [&](int i) { return pointer<T>(a[i].cast<uintptr_t>()); };
  const RnnDirect<T> call{static_cast<Stored>(weights), inputs, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7),
                          at(8), at(9), at(10), at(11), train};
  py::gil_scoped_release release;
  kernel(p, call);
}

enum Attribute { kDtype, kDevice, kIsCpu, kIsContiguous, kDataPtr };

// What a tensor says of itself, by names that are made once.
struct Attributes {
  py::handle tensor;

  explicit Attributes(py::handle tensor) : tensor(tensor) {}
  py::object get(Attribute name) const { return checked(PyObject_GetAttr(tensor.ptr(), interned(name))); }
  py::object call(Attribute name) const { return checked(PyObject_CallMethodNoArgs(tensor.ptr(), interned(name))); }

 private:
  static PyObject* interned(Attribute name) {
    static PyObject* const names[] = {PyUnicode_InternFromString("dtype"), PyUnicode_InternFromString("device"),
                                      PyUnicode_InternFromString("is_cpu"),
                                      PyUnicode_InternFromString("is_contiguous"),
                                      PyUnicode_InternFromString("data_ptr")};
    return names[name];
  }
  static py::object checked(PyObject* found) {
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }
};

// Where tensors lie, 0 for None, each checked for what a kernel takes for granted: contiguous, on `device`, and of the
// dtype that `kinds` names, a letter for each: n numbers, s what carries a state, w weights.
py::tuple addresses(const py::tuple& tensors, const std::string& kinds, py::handle device, py::handle number,
                    py::handle state, py::handle weight) {
  if (kinds.size() != tensors.size()) throw std::invalid_argument("addresses: a kind for each tensor");
  py::tuple found(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const py::handle t = tensors[i];
    if (t.is_none()) {
      found[i] = py::int_(0);
      continue;
    }
    const py::handle wanted = kinds[i] == 's' ? state : kinds[i] == 'w' ? weight : number;
    const Attributes of(t);
    if (!of.get(kDtype).is(wanted) || !of.get(kDevice).equal(device) || !of.call(kIsContiguous).is(py::handle(Py_True)))
      throw std::runtime_error("a kernel needs contiguous " + std::string(py::str(wanted)) + " on " +
                               std::string(py::str(device)) + ", got " + std::string(py::str(t.attr("dtype"))) +
                               " of strides " + std::string(py::str(t.attr("stride")())) + " on " +
                               std::string(py::str(t.attr("device"))));
    found[i] = of.call(kDataPtr);
  }
  return found;
}

// One step of one layer without gradients, checks and results included, because a stream calls for every token and
// Python takes longer than the kernel: (y, hn) or (y, hn, cn), or None where a tensor is not what a kernel can take.
py::object rnn_step(int cell, int64_t batch, int64_t hidden, int64_t inputs, int threads, size_t number, bool biased,
                    py::handle x, const py::tuple& hx, const py::list& params, const py::tuple& types,
                    py::handle empty_like) {
  const int states = cell == 0 ? 2 : 1;
  if (cell < 0 || cell > 3 || batch < 1 || hidden < 1 || inputs < 1 || threads < 1 || hx.size() != size_t(states) ||
      params.size() != (biased ? 4u : 2u))
    throw std::invalid_argument("rnn_step: sizes out of range");
  const py::object dtype = Attributes(x).get(kDtype);
  bool fits = true;
  const auto address = [&](py::handle t) -> Address {
    const Attributes of(t);
    const py::handle type = py::type::handle_of(t);
    const py::handle yes(Py_True);
    fits = fits && (type.is(types[0]) || type.is(types[1])) && of.get(kDtype).is(dtype) && of.get(kIsCpu).is(yes) &&
           of.call(kIsContiguous).is(yes);
    return {fits ? of.call(kDataPtr).cast<uintptr_t>() : 0};
  };
  const Address from[] = {address(x), address(params[0]), address(params[1]),
                          biased ? address(params[2]) : Address{0}, biased ? address(params[3]) : Address{0},
                          address(hx[0]), states == 2 ? address(hx[1]) : Address{0}};
  if (!fits) return py::none();
  py::tuple results(1 + states);
  Address to[3] = {};
  for (int i = 0; i <= states; ++i) {
    results[i] = empty_like(hx[i == 2]);
    to[i] = address(results[i]);
  }
  if (!fits) return py::none();
  const RnnProblem p{Cell(cell), false, 1, batch, hidden, 0, 0, nullptr, threads, Precision::highest, 0, 1};
  const auto run = [&](const auto& kernel, auto zero, Stored stored) {
    using T = decltype(zero);
    const RnnDirect<T> call{stored,  inputs,  from[0], from[1], from[2], from[3], from[4], from[5],
                            from[6], nullptr, to[0],   nullptr, to[1],   to[2],   false};
    py::gil_scoped_release release;
    kernel.direct(p, call);
  };
  if (number == sizeof(double))
    run(kernels.rnn_f64, 0.0, Stored::f64);
  else
    run(kernels.rnn_f32, 0.0f, Stored::f32);
  return results;
}

// Addresses in the order of the struct's pointers; sizes and strides in the order of its integers.
class Pack {
 public:
  Pack(const char* name, const py::tuple& values, size_t count) : values_(values) {
    if (values.size() != count) throw std::invalid_argument(std::string(name) + ": wrong number of arguments");
  }
  template <class P>
  P* address(int i) const {
    return pointer<P>(values_[i].cast<uintptr_t>());
  }
  int64_t size(int i) const { return values_[i].cast<int64_t>(); }

 private:
  const py::tuple& values_;
};

void define_product(py::module_ m) {
  m.def("product_workspace",
        [](int64_t rows, int64_t depth, int64_t columns, int threads, size_t number) {
          Product call{};
          call.rows = rows, call.depth = depth, call.columns = columns, call.threads = threads;
          return kernels.product_workspace(call, number);
        },
        "Return the bytes of workspace that a call needs.");
  m.def("product",
        [](const py::tuple& sizes, const py::tuple& addresses, bool add, int threads, size_t number) {
          const Pack n("product", sizes, 8), a("product", addresses, 5);
          if (threads < 1 || (number != sizeof(float) && number != sizeof(double)))
            throw std::invalid_argument("product: threads or size of a number out of range");
          const Product call{n.size(0),          n.size(1), n.size(2),          a.address<void>(0), n.size(3), n.size(4),
                             a.address<void>(1), n.size(5), n.size(6),          a.address<void>(2),
                             a.address<void>(3), n.size(7), add,                threads,            a.address<void>(4)};
          py::gil_scoped_release release;
          kernels.product(call, number);
        },
        "Run Product: sizes M, K, N and strides of A, of B and of C's rows; addresses of A, B, bias, C, workspace.");
}

void define_rows(py::module_ m) {
  m.def("norm_forward",
        [](const py::tuple& sizes, const py::tuple& addresses, float eps, bool bf16, int threads) {
          const Pack n("norm_forward", sizes, 4), a("norm_forward", addresses, 8);
          const NormForward call{n.size(0),         n.size(1),         a.address<void>(0),  n.size(2),
                                 a.address<void>(1), n.size(3),         a.address<float>(2), a.address<float>(3),
                                 a.address<void>(4), a.address<void>(5), a.address<float>(6), a.address<float>(7),
                                 eps,               bf16,              threads};
          py::gil_scoped_release release;
          kernels.rows.norm_forward(call);
        },
        "Run NormForward: sizes rows, cols, x_row, residual_row; addresses of x, residual, weight, bias, y, sum, mean, "
        "rstd.");
  m.def("norm_backward",
        [](const py::tuple& sizes, const py::tuple& addresses, bool bf16, int threads) {
          const Pack n("norm_backward", sizes, 3), a("norm_backward", addresses, 10);
          const NormBackward call{n.size(0),           n.size(1),           a.address<void>(0),  n.size(2),
                                  a.address<void>(1),  a.address<void>(2),  a.address<float>(3), a.address<float>(4),
                                  a.address<float>(5), a.address<void>(6),  a.address<float>(7), a.address<float>(8),
                                  a.address<float>(9), bf16,                threads};
          py::gil_scoped_release release;
          kernels.rows.norm_backward(call);
        },
        "Run NormBackward: sizes rows, cols, x_row; addresses of x, dy, dsum, weight, mean, rstd, dx, dweight, dbias, "
        "workspace.");
  m.def("gated",
        [](bool backward, int kind, const py::tuple& sizes, const py::tuple& addresses, bool bf16, int threads) {
          if (kind < 0 || kind > 2) throw std::invalid_argument("gated: unknown kind");
          const Pack n("gated", sizes, 4), a("gated", addresses, 5);
          const Gated call{static_cast<Gate>(kind), n.size(0),          n.size(1), a.address<void>(0), n.size(2),
                           a.address<void>(1),      n.size(3),          a.address<void>(2), a.address<void>(3),
                           a.address<void>(4),      bf16,               threads};
          py::gil_scoped_release release;
          backward ? kernels.rows.gated_backward(call) : kernels.rows.gated_forward(call);
        },
        "Run Gated: sizes rows, cols, a_row, b_row; addresses of a, b, dy, y, db.");
  m.def("rotary",
        [](bool interleaved, bool inverse, const py::tuple& sizes, const py::tuple& addresses, bool bf16, int threads) {
          const Pack n("rotary", sizes, 14), a("rotary", addresses, 4);
          const Rotary call{n.size(0), n.size(1), n.size(2), n.size(3), n.size(4),
                            a.address<void>(0), {n.size(5), n.size(6), n.size(7)},
                            a.address<void>(1), {n.size(8), n.size(9), n.size(10)},
                            a.address<float>(2), a.address<float>(3), {n.size(11), n.size(12), n.size(13)},
                            interleaved, inverse, bf16, threads};
          py::gil_scoped_release release;
          kernels.rows.rotary(call);
        },
        "Run Rotary: sizes B, H, S, D, half, then the strides of x, y and the tables; addresses of x, y, cos, sin.");
  m.def("softmax",
        [](const py::tuple& sizes, const py::tuple& addresses, float scale, bool bf16, int threads) {
          const Pack n("softmax", sizes, 9), a("softmax", addresses, 4);
          const Softmax call{n.size(0), n.size(1), a.address<void>(0), n.size(2), a.address<bool>(1),
                             {n.size(3), n.size(4)}, {n.size(5), n.size(6), n.size(7), n.size(8)},
                             a.address<void>(2), a.address<float>(3), scale, bf16, threads};
          py::gil_scoped_release release;
          kernels.rows.softmax(call);
        },
        "Run Softmax: sizes rows, cols, x_row, mask_sizes, mask_strides; addresses of x, mask, y, workspace.");
}

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

// --- losses: an argument of Python is a tuple with the fields of the struct of that name in csrc/loss.h ---

LossTile tile_of(const py::tuple& a) {
  const LossTile tile{a[0].cast<int64_t>(), a[1].cast<int64_t>(), a[2].cast<int64_t>(), a[3].cast<int>()};
  if (tile.rows < 0 || tile.cols < 0 || tile.first < 0 || tile.threads < 1)
    throw std::invalid_argument("loss: sizes out of range");
  return tile;
}

template <class P>
P* at(const py::tuple& a, int i) {
  return pointer<P>(a[i].cast<uintptr_t>());
}

template <class S>
Logits<S> logits_of(const py::tuple& a) {
  return {at<const S>(a, 0), a[1].cast<int64_t>(), at<const Compute<S>>(a, 2), a[3].cast<double>(),
          a[4].cast<double>()};
}

template <class S>
Targets<S> targets_of(const py::tuple& a) {
  return {at<const int64_t>(a, 0), at<const Compute<S>>(a, 1), at<const S>(a, 2), a[3].cast<int64_t>(),
          a[4].cast<double>(), a[5].cast<double>()};
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

// --- attention: a strided tensor is (address, strides of B, H and S), or None ---

template <class P>
Strided<P> strided_of(const py::handle& x) {
  if (x.is_none()) return {};
  const auto a = py::reinterpret_borrow<py::tuple>(x);
  return {at<P>(a, 0), a[1].cast<int64_t>(), a[2].cast<int64_t>(), a[3].cast<int64_t>()};
}

// The fields of csrc/attention.h by kind, each kind in its order there; none of the gradients' in a forward pass.
template <class S>
Attention<S> attention_of(const py::tuple& sizes, const py::tuple& numbers, const py::tuple& strided,
                          const py::tuple& addresses) {
  const Pack n("attention", sizes, 16), at("attention", addresses, 6);
  if (strided.size() != 13 || numbers.size() != 2) throw std::invalid_argument("attention: wrong number of arguments");
  using T = Compute<S>;
  Attention<S> a{};
  a.batch = n.size(0), a.heads = n.size(1), a.kv_heads = n.size(2), a.queries = n.size(3), a.keys = n.size(4);
  a.dim = n.size(5), a.value_dim = n.size(6), a.is_causal = n.size(7), a.left = n.size(8), a.right = n.size(9);
  a.column = n.size(10), a.slopes_batch = n.size(11), a.dbias_add = n.size(12), a.batch_shared = n.size(13);
  a.heads_shared = n.size(14), a.threads = static_cast<int>(n.size(15));
  if (a.batch < 1 || a.kv_heads < 1 || a.heads < 1 || a.heads % a.kv_heads || a.queries < 1 || a.keys < 1 ||
      a.dim < 1 || a.value_dim < 1 || a.threads < 1 || a.column < 0 || a.column > 1)
    throw std::invalid_argument("attention: sizes out of range");
  a.scale = numbers[0].cast<double>(), a.softcap = numbers[1].cast<double>();
  a.query = strided_of<const S>(strided[0]), a.key = strided_of<const S>(strided[1]);
  a.value = strided_of<const S>(strided[2]), a.bias = strided_of<const T>(strided[3]);
  a.mask = strided_of<const uint8_t>(strided[4]), a.out = strided_of<S>(strided[5]), a.lse = strided_of<T>(strided[6]);
  a.dout = strided_of<const S>(strided[7]), a.dlse = strided_of<const T>(strided[8]);
  a.dquery = strided_of<S>(strided[9]), a.dkey = strided_of<S>(strided[10]), a.dvalue = strided_of<S>(strided[11]);
  a.dbias = strided_of<T>(strided[12]);
  a.spans = at.address<int64_t>(0), a.sinks = at.address<T>(1), a.slopes = at.address<T>(2);
  a.query_ids = at.address<int64_t>(3), a.key_ids = at.address<int64_t>(4), a.workspace = at.address<void>(5);
  return a;
}

template <class S>
size_t run_attention(const AttentionKernels<S>& kernels, const Attention<S>& a, bool backward) {
  py::gil_scoped_release release;
  return backward ? kernels.backward(a) : kernels.forward(a);
}

#ifdef FASTLM_CUDA
// From (cell, number, batch, hidden, directions).
cuda::Layer layer_of(const py::tuple& a) {
  const auto at = [&](int i) { return a[i].cast<int>(); };
  const cuda::Layer l{static_cast<Cell>(at(0)), static_cast<cuda::Number>(at(1)), at(2), at(3), at(4)};
  if (a.size() != 5 || at(0) < 0 || at(0) > 3 || at(1) < 0 || at(1) > 4 || l.batch < 1 || l.hidden < 1 ||
      l.directions < 1 || l.directions > 2)
    throw std::invalid_argument("rnn: sizes out of range");
  return l;
}

cuda::Chip chip_of(const py::tuple& a) { return {a[0].cast<int>(), a[1].cast<int>()}; }

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
          return py::dict("m_tiles"_a = p.m_tiles, "n_tiles"_a = p.n_tiles, "units"_a = p.units,
                          "slices"_a = p.slices, "groups"_a = p.groups, "teams"_a = p.teams, "depth"_a = p.depth,
                          "blocks"_a = p.blocks, "shared"_a = p.shared, "workspace"_a = p.workspace,
                          "cost"_a = p.cost);
        },
        "Return cuda::plan of a layer (cell, number, batch, hidden, directions) on a chip (multiprocessors, bytes of "
        "shared memory that a block may use); None where nothing fits.");
  m.def("rnn_resident_blocks",
        [](const py::tuple& layer, bool backward, const py::tuple& chip) {
          return cuda::rnn_resident_blocks(layer_of(layer), backward, chip_of(chip));
        },
        "Return how many blocks of the pass the current GPU holds at a time.");
  const auto pass_of = [](const py::tuple& layer, const py::tuple& chip, int64_t steps, uintptr_t batch_sizes,
                          uintptr_t workspace) {
    if (steps < 1 || steps > INT32_MAX) throw std::invalid_argument("rnn: sizes out of range");
    return cuda::RnnPass{layer_of(layer), steps, pointer<const int64_t>(batch_sizes), chip_of(chip),
                         pointer<void>(workspace)};
  };
  m.def("rnn_forward",
        [=](const py::tuple& layer, const py::tuple& chip, int64_t steps, uintptr_t batch_sizes, uintptr_t workspace,
            const std::vector<std::tuple<py::tuple, int64_t, int64_t>>& directions, bool train, uintptr_t stream) {
          const cuda::RnnPass pass = pass_of(layer, chip, steps, batch_sizes, workspace);
          if (int(directions.size()) != pass.layer.directions) throw std::invalid_argument("rnn: directions");
          cuda::RnnForward d[2] = {};
          for (size_t i = 0; i < directions.size(); ++i) {
            const Pack a("rnn_forward", std::get<0>(directions[i]), 10);
            d[i] = {a.address<void>(0), a.address<void>(1), a.address<void>(2), a.address<void>(3),
                    a.address<void>(4), a.address<void>(5), a.address<void>(6), a.address<void>(7),
                    a.address<void>(8), a.address<void>(9), std::get<1>(directions[i]), std::get<2>(directions[i])};
          }
          py::gil_scoped_release release;
          cuda::rnn_forward(pass, d, train, pointer<void>(stream));
        },
        "Queue RnnForward on a stream; a direction is (addresses, gates_row, y_row), in the order of its fields.");
  m.def("rnn_backward",
        [=](const py::tuple& layer, const py::tuple& chip, int64_t steps, uintptr_t batch_sizes, uintptr_t workspace,
            const std::vector<std::tuple<py::tuple, int64_t, int64_t>>& directions, uintptr_t stream) {
          const cuda::RnnPass pass = pass_of(layer, chip, steps, batch_sizes, workspace);
          if (int(directions.size()) != pass.layer.directions) throw std::invalid_argument("rnn: directions");
          cuda::RnnBackward d[2] = {};
          for (size_t i = 0; i < directions.size(); ++i) {
            const Pack a("rnn_backward", std::get<0>(directions[i]), 12);
            d[i] = {a.address<void>(0), a.address<void>(1), a.address<void>(2),  a.address<void>(3),
                    a.address<void>(4), a.address<void>(5), a.address<void>(6),  a.address<void>(7),
                    a.address<void>(8), a.address<void>(9), a.address<void>(10), a.address<void>(11),
                    std::get<1>(directions[i]), std::get<2>(directions[i])};
          }
          py::gil_scoped_release release;
          cuda::rnn_backward(pass, d, pointer<void>(stream));
        },
        "Queue RnnBackward on a stream; a direction is (addresses, y_row, dgates_row), in the order of its fields.");
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  kernels = choose_kernels();
  m.doc() = "Kernels in C++ and CUDA; see csrc/*.h for what each pointer means.";
  m.attr("isa") = kernels.name;
  m.attr("cpu") = cpu_of(kernels);
  m.attr("pairs") = kernels.pairs;
  m.attr("bf16_arithmetic") = Features().avx512_bf16;
  m.attr("fp16_arithmetic") = Features().avx512_fp16;

  m.def("addresses", &addresses, "Return where tensors lie, 0 for None; raise where a kernel could not take one.");
  m.def("rnn_step", &rnn_step, "Run one step of one layer without gradients: RnnDirect with its results.");
  m.def("rnn_workspace",
        [](const py::tuple& sizes, bool backward, size_t number) {
          const RnnProblem p = problem(sizes);
          return with_kernels(p, number, [&](const auto& k) { return k.workspace(p, backward, number); });
        },
        "Return the bytes of workspace that a call needs.");
  m.def("rnn_forward",
        [](const py::tuple& sizes, size_t number, bool train, const py::tuple& addresses) {
          const RnnProblem p = problem(sizes);
          with_kernels(p, number, [&](const auto& k) {
            forward<typename std::decay_t<decltype(k)>::Number>(k.forward, p, addresses, train);
          });
        },
        "Run RnnForward: addresses of w_hh, w_hr, b_hn, gates, h0, c0, y, c, hn, cn, workspace.");
  m.def("rnn_backward",
        [](const py::tuple& sizes, size_t number, int64_t ld, const py::tuple& addresses) {
          const RnnProblem p = problem(sizes);
          with_kernels(p, number, [&](const auto& k) {
            backward<typename std::decay_t<decltype(k)>::Number>(k.backward, p, addresses, ld);
          });
        },
        "Run RnnBackward: addresses of w_hh, w_hr, gates, y, c, h0, c0, dy, dhn, dcn, dgates, dh0, dc0, workspace.");
  m.def("rnn_direct",
        [](const py::tuple& sizes, size_t number, bool train, const py::tuple& addresses, int weights, int64_t inputs) {
          const RnnProblem p = problem(sizes);
          if (number == 4)
            direct<float>(kernels.rnn_f32.direct, p, weights, inputs, addresses, train);
          else
            direct<double>(kernels.rnn_f64.direct, p, weights, inputs, addresses, train);
        },
        "Run RnnDirect: addresses of x, w_ih, w_hh, b_ih, b_hh, h0, c0, gates, y, c, hn, cn.");
  define_product(m);
  define_rows(m);
  define_loss(m);
  m.def("attention",
        [](bool backward, int number, const py::tuple& sizes, const py::tuple& numbers, const py::tuple& strided,
           const py::tuple& addresses) {
          const auto run = [&](const auto& kernels, auto s) {
            return run_attention(kernels, attention_of<decltype(s)>(sizes, numbers, strided, addresses), backward);
          };
          if (number == 2) return run(kernels.attention_bf16, Bf16());
          return number == 8 ? run(kernels.attention_f64, double()) : run(kernels.attention_f32, float());
        },
        "Run Attention over numbers of 2 (bfloat16), 4 or 8 bytes; where the address of the workspace is 0, return its "
        "bytes instead.");

  m.attr("vnni") = kernels.quantized_linear != nullptr;
#if defined(__x86_64__)
  m.attr("amx") = __builtin_cpu_supports("amx-int8") != 0;
#else
  m.attr("amx") = false;
#endif
  m.def("quantized_linear_workspace",
        [](int kind, int number, int64_t rows, int64_t in, int64_t out, int64_t group, int threads) {
          return kernels.quantized_linear_workspace(quantized(kind, number, rows, in, out, group, threads));
        },
        "Return the bytes of workspace that a call needs.");
  m.def("quantized_linear",
        [](int kind, int number, int64_t rows, int64_t in, int64_t out, int64_t group, int threads,
           const py::tuple& a) {
          if (a.size() != 6) throw std::invalid_argument("quantized_linear: expected 6 addresses");
          QuantizedLinear p = quantized(kind, number, rows, in, out, group, threads);
          const auto at = [&](int i) { return a[i].cast<uintptr_t>(); };
          p.x = pointer<void>(at(0)), p.weight = pointer<void>(at(1)), p.scale = pointer<float>(at(2));
          p.bias = pointer<float>(at(3)), p.y = pointer<void>(at(4)), p.workspace = pointer<void>(at(5));
          py::gil_scoped_release release;
          kernels.quantized_linear(p);
        },
        "Run QuantizedLinear: addresses of x, weight, scale, bias, y, workspace.");
#ifdef FASTLM_CUDA
  define_cuda(m.def_submodule("cuda", "The kernels for NVIDIA GPUs."));
#endif
}
