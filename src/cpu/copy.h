#pragma once

#include <span>

#include "zigzag/plan.h"
#include "zigzag/tensor.h"

namespace zigzag::cpu {

/// Copies rows on all threads: destination row `destination_row + i` becomes row `source_row + i`
/// of sources[segment.source]. sources[i] [rows_i, ...] and destination [rows, ...] have one dtype
/// and the same shape[1:]; strides are free.
void copy_rows(std::span<const TensorView> sources, const TensorView& destination,
               std::span<const Segment> segments);

}  // namespace zigzag::cpu
