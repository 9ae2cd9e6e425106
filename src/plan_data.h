#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "zigzag/plan.h"

namespace zigzag {

/// Wide enough for the visible pairs of a document of 2^56 tokens.
__extension__ using Pairs = __int128;

/// Throws InvalidArgument unless both window bounds are -1 or more.
void check_mask(const Mask& mask);

struct Plan::Data {
  Data(std::vector<std::int64_t> cu, std::int64_t world);

  std::int64_t documents() const;
  /// First row of a document in a rank's shard; documents() gives the end of the last.
  std::int64_t local_begin(std::int64_t document, std::int64_t rank) const;
  void check_rank(std::int64_t rank) const;

  std::vector<std::int64_t> cu_seqlens;  // [documents + 1]
  /// Extra tokens handed out before each document; extra number j of the pack goes to rank j mod W.
  std::vector<std::int64_t> extras;  // [documents + 1]
  std::int64_t ranks;
};

/// Positions of a rank's two chunks in a document.
struct Plan::RankChunks {
  std::int64_t early_begin;
  std::int64_t early_end;
  std::int64_t late_begin;
  std::int64_t late_end;
};

/// One or two ranges [first, second) of key positions.
struct Plan::KeyRanges {
  std::array<std::pair<std::int64_t, std::int64_t>, 2> ranges;
  std::size_t count = 0;
};

/// The chunks of one document, in closed form.
struct Plan::DocumentLayout {
  DocumentLayout(const Data& data, std::int64_t document);

  /// First position of chunk `index`; index 2W gives the length.
  std::int64_t begin(std::int64_t index) const;
  /// The chunk that holds a position.
  std::int64_t chunk_at(std::int64_t position) const;
  /// The rank of a chunk.
  std::int64_t owner(std::int64_t index) const;
  RankChunks chunks(std::int64_t rank) const;
  /// The keys that a rank's chunks see.
  KeyRanges keys(const RankChunks& own, const Mask& mask) const;
  /// Extras that ranks below `rank` hold when `extras` of them go round from the cursor.
  std::int64_t extras_below(std::int64_t rank, std::int64_t extras) const;
  /// Visible pairs of query positions [begin, end).
  static Pairs pairs(std::int64_t begin, std::int64_t end, std::int64_t length, const Mask& mask);
  /// Ranks at which a rank's pairs or gathered rows stop being linear in the rank; sorted, from 0
  /// to W.
  std::vector<std::int64_t> breakpoints(const Mask& mask) const;

  std::int64_t ranks;
  std::int64_t length;
  std::int64_t base;    // shortest chunk
  std::int64_t cursor;  // the first rank that gets an extra token
  std::int64_t early_extras;
  std::int64_t late_extras;
};

}  // namespace zigzag
