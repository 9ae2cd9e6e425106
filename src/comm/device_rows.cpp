#include "comm/device_rows.h"

#include <string>

#include "zigzag/error.h"

namespace zigzag::comm {

void check_device(std::span<const TensorView> views, int device, int rank) {
  for (const TensorView& view : views) {
    if (view.device.type != DeviceType::kCuda || view.device.index != device) {
      throw DeviceError("rank " + std::to_string(rank) + " has a tensor on " +
                        device_name(view.device) +
                        "; its communicator uses cuda:" + std::to_string(device));
    }
  }
}

TensorView packed_like(const TensorView& view, const void* data, std::int64_t rows) {
  std::vector<std::int64_t> shape = view.shape;
  shape[0] = rows;
  return TensorView::contiguous(const_cast<void*>(data), view.dtype, std::move(shape), view.device);
}

}  // namespace zigzag::comm
