#include "cpu/copy.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"

namespace zigzag::cpu {

namespace {

using std::int64_t;

/// Bytes that one task copies: long enough to hide its start, short enough to balance.
constexpr int64_t kTaskBytes = int64_t{2} << 20;

/// One row, dimension after dimension down to the first that is one run of bytes.
void copy_strided(const TensorView& source, const std::byte* from, const TensorView& destination,
                  std::byte* to, std::size_t dim, std::size_t run_dim, int64_t run_bytes) {
  if (dim == run_dim) {
    std::memcpy(to, from, static_cast<std::size_t>(run_bytes));
    return;
  }
  const int64_t item = item_size(source.dtype);
  for (int64_t i = 0; i < source.shape[dim]; ++i) {
    copy_strided(source, from + i * source.strides[dim] * item, destination,
                 to + i * destination.strides[dim] * item, dim + 1, run_dim, run_bytes);
  }
}

/// The first dimension from which on both tensors are one run of elements; shape.size() when even
/// the last is strided.
std::size_t first_run_dim(const TensorView& a, const TensorView& b) {
  std::size_t dim = a.shape.size();
  int64_t expected = 1;
  while (dim > 1) {
    const std::size_t d = dim - 1;
    if (a.shape[d] != 1 && (a.strides[d] != expected || b.strides[d] != expected)) break;
    expected *= a.shape[d];
    --dim;
  }
  return dim;
}

struct RowCopy {
  RowCopy(const TensorView& from, const TensorView& to) : source(from), destination(to) {
    run_dim = first_run_dim(from, to);
    run_bytes = item_size(from.dtype);
    for (std::size_t d = run_dim; d < from.shape.size(); ++d) run_bytes *= from.shape[d];
    row_bytes = from.row_bytes();
    source_stride = from.strides[0] * item_size(from.dtype);
    destination_stride = to.strides[0] * item_size(from.dtype);
  }

  void run(int64_t source_row, int64_t destination_row, int64_t rows) const {
    const std::byte* from = source.as<std::byte>() + source_row * source_stride;
    std::byte* to = destination.as<std::byte>() + destination_row * destination_stride;
    const bool one_run = run_dim == 1;
    if (one_run && source_stride == row_bytes && destination_stride == row_bytes) {
      std::memcpy(to, from, static_cast<std::size_t>(rows * row_bytes));
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      copy_strided(source, from + i * source_stride, destination, to + i * destination_stride, 1,
                   run_dim, run_bytes);
    }
  }

  const TensorView& source;
  const TensorView& destination;
  std::size_t run_dim;
  int64_t run_bytes;
  int64_t row_bytes;
  int64_t source_stride;
  int64_t destination_stride;
};

}  // namespace

void copy_rows(std::span<const TensorView> sources, const TensorView& destination,
               std::span<const Segment> segments) {
  std::vector<RowCopy> copies;
  copies.reserve(sources.size());
  for (const TensorView& source : sources) copies.emplace_back(source, destination);
  std::vector<int64_t> ends;  // rows up to and with each segment
  ends.reserve(segments.size());
  int64_t rows = 0;
  for (const Segment& segment : segments) ends.push_back(rows += segment.rows);
  const int64_t row_bytes = destination.row_bytes();
  if (rows == 0 || row_bytes == 0) return;
  const int64_t task_rows = std::max<int64_t>(1, kTaskBytes / row_bytes);
  const int64_t tasks = (rows + task_rows - 1) / task_rows;
  parallel_for(tasks, [&](int64_t task) {
    int64_t row = task * task_rows;
    const int64_t end = std::min(rows, row + task_rows);
    auto s =
        static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), row) - ends.begin());
    while (row < end) {
      const Segment& segment = segments[s];
      const int64_t offset = segment.rows - (ends[s] - row);
      const int64_t count = std::min(end, ends[s]) - row;
      copies[static_cast<std::size_t>(segment.source)].run(segment.source_row + offset,
                                                           segment.destination_row + offset, count);
      row += count;
      ++s;
    }
  });
}

}  // namespace zigzag::cpu
