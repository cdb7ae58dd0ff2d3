// Attention: a strided tensor is (address, strides of B, H and S), or None; csrc/attention.h.

#include "arguments.h"

namespace fastlm {
namespace {

template <class P>
Strided<P> strided_of(const py::handle& x) {
  if (x.is_none()) return {};
  const auto a = py::reinterpret_borrow<py::tuple>(x);
  return {at(a, 0), a[1].cast<int64_t>(), a[2].cast<int64_t>(), a[3].cast<int64_t>()};
}

// The fields of csrc/attention.h by kind, each kind in its order there; none of the gradients' in a forward pass.
template <class S>
Attention<S> attention_of(const py::tuple& sizes, const py::tuple& numbers, const py::tuple& strided,
                          const py::tuple& addresses) {
  const Pack n("attention", sizes, 16), p("attention", addresses, 6);
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
  a.spans = p[0], a.sinks = p[1], a.slopes = p[2], a.query_ids = p[3], a.key_ids = p[4], a.workspace = p[5];
  return a;
}

template <class S>
size_t run_attention(const AttentionKernels<S>& kernels, const Attention<S>& a, bool backward) {
  py::gil_scoped_release release;
  return backward ? kernels.backward(a) : kernels.forward(a);
}

}  // namespace

void define_attention(py::module_& m) {
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

}

}  // namespace fastlm
