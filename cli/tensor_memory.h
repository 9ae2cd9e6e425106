#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "zigzag/tensor.h"

namespace zigzag::cli {

/// Memory of one tensor on the CPU or on a GPU, freed with its last owner; not initialised.
class TensorMemory {
 public:
  TensorMemory() = default;
  /// Throws DeviceError when the device has too little memory, std::bad_alloc when the host has.
  TensorMemory(DType dtype, std::vector<std::int64_t> shape, Device device = {});

  const TensorView& view() const { return view_; }
  std::int64_t bytes() const { return view_.num_elements() * item_size(view_.dtype); }
  std::int64_t row_bytes() const { return view_.row_elements() * item_size(view_.dtype); }
  /// First byte of a row; for tensors on the CPU.
  std::byte* row(std::int64_t index) const {
    return static_cast<std::byte*>(view_.data) + index * row_bytes();
  }
  /// The same values on `device`; itself when it is there already.
  TensorMemory to(Device device) const;

 private:
  std::shared_ptr<void> memory_;
  TensorView view_;
};

}  // namespace zigzag::cli
