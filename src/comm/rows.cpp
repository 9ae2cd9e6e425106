#include "comm/rows.h"

#include <cstring>

#include <fmt/format.h>

#include "zigzag/error.h"

namespace zigzag::comm {

RowView::RowView(const TensorView& view) {
  if (view.device.type != DeviceType::kCpu) {
    throw InvalidArgument(fmt::format("this transport moves host memory; a tensor on {} was given",
                                      device_name(view.device)));
  }
  if (view.shape.empty() || view.shape.size() != view.strides.size()) {
    throw InvalidArgument(
        fmt::format("a tensor of shape {} has no rows to exchange", shape_text(view.shape)));
  }
  const std::int64_t item = item_size(view.dtype);
  // Tensors without elements come with any strides.
  if (view.shape.size() > 1 && view.num_elements() > 0 && view.shape.back() > 1 &&
      view.strides.back() != 1) {
    throw InvalidArgument(
        fmt::format("a tensor of shape {} has stride {} in its last dimension; "
                    "it must be 1",
                    shape_text(view.shape), view.strides.back()));
  }
  data = static_cast<std::byte*>(view.data);
  rows = view.shape[0];
  row_bytes = view.row_elements() * item;
  row_stride = view.strides[0] * item;
  run_bytes = item;
  run_stride = 0;
  // From the last dimension back: first what continues the run, then at most one level of runs.
  for (std::size_t d = view.shape.size(); d-- > 1;) {
    const std::int64_t extent = view.shape[d];
    const std::int64_t stride = view.strides[d] * item;
    if (extent == 1) continue;
    if (runs == 1 && stride == run_bytes) {
      run_bytes *= extent;
    } else if (runs == 1) {
      runs = extent;
      run_stride = stride;
    } else if (stride == run_stride * runs) {
      runs *= extent;
    } else {
      throw InvalidArgument(fmt::format(
          "a tensor of shape {} has strides that leave more than one kind of gap inside a row",
          shape_text(view.shape)));
    }
  }
}

RowView::RowView(std::byte* memory, std::int64_t row_count, std::int64_t bytes)
    : data(memory), rows(row_count), row_bytes(bytes), row_stride(bytes), run_bytes(bytes) {}

void copy_rows(const RowView& to, std::int64_t to_row, const RowView& from, std::int64_t from_row,
               std::int64_t count) {
  if (count <= 0 || to.row_bytes == 0) return;
  std::byte* out = to.row(to_row);
  const std::byte* in = from.row(from_row);
  if (to.dense() && from.dense()) {
    std::memcpy(out, in, static_cast<std::size_t>(count * to.row_bytes));
    return;
  }
  // Where only one side is broken into runs, the other's row is cut at the same places.
  const bool broken = from.runs >= to.runs;
  const std::int64_t runs = broken ? from.runs : to.runs;
  const auto bytes = static_cast<std::size_t>(broken ? from.run_bytes : to.run_bytes);
  const std::int64_t out_stride = to.runs == 1 ? static_cast<std::int64_t>(bytes) : to.run_stride;
  const std::int64_t in_stride =
      from.runs == 1 ? static_cast<std::int64_t>(bytes) : from.run_stride;
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t j = 0; j < runs; ++j) {
      std::memcpy(out + j * out_stride, in + j * in_stride, bytes);
    }
    out += to.row_stride;
    in += from.row_stride;
  }
}

std::int64_t count_rows(std::span<const Segment> segments, std::int64_t begin, std::int64_t end) {
  std::int64_t total = 0;
  for_each_part(segments, begin, end,
                [&](std::int64_t, std::int64_t, std::int64_t rows) { total += rows; });
  return total;
}

}  // namespace zigzag::comm
