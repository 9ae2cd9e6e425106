#include "comm/rounds.h"

namespace zigzag::comm {

Rounds make_rounds(const ExchangeTable& table, std::int64_t row_bytes, std::int64_t buffers) {
  const std::int64_t each = std::max<std::int64_t>(1, row_bytes * buffers);
  const std::int64_t most = std::max<std::int64_t>(1, table.max_local_tokens);
  Rounds rounds;
  rounds.rows = std::clamp<std::int64_t>(kScratchBytes / each, 1, most);
  rounds.count = (table.max_local_tokens + rounds.rows - 1) / rounds.rows;
  return rounds;
}

namespace {

std::int64_t row_of(Side side, std::int64_t source, std::int64_t destination) {
  return side == Side::kSource ? source : destination;
}

}  // namespace

std::int64_t pack_rows(const RowView& view, Side side, std::span<const Segment> segments,
                       std::int64_t begin, std::int64_t end, std::byte* out) {
  std::int64_t packed = 0;
  const std::int64_t total = count_rows(segments, begin, end);
  const RowView to(out, total, view.row_bytes);
  for_each_part(segments, begin, end,
                [&](std::int64_t source, std::int64_t destination, std::int64_t rows) {
                  copy_rows(to, packed, view, row_of(side, source, destination), rows);
                  packed += rows;
                });
  return packed * view.row_bytes;
}

std::int64_t unpack_rows(const RowView& view, Side side, std::span<const Segment> segments,
                         std::int64_t begin, std::int64_t end, std::byte* in) {
  std::int64_t packed = 0;
  const std::int64_t total = count_rows(segments, begin, end);
  const RowView from(in, total, view.row_bytes);
  for_each_part(segments, begin, end,
                [&](std::int64_t source, std::int64_t destination, std::int64_t rows) {
                  copy_rows(view, row_of(side, source, destination), from, packed, rows);
                  packed += rows;
                });
  return packed * view.row_bytes;
}

std::byte* direct_rows(const RowView& view, Side side, std::span<const Segment> segments,
                       std::int64_t begin, std::int64_t end) {
  if (!view.dense()) return nullptr;
  std::int64_t first = -1;
  std::int64_t next = -1;
  bool one_run = true;
  for_each_part(segments, begin, end,
                [&](std::int64_t source, std::int64_t destination, std::int64_t rows) {
                  const std::int64_t row = row_of(side, source, destination);
                  if (first < 0) {
                    first = row;
                  } else if (row != next) {
                    one_run = false;
                  }
                  next = row + rows;
                });
  return first >= 0 && one_run ? view.row(first) : nullptr;
}

std::vector<Segment> packed_segments(std::span<const Segment> segments, std::int64_t begin,
                                     std::int64_t end) {
  std::vector<Segment> result;
  std::int64_t packed = 0;
  for_each_part(segments, begin, end,
                [&](std::int64_t source, std::int64_t /*destination*/, std::int64_t rows) {
                  result.push_back(
                      {.source = 0, .source_row = source, .destination_row = packed, .rows = rows});
                  packed += rows;
                });
  return result;
}

}  // namespace zigzag::comm
