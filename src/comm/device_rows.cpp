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

void add_own_rows(std::span<const TensorView> partials, std::span<const TensorView> sums,
                  std::span<const TensorView> destinations, const ExchangeTable& table, int rank,
                  Queue queue) {
  constexpr std::uint64_t kAddOwn = 50;
  const auto build = [&] {
    std::vector<cuda::SumPart> parts{{0, 0, 0, table.local_tokens}};
    for (const Segment& segment : table.sends[static_cast<std::size_t>(rank)]) {
      parts.push_back({1, segment.source_row, segment.destination_row, segment.rows});
    }
    return cuda::make_sum_table(parts, 2, table.local_tokens);
  };
  const cuda::TableKey key{list_key(table, kAddOwn), 0, 33};
  for (std::size_t t = 0; t < partials.size(); ++t) {
    const void* const sources[] = {sums[t].data, partials[t].data};
    cuda::sum_rows(sources, DType::kFloat32, 1, destinations[t], key, build, queue.stream);
  }
}

}  // namespace zigzag::comm
