#pragma once

#include <cstdint>
#include <span>

#include "zigzag/plan.h"
#include "zigzag/tensor.h"

namespace zigzag::comm {

/// One rank's partials of a shard's rows: row i of a segment belongs to local row
/// source_row + i and stands at rows + (destination_row + i) * row_elements.
struct Contribution {
  std::span<const Segment> segments;  // in rising source_row
  const float* rows = nullptr;
};

/// Rows [begin, end) of `destination` [local_tokens, ...] (float32, float16 or bfloat16, on the
/// host) become 0 plus the contributions, added one after another in float32 in the order given
/// and rounded once, to nearest even. The one place where partial gradients are added, so that all
/// transports give the same bits.
void sum_rows(const TensorView& destination, std::int64_t begin, std::int64_t end,
              std::span<const Contribution> contributions);

}  // namespace zigzag::comm
