#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "zigzag/tensor.h"

namespace zigzag::test {

/// A view into fenced memory: everything, the gaps between strided rows and 256 bytes before and
/// behind included, starts as poison (a NaN that no arithmetic makes; 0xA5 for integers). Views cut
/// from one tensor share its memory.
class Tensor {
 public:
  Tensor() = default;
  /// Row-major.
  Tensor(DType dtype, std::vector<std::int64_t> shape);

  const TensorView& view() const { return view_; }
  operator const TensorView&() const { return view_; }  // NOLINT: reads as a view everywhere

  /// Entries [begin, begin + count) along `dim`.
  Tensor slice(std::size_t dim, std::int64_t begin, std::int64_t count) const;
  /// One entry along `dim`, which goes away.
  Tensor select(std::size_t dim, std::int64_t index) const;

  /// Empty when every byte of the memory outside of `views` still is poison; otherwise a sentence.
  std::string touched_outside(std::span<const TensorView> views) const;
  std::string touched_outside() const { return touched_outside({&view_, 1}); }

 private:
  std::shared_ptr<std::vector<std::byte>> memory_;
  TensorView view_;
};

/// Position in elements of the element with this row-major number.
std::int64_t element_offset(const TensorView& view, std::int64_t number);

/// The element as a double, and back with rounding to the view's type.
double load(const TensorView& view, std::int64_t number);
void store(const TensorView& view, std::int64_t number, double value);

/// All elements in row-major order.
std::vector<double> values(const TensorView& view);
/// Their bytes.
std::vector<std::byte> bytes(const TensorView& view);

/// Fills with bits that differ from element to element, whatever the type.
void fill_bits(const TensorView& view, std::uint64_t seed);

/// How many elements still are poison. Only for floating types.
std::int64_t count_poison(const TensorView& view);

}  // namespace zigzag::test
