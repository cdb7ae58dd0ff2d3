// What Python sees of the kernels. Addresses arrive as integers, checked by the caller; the GIL is released.

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "rnn.h"
#ifdef FASTLM_CUDA
#include "cuda/rnn.h"
#endif

namespace py = pybind11;

namespace fastlm {
FASTLM_DECLARE_RNN(generic)
#ifdef FASTLM_AVX2
FASTLM_DECLARE_RNN(avx2)
#endif
#ifdef FASTLM_AVX512
FASTLM_DECLARE_RNN(avx512)
#endif
}  // namespace fastlm

namespace {

using namespace fastlm;

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  size_t (*rnn_workspace)(const RnnProblem&, bool, size_t);
  void (*rnn_forward_f32)(const RnnProblem&, const RnnForward<float>&);
  void (*rnn_forward_f64)(const RnnProblem&, const RnnForward<double>&);
  void (*rnn_backward_f32)(const RnnProblem&, const RnnBackward<float>&);
  void (*rnn_backward_f64)(const RnnProblem&, const RnnBackward<double>&);
};

#define FASTLM_KERNELS(isa) \
  Kernels{#isa, isa::rnn_workspace, isa::rnn_forward, isa::rnn_forward, isa::rnn_backward, isa::rnn_backward}

// The widest set that was built, that this CPU has, and that FASTLM_MAX_ISA allows.
Kernels choose_kernels() {
  const char* names[] = {"generic", "avx2", "avx512"};
  const char* cap = std::getenv("FASTLM_MAX_ISA");
  int most = 2;
  if (cap && *cap) {
    for (most = 0; std::string(names[most]) != cap; ++most)
      if (most == 2) throw std::runtime_error("FASTLM_MAX_ISA must be generic, avx2 or avx512, got " + std::string(cap));
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
#endif
#endif
  return found;
}

Kernels kernels;

template <class P>
P* pointer(uintptr_t address) {
  return reinterpret_cast<P*>(address);
}

// From (cell, reverse, steps, batch, hidden, batch_sizes, threads, first, last).
RnnProblem problem(const py::tuple& p) {
  if (p.size() != 9) throw std::invalid_argument("rnn: expected 9 numbers");
  const auto at = [&](int i) { return p[i].cast<int64_t>(); };
  const RnnProblem found{static_cast<Cell>(at(0)), at(1) != 0, at(2), at(3), at(4),
                         pointer<const int64_t>(p[5].cast<uintptr_t>()), static_cast<int>(at(6)), at(7), at(8)};
  if (at(0) < 0 || at(0) > 3 || found.steps < 1 || found.batch < 0 || found.hidden < 1 || found.threads < 1 ||
      found.first < 0 || found.first >= found.last || found.last > found.steps)
    throw std::invalid_argument("rnn: sizes out of range");
  return found;
}

template <class T, class Kernel>
void forward(Kernel kernel, const RnnProblem& p, const py::tuple& a, bool train) {
  if (a.size() != 10) throw std::invalid_argument("rnn_forward: expected 10 addresses");
  const auto at = [&](int i) { return pointer<T>(a[i].cast<uintptr_t>()); };
  const RnnForward<T> call{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), train, at(9)};
  py::gil_scoped_release release;
  kernel(p, call);
}

template <class T, class Kernel>
void backward(Kernel kernel, const RnnProblem& p, const py::tuple& a, int64_t ld) {
  if (a.size() != 13) throw std::invalid_argument("rnn_backward: expected 13 addresses");
  const auto at = [&](int i) { return pointer<T>(a[i].cast<uintptr_t>()); };
  const RnnBackward<T> call{at(0), at(1), at(2), at(3), at(4),  at(5),  at(6),
                            at(7), at(8), at(9), ld,    at(10), at(11), at(12)};
  py::gil_scoped_release release;
  kernel(p, call);
}

#ifdef FASTLM_CUDA
// The same calls on a GPU, with the stream last.
void define_cuda(py::module_ m) {
  m.attr("built_version") = cuda::built_version();
  m.def("driver_version", &cuda::driver_version,
        "Return the newest CUDA version that the installed driver knows, as 1000·major + 10·minor; 0: no driver.");
  m.def("rnn_workspace",
        [](const py::tuple& sizes, bool backward, size_t number) {
          return cuda::rnn_workspace(problem(sizes), backward, number);
        },
        "Return the bytes of workspace that a call needs.");
  m.def("rnn_forward",
        [](const py::tuple& sizes, size_t number, bool train, const py::tuple& addresses, uintptr_t stream) {
          const RnnProblem p = problem(sizes);
          const auto kernel = [&](const RnnProblem& p, const auto& call) {
            cuda::rnn_forward(p, call, pointer<void>(stream));
          };
          if (number == 4)
            forward<float>(kernel, p, addresses, train);
          else
            forward<double>(kernel, p, addresses, train);
        },
        "Queue RnnForward on a stream: addresses as on the CPU.");
  m.def("rnn_backward",
        [](const py::tuple& sizes, size_t number, int64_t ld, const py::tuple& addresses, uintptr_t stream) {
          const RnnProblem p = problem(sizes);
          const auto kernel = [&](const RnnProblem& p, const auto& call) {
            cuda::rnn_backward(p, call, pointer<void>(stream));
          };
          if (number == 4)
            backward<float>(kernel, p, addresses, ld);
          else
            backward<double>(kernel, p, addresses, ld);
        },
        "Queue RnnBackward on a stream: addresses as on the CPU.");
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  kernels = choose_kernels();
  m.doc() = "Kernels in C++ and CUDA; see csrc/*.h for what each pointer means.";
  m.attr("isa") = kernels.name;
#if defined(__x86_64__)
  m.attr("bf16_arithmetic") = __builtin_cpu_supports("avx512bf16") != 0;
#else
  m.attr("bf16_arithmetic") = false;
#endif

  m.def("rnn_workspace",
        [](const py::tuple& sizes, bool backward, size_t number) {
          return kernels.rnn_workspace(problem(sizes), backward, number);
        },
        "Return the bytes of workspace that a call needs.");
  m.def("rnn_forward",
        [](const py::tuple& sizes, size_t number, bool train, const py::tuple& addresses) {
          const RnnProblem p = problem(sizes);
          if (number == 4)
            forward<float>(kernels.rnn_forward_f32, p, addresses, train);
          else
            forward<double>(kernels.rnn_forward_f64, p, addresses, train);
        },
        "Run RnnForward: addresses of w_hh, b_hn, gates, h0, c0, y, c, hn, cn, workspace.");
  m.def("rnn_backward",
        [](const py::tuple& sizes, size_t number, int64_t ld, const py::tuple& addresses) {
          const RnnProblem p = problem(sizes);
          if (number == 4)
            backward<float>(kernels.rnn_backward_f32, p, addresses, ld);
          else
            backward<double>(kernels.rnn_backward_f64, p, addresses, ld);
        },
        "Run RnnBackward: addresses of w_hh, gates, y, c, h0, c0, dy, dhn, dcn, dgates, dh0, dc0, workspace.");
#ifdef FASTLM_CUDA
  define_cuda(m.def_submodule("cuda", "The kernels for NVIDIA GPUs."));
#endif
}
