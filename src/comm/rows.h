#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "zigzag/plan.h"
#include "zigzag/tensor.h"

namespace zigzag::comm {

/// A host view seen as rows of bytes. A row is `runs` runs of `run_bytes` bytes, run_stride apart:
/// one run for whole rows and slices over heads, one a head for transposed heads.
struct RowView {
  std::byte* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t row_bytes = 0;
  std::int64_t row_stride = 0;  // bytes from one row to the next
  std::int64_t runs = 1;
  std::int64_t run_bytes = 0;
  std::int64_t run_stride = 0;

  /// Throws InvalidArgument when a row cannot be described so, or the memory is not the host's.
  explicit RowView(const TensorView& view);
  /// `row_count` rows of `bytes` bytes end to end.
  RowView(std::byte* memory, std::int64_t row_count, std::int64_t bytes);

  /// True when consecutive rows are one run of bytes.
  bool dense() const { return runs == 1 && row_stride == row_bytes; }
  std::byte* row(std::int64_t index) const { return data + index * row_stride; }
};

/// Copies `count` rows between views of equal row_bytes: one memcpy when both are dense, else one
/// a row or a run.
void copy_rows(const RowView& to, std::int64_t to_row, const RowView& from, std::int64_t from_row,
               std::int64_t count);

/// Calls f(source_row, destination_row, rows) for the parts of the segments inside source rows
/// [begin, end). Segments stand in rising source_row, as an ExchangeTable's do.
template <typename F>
void for_each_part(std::span<const Segment> segments, std::int64_t begin, std::int64_t end, F&& f) {
  const auto ends_before = [](const Segment& s, std::int64_t row) {
    return s.source_row + s.rows <= row;
  };
  auto it = std::lower_bound(segments.begin(), segments.end(), begin, ends_before);
  for (; it != segments.end() && it->source_row < end; ++it) {
    const std::int64_t first = std::max(begin, it->source_row);
    const std::int64_t last = std::min(end, it->source_row + it->rows);
    f(first, it->destination_row + (first - it->source_row), last - first);
  }
}

/// Rows of the segments inside source rows [begin, end).
std::int64_t count_rows(std::span<const Segment> segments, std::int64_t begin, std::int64_t end);

}  // namespace zigzag::comm
