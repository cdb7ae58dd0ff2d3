// Tensors as Python passed them, read through DLPack's C interface (version 1, DLPackExchangeAPI), by which torch shows
// where a tensor lies: one call in place of six attributes, which take 0.8 µs more (benchmarks/LOG.md 2026-11-27).

#pragma once

#include <initializer_list>
#include <vector>

#include "arguments.h"

namespace fastlm {

// What a number is, in DLPack's terms.
struct Dtype {
  uint8_t code, bits;
  bool operator==(const Dtype& other) const { return code == other.code && bits == other.bits; }
};

constexpr Dtype kFloat32{2, 32}, kFloat64{2, 64}, kFloat16{2, 16}, kBfloat16{4, 16}, kInt8{0, 8}, kUint8{1, 8};

// DLPack's DLTensor.
struct DenseTensor {
  void* data;
  int32_t device, device_index, dimensions;
  Dtype dtype;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};

// What this module asks of torch: its plain classes, whose tensors have memory, and DLPack's table of functions.
class Torch {
  struct Exchange {  // DLPackExchangeAPI
    uint32_t major, minor;
    void *older, *allocate, *own, *give;
    int (*read)(void* object, DenseTensor* found);
    void* stream;
  };
  const Exchange* exchange;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const py::object of = torch.attr("Tensor"), table = py::getattr(of, "__dlpack_c_exchange_api__", py::none());
    exchange = table.is_none() ? nullptr : table.cast<py::capsule>().get_pointer<const Exchange>();
    if (!exchange || exchange->major != 1 || !exchange->read)
      throw py::import_error("fastlm._native: this torch has no DLPack interface of version 1");
    tensor = py::object(of).release();
    parameter = py::object(torch.attr("nn").attr("Parameter")).release();
    empty_like = py::object(torch.attr("empty_like")).release();
  }

 public:
  py::handle tensor, parameter, empty_like;

  // First when the module is loaded, so that what is missing is a reason and not an error later.
  static const Torch& get() {
    static const Torch only;
    return only;
  }
  bool plain(py::handle t) const {
    const py::handle type = py::type::handle_of(t);
    return type.is(tensor) || type.is(parameter);
  }
  // Of a tensor alone; what it points to lives as long as that.
  DenseTensor read(py::handle t) const {
    DenseTensor found;
    if (exchange->read(t.ptr(), &found)) throw py::error_already_set();
    return found;
  }
};

inline Address at(const DenseTensor& t) { return {reinterpret_cast<uintptr_t>(t.data) + t.byte_offset}; }

// Whether a kernel on the CPU finds the tensor's numbers side by side.
inline bool dense(const DenseTensor& t) {
  int64_t stride = 1;
  bool ordered = true;
  for (int32_t i = t.dimensions; i-- > 0; stride *= t.shape[i])
    ordered = ordered && (t.shape[i] == 1 || t.strides[i] == stride);
  return t.device == 1 && t.lanes == 1 && (ordered || stride == 0);
}

// The tensors of a call as its caller gave them, unchecked: `fits` turns false at the first that a kernel cannot read.
class Tensors {
 public:
  bool fits = true;

  // A plain tensor, dense, on the CPU and not empty, where `fits`; not negated lazily, as `z.conj().imag` is.
  DenseTensor read(py::handle t) {
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    DenseTensor found{};
    fits = fits && Torch::get().plain(t);
    if (!fits) return found;
    const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(t.ptr(), is_neg));
    if (!negated) throw py::error_already_set();
    found = Torch::get().read(t);
    fits = dense(found) && !negated.is(py::handle(Py_True));
    for (int32_t i = 0; i < found.dimensions; ++i) fits = fits && found.shape[i] > 0;
    return found;
  }
  // Where such a tensor of this dtype and shape lies.
  template <class Shape>
  Address address(py::handle t, Dtype dtype, const Shape& shape) {
    const DenseTensor found = read(t);
    fits = fits && found.dtype == dtype && size_t(found.dimensions) == shape.size();
    const int64_t* size = found.shape;
    for (const int64_t expected : shape) fits = fits && *size++ == expected;
    return fits ? at(found) : Address{0};
  }
  Address address(py::handle t, Dtype dtype, std::initializer_list<int64_t> shape) {
    return address<std::initializer_list<int64_t>>(t, dtype, shape);
  }
  // A new tensor of this shape, beside x.
  py::object result(py::handle x, Dtype dtype, const std::vector<int64_t>& shape, Address& at) {
    py::tuple sizes(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) sizes[i] = shape[i];
    const py::object y = x.attr("new_empty")(sizes);
    at = address(y, dtype, shape);
    return y;
  }
};

}  // namespace fastlm
