// The plain twin of copy_rows: a thread a row, element after element.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/layout.h"
#include "zigzag/error.h"

namespace zigzag::cuda {
namespace {

constexpr int kMaxDims = 8;
constexpr int kThreads = 128;

/// Shape and strides of a row, in elements.
struct PlainParams {
  const Segment* segments;
  std::int64_t num_segments;
  std::int64_t rows;  // of all segments
  int dims;           // of a row
  std::int64_t shape[kMaxDims];
  std::int64_t source_strides[kMaxDims];
  std::int64_t destination_strides[kMaxDims];
  std::int64_t source_row_stride;
  std::int64_t destination_row_stride;
  std::int64_t row_elements;
  const void* source;
  void* destination;
};

template <typename Element>
__global__ void copy_rows_plain_kernel(const PlainParams p) {
  std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  std::int64_t s = 0;
  while (row >= p.segments[s].rows) row -= p.segments[s++].rows;
  const auto* from = static_cast<const Element*>(p.source) +
                     (p.segments[s].source_row + row) * p.source_row_stride;
  auto* to = static_cast<Element*>(p.destination) +
             (p.segments[s].destination_row + row) * p.destination_row_stride;
  for (std::int64_t e = 0; e < p.row_elements; ++e) {
    std::int64_t rest = e;
    std::int64_t source = 0;
    std::int64_t destination = 0;
    for (int d = p.dims - 1; d >= 0; --d) {
      const std::int64_t index = rest % p.shape[d];
      rest /= p.shape[d];
      source += index * p.source_strides[d];
      destination += index * p.destination_strides[d];
    }
    to[destination] = from[source];
  }
}

void launch(const PlainParams& params, std::int64_t size, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((params.rows + kThreads - 1) / kThreads);
  switch (size) {
    case 1:
      copy_rows_plain_kernel<std::uint8_t><<<blocks, kThreads, 0, stream>>>(params);
      break;
    case 2:
      copy_rows_plain_kernel<std::uint16_t><<<blocks, kThreads, 0, stream>>>(params);
      break;
    case 4:
      copy_rows_plain_kernel<std::uint32_t><<<blocks, kThreads, 0, stream>>>(params);
      break;
    default:
      copy_rows_plain_kernel<std::uint64_t><<<blocks, kThreads, 0, stream>>>(params);
      break;
  }
  check_launch("copy_rows_plain_kernel");
}

}  // namespace

void copy_rows_plain(std::span<const TensorView> sources, const TensorView& destination,
                     std::span<const Segment> segments, void* stream_pointer) {
  const std::size_t dims = destination.shape.size() - 1;
  if (dims > kMaxDims) {
    throw DeviceError("rows of " + std::to_string(dims) +
                      " dimensions were given; the plain copy takes up to " +
                      std::to_string(kMaxDims));
  }
  const cudaStream_t stream = as_stream(stream_pointer);
  DeviceState& device = DeviceState::get(destination.device.index);
  DeviceGuard guard(destination.device.index);
  for (std::size_t i = 0; i < sources.size(); ++i) {
    std::vector<Segment> mine;
    PlainParams params{};
    for (const Segment& segment : segments) {
      if (segment.rows <= 0 || segment.source != static_cast<std::int64_t>(i)) continue;
      mine.push_back(segment);
      params.rows += segment.rows;
    }
    params.row_elements = destination.row_elements();
    if (params.rows == 0 || params.row_elements == 0) continue;
    params.dims = static_cast<int>(dims);
    for (std::size_t d = 0; d < dims; ++d) {
      params.shape[d] = destination.shape[d + 1];
      params.source_strides[d] = sources[i].strides[d + 1];
      params.destination_strides[d] = destination.strides[d + 1];
    }
    params.source_row_stride = sources[i].strides[0];
    params.destination_row_stride = destination.strides[0];
    params.source = sources[i].data;
    params.destination = destination.data;
    const auto table = device.table(mine.data(), mine.size() * sizeof(Segment));
    const TableUse use(table, stream);
    params.segments = use.as<Segment>();
    params.num_segments = static_cast<std::int64_t>(mine.size());
    launch(params, item_size(destination.dtype), stream);
  }
}

}  // namespace zigzag::cuda
