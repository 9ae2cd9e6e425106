#include "tensor_memory.h"

#include <new>

#include "cuda/runtime.h"

namespace zigzag::cli {
namespace {

constexpr std::align_val_t kAlignment{64};

}  // namespace

TensorMemory::TensorMemory(DType dtype, std::vector<std::int64_t> shape, Device device) {
  view_ = TensorView::contiguous(nullptr, dtype, std::move(shape), device);
  if (device.type == DeviceType::kCuda) {
    memory_ = cuda::allocate(device, bytes()).memory;
  } else {
    // At least one byte, so that the empty shard of a rank has an address as well.
    const auto size = static_cast<std::size_t>(bytes()) + 1;
    memory_ = std::shared_ptr<void>(::operator new(size, kAlignment),
                                    [](void* p) { ::operator delete(p, kAlignment); });
  }
  view_.data = memory_.get();
}

TensorMemory TensorMemory::to(Device device) const {
  if (device == view_.device) return *this;
  TensorMemory copy(view_.dtype, view_.shape, device);
  cuda::copy(copy.view_.data, view_.data, bytes());
  return copy;
}

}  // namespace zigzag::cli
