#pragma once

#include <atomic>
#include <span>
#include <vector>

#include "comm/transport.h"
#include "cuda/sum_rows.h"

namespace zigzag::comm {

/// Rows of all segments.
inline std::int64_t count_rows(std::span<const Segment> segments) {
  std::int64_t rows = 0;
  for (const Segment& segment : segments) rows += segment.rows;
  return rows;
}

/// A key for the device's copy of one of a table's lists; a new one each time for a table without.
inline std::uint64_t list_key(const ExchangeTable& table, std::uint64_t list) {
  static std::atomic<std::uint64_t> unnamed{1};
  if (table.key != 0) return cuda::mix(table.key, list);
  return cuda::mix(0x2545f4914f6cdd1dull, unnamed.fetch_add(1));
}

/// Throws DeviceError unless the views are on this GPU.
void check_device(std::span<const TensorView> views, int device, int rank);

/// `rows` rows shaped like view's at `data`, without gaps.
TensorView packed_like(const TensorView& view, const void* data, std::int64_t rows);

}  // namespace zigzag::comm
