#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cuda/device.h"
#include "zigzag/tensor.h"

namespace zigzag::cuda {

/// Which rows of several sources add up to each row of a destination. Destination rows are cut into
/// intervals: rows [begins[i], begins[i + 1]) take row `rows[i * sources + s] + (row - begins[i])`
/// of source s, or nothing from it where that is negative.
struct SumTable {
  std::int64_t sources = 0;
  std::vector<std::int64_t> begins;  // [intervals + 1]
  std::vector<std::int64_t> rows;    // [intervals, sources]

  std::int64_t intervals() const { return static_cast<std::int64_t>(begins.size()) - 1; }
};

/// Rows [begin, begin + rows) of a destination that take rows of one source from `source_row`.
struct SumPart {
  std::int64_t source;
  std::int64_t begin;
  std::int64_t source_row;
  std::int64_t rows;
};

/// The table of parts that do not overlap within a source. `destination_rows` rows in all.
SumTable make_sum_table(std::span<const SumPart> parts, std::int64_t sources,
                        std::int64_t destination_rows);

/// The most sources of a sum.
constexpr int kMaxSumSources = 128;

/// destination [rows, heads, head_dim] = the sum over sources in their order, in float32, rounded
/// once; rows without a source become 0. sources[s] [.., heads x group, head_dim] contiguous, all
/// of `source_type` (float32, float16 or bfloat16); the `group` heads from h x group on add up to
/// the destination's head h. The destination's last stride is 1. One launch. `key` names the table
/// on the device (see copy_rows); `build` makes it when it is not there.
void sum_rows(std::span<const void* const> sources, DType source_type, std::int64_t group,
              const TensorView& destination, const TableKey& key,
              const std::function<SumTable()>& build, void* stream);

}  // namespace zigzag::cuda
