#pragma once

#include <bit>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend.h"
#include "cuda/hopper/params.h"

namespace zigzag::cuda::hopper {

/// A rank's documents as the kernels see them.
struct Spans {
  std::vector<Span> spans;
  std::vector<std::int64_t> documents;  // of each span
};

/// `whole`: a span a document; otherwise one a work item, with the keys that its rows may see.
Spans make_spans(const AttendArgs& args, bool whole);

/// The bounds of a mask around a query, with kFar for none.
struct Reach {
  std::int32_t left, right;
};
Reach reach_of(const Mask& mask);

/// A forward as tiles of queries, heaviest first. A tile has tile_tokens() tokens of a span, each
/// with tile_heads query heads of one KV head, as many as make the least work.
struct ForwardWork {
  std::int32_t tile_tokens() const { return kForwardTile / tile_heads; }
  /// A row of a tile, 0..kForwardTile - 1, times this / 2^16 is its token in the tile.
  std::int32_t by_tile_heads() const { return (65536 + tile_heads - 1) / tile_heads; }

  Spans spans;
  std::vector<ForwardUnit> units;
  std::vector<KeyRun> runs;  // of the units
  std::int32_t tile_heads = 1;
};

/// `own_rows`: blocks of keys that the rank itself holds are taken from its own rows, before those
/// that others send.
ForwardWork make_forward_work(const AttendArgs& args, bool own_rows);

/// What the forward kernel fetches, in the order in which it is wanted.
struct FetchWork {
  std::vector<FetchPiece> pieces;
  std::vector<std::int32_t> wanted;  // of each kKeyTile gathered rows: rows of the pieces
  std::int64_t rows = 0;             // of all pieces
};

/// All rows but those of blocks that make_forward_work takes from the rank's own; with a window,
/// when rows may be of several spans, all rows. `spans`: that work's; `receives`: rows of the
/// gathered keys by the rank that they come from; `row_bytes`: of a row of K, at most kFetchBytes.
FetchWork make_fetch_work(const AttendArgs& args, const Spans& spans,
                          std::span<const std::vector<Segment>> receives, std::int64_t row_bytes);

/// A backward as blocks of keys, heaviest first. Tiles of tile_tokens() rows of a span, each with
/// tile_heads query heads of one KV head (a power of 2, as makes the least work), are counted
/// through all spans, each of which starts one.
struct BackwardWork {
  std::int32_t tile_tokens() const { return kQueryTile / tile_heads; }
  int tile_heads_log2() const { return std::countr_zero(static_cast<std::uint32_t>(tile_heads)); }
  std::int64_t tiles() const { return static_cast<std::int64_t>(tile_span.size()); }

  Spans spans;
  std::vector<std::int32_t> tile_span;  // the span of each tile
  std::int32_t tile_heads = 1;
  // Keys of the rank's own late chunks, where `own_rows` asks: work for the time of the gather.
  std::vector<BackwardUnit> early;
  // Keys of other ranks, and those of short chunks.
  std::vector<BackwardUnit> others;
  // Keys of the rank's own early chunks: work while others fetch their gradients.
  std::vector<BackwardUnit> rest;
  int splits = 1;  // sums of dk and dv that are to be added up
};

/// `own_rows`: keys that the rank itself holds become early units and the rest; k_row counts rows
/// of the shard in the early ones. `processors`: multiprocessors of the GPU, over which units are
/// balanced.
BackwardWork make_backward_work(const AttendArgs& args, bool own_rows, int processors);

}  // namespace zigzag::cuda::hopper
