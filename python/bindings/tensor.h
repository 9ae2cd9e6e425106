#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "zigzag/zigzag.h"

namespace zigzag::python {

namespace nb = nanobind;

/// A NumPy array or torch tensor (any DLPack or buffer object) that an operation reads or writes.
/// It keeps the array alive; copies share it.
struct Tensor {
  nb::ndarray<nb::ro> array;
  TensorView view;

  /// `dtype` names the element type when the array's own type does not (bfloat16 seen through
  /// uint16). Throws InvalidArgument for types without a DType and for sizes that differ.
  Tensor(nb::ndarray<nb::ro> source, const std::optional<std::string>& dtype);
  /// Memory of a GPU at `address` that `owner` keeps; strides in elements.
  Tensor(nb::object owner, std::uintptr_t address, const std::string& dtype,
         const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides, int gpu);
  /// Uninitialised memory of the type and on the device of `like`.
  static nb::ndarray<nb::array_api> allocate(const Tensor& like,
                                             const std::vector<std::size_t>& shape);
};

/// A NumPy array [n] that owns the numbers.
using IndexArray = nb::ndarray<nb::numpy, std::int64_t, nb::ndim<1>>;
IndexArray to_array(std::vector<std::int64_t> values);

/// The numbers of a NumPy int64 array [n].
using IndexInput = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

/// The mask of a call.
Mask make_mask(bool causal, std::pair<std::int64_t, std::int64_t> window);

void bind_tensor(nb::module_& module);
void bind_plan(nb::module_& module);
void bind_communicator(nb::module_& module);
void bind_operations(nb::module_& module);

}  // namespace zigzag::python
