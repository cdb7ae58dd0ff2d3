// How arguments come from Python: addresses as integers, which the caller has checked.

#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

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

void define_rnn(py::module_& m);
void define_rows(py::module_& m);
void define_linear(py::module_& m);
void define_loss(py::module_& m);
void define_attention(py::module_& m);
#ifdef FASTLM_CUDA
void define_cuda(py::module_ m);
#endif

}  // namespace fastlm
