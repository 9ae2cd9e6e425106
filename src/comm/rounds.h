#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "comm/rows.h"
#include "comm/transport.h"

namespace zigzag::comm {

/// Bytes of scratch memory that an exchange through messages may use, beyond what one row of every
/// peer needs.
inline constexpr std::int64_t kScratchBytes = std::int64_t{16} << 20;

/// An exchange through messages goes in rounds: round t moves rows [begin(t), end(t)) of every
/// rank's shard, so that scratch memory is bounded whatever the pack's length. All ranks derive
/// the same rounds.
struct Rounds {
  std::int64_t rows = 1;  // of a shard in a round
  std::int64_t count = 0;
  std::int64_t begin(std::int64_t round) const { return round * rows; }
  std::int64_t end(std::int64_t round) const { return (round + 1) * rows; }
};

/// The rounds in which `buffers` buffers of rows x row_bytes stay within kScratchBytes.
Rounds make_rounds(const ExchangeTable& table, std::int64_t row_bytes, std::int64_t buffers);

/// Which of a segment's two row numbers a view is indexed by.
enum class Side : std::uint8_t { kSource, kDestination };

/// Copies the view's rows that belong to source rows [begin, end), in rising source_row and end to
/// end, to `out`. Returns the bytes written.
std::int64_t pack_rows(const RowView& view, Side side, std::span<const Segment> segments,
                       std::int64_t begin, std::int64_t end, std::byte* out);

/// The reverse of pack_rows.
std::int64_t unpack_rows(const RowView& view, Side side, std::span<const Segment> segments,
                         std::int64_t begin, std::int64_t end, std::byte* in);

/// The memory of those rows when they are one run of bytes in the view, so that no copy is needed;
/// else null.
std::byte* direct_rows(const RowView& view, Side side, std::span<const Segment> segments,
                       std::int64_t begin, std::int64_t end);

/// The parts of the segments inside source rows [begin, end) with destination_row counting the
/// rows of the packed form.
std::vector<Segment> packed_segments(std::span<const Segment> segments, std::int64_t begin,
                                     std::int64_t end);

}  // namespace zigzag::comm
