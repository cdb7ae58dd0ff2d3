// How arguments come from Python: addresses as integers, which the caller has checked.

#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../isa.h"

namespace fastlm {

namespace py = pybind11;

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

inline Address at(const py::tuple& a, int i) { return {a[i].cast<uintptr_t>()}; }

// Addresses in the order of the struct's pointers; sizes and strides in the order of its integers.
class Pack {
 public:
  Pack(const char* name, const py::tuple& values, size_t count) : values_(values) {
    if (values.size() != count) throw std::invalid_argument(std::string(name) + ": wrong number of arguments");
  }
  Address operator[](int i) const { return at(values_, i); }
  int64_t size(int i) const { return values_[i].cast<int64_t>(); }

 private:
  const py::tuple& values_;
};

enum Attribute { kDtype, kDevice, kIsCpu, kIsContiguous, kDataPtr, kShape, kIsNeg, kRequiresGrad };

// What a tensor says of itself, by names that are made once.
struct Attributes {
  py::handle tensor;

  explicit Attributes(py::handle tensor) : tensor(tensor) {}
  py::object get(Attribute name) const { return checked(PyObject_GetAttr(tensor.ptr(), interned(name))); }
  py::object call(Attribute name) const { return checked(PyObject_CallMethodNoArgs(tensor.ptr(), interned(name))); }

 private:
  static PyObject* interned(Attribute name) {
    static PyObject* const names[] = {PyUnicode_InternFromString("dtype"),
                                      PyUnicode_InternFromString("device"),
                                      PyUnicode_InternFromString("is_cpu"),
                                      PyUnicode_InternFromString("is_contiguous"),
                                      PyUnicode_InternFromString("data_ptr"),
                                      PyUnicode_InternFromString("shape"),
                                      PyUnicode_InternFromString("is_neg"),
                                      PyUnicode_InternFromString("requires_grad")};
    return names[name];
  }
  static py::object checked(PyObject* found) {
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }
};

// The tensors of a call as its caller gave them, unchecked: `fits` turns false at the first that a kernel cannot read.
class Tensors {
  const py::tuple& types;  // classes of tensors that have memory

  bool readable(py::handle t) const {
    const py::handle type = py::type::handle_of(t);
    return type.is(types[0]) || type.is(types[1]);
  }

 public:
  bool fits = true;

  explicit Tensors(const py::tuple& types) : types(types) {}

  std::vector<int64_t> shape(py::handle t) {
    std::vector<int64_t> found;
    fits = fits && readable(t);
    if (!fits) return found;
    const py::object sizes = Attributes(t).get(kShape);
    fits = PyTuple_Check(sizes.ptr());
    for (Py_ssize_t i = 0; fits && i < PyTuple_GET_SIZE(sizes.ptr()); ++i)
      found.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i)));
    return found;
  }
  // Where a tensor of this dtype and shape lies, which is to be dense, on the CPU and not empty.
  template <class Shape>
  Address address(py::handle t, py::handle dtype, const Shape& shape) {
    const py::handle yes(Py_True);
    fits = fits && readable(t);
    if (!fits) return {0};
    const Attributes of(t);
    const py::object sizes = of.get(kShape);
    fits = of.get(kDtype).is(dtype) && of.get(kIsCpu).is(yes) && PyTuple_Check(sizes.ptr()) &&
           PyTuple_GET_SIZE(sizes.ptr()) == Py_ssize_t(shape.size()) && of.call(kIsContiguous).is(yes) &&
           !of.call(kIsNeg).is(yes);
    Py_ssize_t i = 0;
    for (const int64_t expected : shape) {
      const int64_t size = fits ? PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i++)) : 0;
      fits = size > 0 && size == expected;
    }
    return {fits ? of.call(kDataPtr).cast<uintptr_t>() : 0};
  }
  Address address(py::handle t, py::handle dtype, std::initializer_list<int64_t> shape) {
    return address<std::initializer_list<int64_t>>(t, dtype, shape);
  }
  // A new tensor of this shape, beside x.
  py::object result(py::handle x, py::handle dtype, const std::vector<int64_t>& shape, Address& at) {
    py::tuple sizes(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) sizes[i] = shape[i];
    const py::object y = x.attr("new_empty")(sizes);
    at = address(y, dtype, shape);
    return y;
  }
};

void define_rnn(py::module_& m);
void define_rows(py::module_& m);
void define_linear(py::module_& m);
void define_loss(py::module_& m);
void define_attention(py::module_& m);
#ifdef FASTLM_CUDA
void define_cuda(py::module_ m);
#endif

}  // namespace fastlm
