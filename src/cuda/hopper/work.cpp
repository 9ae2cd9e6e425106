#include "cuda/hopper/work.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <tuple>

#include "cuda/launch_lists.h"
#include "cuda/sum_rows.h"
#include "zigzag/error.h"

namespace zigzag::cuda::hopper {
namespace {

using std::int64_t;

/// Chunks of fewer tokens are not worth units of their own that start before the gather has ended:
/// their keys would fill tiles less well.
constexpr int64_t kOwnChunk = 8 * kKeyTile;

std::int32_t narrow(int64_t value) {
  if (value >= kFar) {
    throw DeviceError("a rank holds " + std::to_string(value) +
                      " rows, tiles or positions; the GPU's kernels count up to 2^30 - 1");
  }
  return static_cast<std::int32_t>(value);
}

/// Whose a key is: another rank's, or of one of this rank's chunks.
enum class Owner : std::uint8_t { kOther, kEarlyChunk, kLateChunk };

/// Keys [begin, end) of a document that stand one after another.
struct Keys {
  int64_t begin, end;
  int64_t row;     // of k and v
  int64_t dk_row;  // of dk and dv
  Owner owner;
};

/// Cuts a range of gathered keys where the rank's own rows begin and end.
std::vector<Keys> cut(const KeyRange& range, const Span& span, bool own_rows) {
  std::vector<Keys> parts{{range.begin, range.end, range.row, range.row, Owner::kOther}};
  if (!own_rows) return parts;
  const int64_t chunks[][3] = {
      {span.early_position, span.early_position + span.q_early, span.q_begin},
      {span.late_position, span.late_position + span.q_count - span.q_early,
       span.q_begin + span.q_early}};
  for (int chunk = 0; chunk < 2; ++chunk) {
    const auto& [begin, end, row] = chunks[chunk];
    if (end - begin < kOwnChunk) continue;
    std::vector<Keys> next;
    for (const Keys& part : parts) {
      const int64_t from = std::max(begin, part.begin);
      const int64_t to = std::min(end, part.end);
      if (part.owner != Owner::kOther || from >= to) {
        next.push_back(part);
        continue;
      }
      const auto add = [&](int64_t first, int64_t last, Owner owner) {
        if (first >= last) return;
        const int64_t gathered = range.row + first - range.begin;
        // Only what starts before the gather has ended reads the rank's own tensors.
        const bool early = owner == Owner::kLateChunk;
        next.push_back({first, last, early ? row + first - begin : gathered, gathered, owner});
      };
      add(part.begin, from, Owner::kOther);
      add(from, to, chunk == 0 ? Owner::kEarlyChunk : Owner::kLateChunk);
      add(to, part.end, Owner::kOther);
    }
    parts = std::move(next);
  }
  return parts;
}

/// The first row of a span whose position is at least `position`; q_count when there is none.
int64_t first_row(const Span& span, int64_t position) {
  if (position < span.early_position + span.q_early) {
    return std::max<int64_t>(0, position - span.early_position);
  }
  const int64_t late = std::max<int64_t>(0, position - span.late_position);
  return std::min<int64_t>(span.q_count, span.q_early + late);
}

int64_t position_of(const Span& span, int64_t row) {
  return row < span.q_early ? span.early_position + row : span.late_position + row - span.q_early;
}

/// The tiles of `tokens` rows that see any of the unit's keys, and those that need no mask.
void set_tiles(BackwardUnit& unit, const Span& span, const Reach& reach, int64_t tokens) {
  const int64_t last_key = unit.k_position + unit.k_count - 1;
  const int64_t begin = first_row(span, int64_t{unit.k_position} - reach.right);
  const int64_t end = first_row(span, last_key + reach.left + 1);
  unit.first_tile = narrow(begin / tokens);
  unit.end_tile = std::max(unit.first_tile, narrow((end + tokens - 1) / tokens));
  if (begin >= end) unit.end_tile = unit.first_tile;
  unit.first_full = unit.end_full = unit.first_tile;
  if (unit.k_count < kKeyTile) return;
  const int64_t full_begin = first_row(span, last_key - reach.right);
  const int64_t full_end = first_row(span, int64_t{unit.k_position} + reach.left + 1);
  unit.first_full = std::max(unit.first_tile, narrow((full_begin + tokens - 1) / tokens));
  unit.end_full = std::max(unit.first_full, narrow(full_end / tokens));
}

int64_t weight(const BackwardUnit& unit) {
  return static_cast<int64_t>(unit.end_tile - unit.first_tile) * unit.heads;
}

/// The tiles that blocks of keys have with one number of heads a tile.
struct Tiling {
  std::int32_t heads;
  int64_t total;    // of all blocks
  int64_t longest;  // of one
};

void set_all_tiles(std::vector<BackwardUnit>& blocks, const std::vector<Span>& spans,
                   const Reach& reach, int64_t tokens) {
  for (BackwardUnit& block : blocks) {
    set_tiles(block, spans[static_cast<std::size_t>(block.span)], reach, tokens);
  }
}

/// With each power of 2 that divides a group. Gives the blocks some of these tiles.
std::vector<Tiling> make_tilings(std::vector<BackwardUnit>& blocks, const std::vector<Span>& spans,
                                 const Reach& reach, int64_t group) {
  std::vector<Tiling> tilings;
  for (std::int32_t heads = 1; heads <= kMaxTileHeads && group % heads == 0; heads *= 2) {
    set_all_tiles(blocks, spans, reach, kQueryTile / heads);
    Tiling tiling{heads, 0, 0};
    for (const BackwardUnit& block : blocks) {
      tiling.total += weight(block);
      tiling.longest = std::max(tiling.longest, weight(block));
    }
    tilings.push_back(tiling);
  }
  return tilings;
}

/// The tiling of `heads` heads that makes the fewest tiles. Where that saves less than 3% no heads
/// share tiles: it gained nothing (session7/variants.txt).
const Tiling& choose_tiling(const std::vector<Tiling>& tilings, int64_t heads) {
  const auto tiles = [&](const Tiling& tiling) { return heads / tiling.heads * tiling.total; };
  const Tiling* best = tilings.data();
  for (const Tiling& tiling : tilings) {
    if (heads % tiling.heads == 0 && tiles(tiling) < tiles(*best)) best = &tiling;
  }
  return 100 * tiles(*best) > 97 * tiles(tilings[0]) ? tilings[0] : *best;
}

void count_tiles(BackwardWork& work) {
  const int64_t tokens = work.tile_tokens();
  int64_t tiles = 0;
  for (std::size_t i = 0; i < work.spans.spans.size(); ++i) {
    Span& span = work.spans.spans[i];
    span.tile_begin = narrow(tiles);
    tiles += (span.q_count + tokens - 1) / tokens;
    work.tile_span.resize(static_cast<std::size_t>(tiles), static_cast<std::int32_t>(i));
  }
  narrow(tiles);
}

/// The smallest number of splits of a group of `group` query heads that leaves no unit longer than
/// an even share of all work, and the heads of a tile, for which the blocks get their tiles.
void choose_splits(BackwardWork& work, std::vector<BackwardUnit>& blocks, const Reach& reach,
                   int64_t kv_heads, int64_t group, int processors) {
  const std::vector<Span>& spans = work.spans.spans;
  const std::vector<Tiling> tilings = make_tilings(blocks, spans, reach, group);
  for (int64_t splits = 1; splits <= std::min<int64_t>(group, kMaxSumSources); ++splits) {
    if (group % splits != 0) continue;
    const Tiling& tiling = choose_tiling(tilings, group / splits);
    work.splits = static_cast<int>(splits);
    work.tile_heads = tiling.heads;
    if (tiling.longest * processors <= tiling.total * splits * kv_heads) break;
  }
  set_all_tiles(blocks, spans, reach, work.tile_tokens());
}

/// The blocks of a span's keys that are the rank's own as a whole, those of the late rows first.
std::vector<KeyRun> own_blocks(const Span& span) {
  const int64_t early_end = int64_t{span.early_position} + span.q_early;
  const int64_t late_rows = int64_t{span.q_count} - span.q_early;
  struct Range {
    int64_t begin, end, row;
  };
  std::vector<Range> ranges;
  if (late_rows > 0 && span.late_position == early_end) {
    ranges = {{span.early_position, early_end + late_rows, span.q_begin}};
  } else {
    ranges = {{span.late_position, span.late_position + late_rows, span.q_begin + span.q_early},
              {span.early_position, early_end, span.q_begin}};
  }
  std::vector<KeyRun> runs;
  const int64_t key_end = int64_t{span.k_position} + span.k_count;
  for (const Range& range : ranges) {
    const int64_t first = std::max<int64_t>(0, range.begin - span.k_position);
    const int64_t begin = (first + kKeyTile - 1) / kKeyTile;
    // The last block of all may have fewer keys.
    int64_t end = (range.end - span.k_position) / kKeyTile;
    if (range.end >= key_end) end = (int64_t{span.k_count} + kKeyTile - 1) / kKeyTile;
    if (begin >= end) continue;
    runs.push_back({narrow(begin), narrow(end),
                    static_cast<std::int32_t>(range.row + span.k_position - range.begin), 1});
  }
  return runs;
}

int64_t weight(const ForwardUnit& unit) {
  return int64_t{unit.end_key} - int64_t{unit.first_block} * kKeyTile;
}

/// The unit of `tokens` rows of a span from `row` on, without its span's number and its runs.
ForwardUnit make_unit(const Span& span, const Reach& reach, int64_t row, int64_t tokens) {
  const int64_t last = std::min<int64_t>(span.q_count, row + tokens) - 1;
  const int64_t from = position_of(span, row) - reach.left - span.k_position;
  const int64_t to = position_of(span, last) + reach.right - span.k_position;
  ForwardUnit unit{};
  unit.first_row = narrow(row);
  unit.first_block = narrow(std::max<int64_t>(0, from) / kKeyTile);
  unit.end_key = narrow(std::min<int64_t>(span.k_count, to + 1));
  return unit;
}

int64_t end_block(const ForwardUnit& unit) {
  return (int64_t{unit.end_key} + kKeyTile - 1) / kKeyTile;
}

/// How many of a group's heads a tile has: the divisor of `group` that makes the fewest blocks of
/// keys in all tiles, each of which costs about one more; the smallest of those within 1% of it,
/// since more heads make more units.
std::int32_t forward_tile_heads(const std::vector<Span>& spans, const Reach& reach, int64_t group) {
  std::vector<std::pair<int64_t, std::int32_t>> costs;
  for (std::int32_t heads = 1; heads <= std::min<int64_t>(group, kMaxTileHeads); ++heads) {
    if (group % heads != 0) continue;
    const int64_t tokens = kForwardTile / heads;
    int64_t blocks = 0;
    for (const Span& span : spans) {
      for (int64_t row = 0; row < span.q_count; row += tokens) {
        const ForwardUnit unit = make_unit(span, reach, row, tokens);
        blocks += end_block(unit) - unit.first_block + 1;
      }
    }
    costs.emplace_back(blocks * (group / heads), heads);
  }
  const int64_t least = std::min_element(costs.begin(), costs.end())->first;
  return std::find_if(costs.begin(), costs.end(),
                      [&](const auto& cost) { return 100 * cost.first <= 101 * least; })
      ->second;
}

/// Gives a unit its blocks [first_block, end_block): the last, the rank's own, and the others.
void set_runs(ForwardUnit& unit, const Span& span, const std::vector<KeyRun>& own,
              std::vector<KeyRun>& runs) {
  const std::int32_t end = narrow(end_block(unit));
  unit.first_run = narrow(std::ssize(runs));
  const auto add = [&](const KeyRun& run, std::int32_t begin, std::int32_t before) {
    begin = std::max(begin, run.begin);
    before = std::min(before, run.end);
    if (begin >= before) return;
    runs.push_back({begin, before, run.row, run.own});
    ++unit.run_count;
  };
  const KeyRun all{unit.first_block, end, span.k_begin, 0};
  const std::int32_t last = end - 1;
  // What is not the rank's own stands above, between and below what is.
  const auto add_others = [&](std::int32_t begin, std::int32_t before) {
    for (const KeyRun& run : own) {
      add(all, std::max(begin, run.end), before);
      before = std::min(before, run.begin);
    }
    add(all, begin, before);
  };
  if (own.empty()) return add(all, unit.first_block, end);
  for (const KeyRun& run : own) add(run, last, end);
  if (unit.run_count == 0) add(all, last, end);
  for (const KeyRun& run : own) add(run, unit.first_block, last);
  add_others(unit.first_block, last);
}

/// Which rows are fetched first: those of long documents, which have the heaviest tiles.
struct FetchOrder {
  int64_t begin, end;  // gathered rows
  int64_t number;
  std::vector<KeyRun> own;  // blocks from `begin` on that nobody reads there
};

}  // namespace

Reach reach_of(const Mask& mask) {
  const auto bound = [](int64_t window) {
    return static_cast<std::int32_t>(window < 0 ? kFar : std::min<int64_t>(window, kFar));
  };
  return {bound(mask.window_left), mask.causal ? 0 : bound(mask.window_right)};
}

Spans make_spans(const AttendArgs& args, bool whole) {
  std::vector<WorkItem> items;
  for (const WorkItem& item : args.items) {
    if (item.q_count > 0) items.push_back(item);
  }
  std::sort(items.begin(), items.end(),
            [](const WorkItem& a, const WorkItem& b) { return a.q_begin < b.q_begin; });
  Spans result;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const WorkItem& early = items[i];
    Span span{};
    span.q_begin = narrow(early.q_begin);
    span.q_count = span.q_early = narrow(early.q_count);
    span.early_position = narrow(early.q_position);
    span.late_position = narrow(early.q_position + early.q_count);
    span.k_begin = narrow(early.k_begin);
    span.k_count = narrow(early.k_count);
    span.k_position = narrow(early.k_position);
    if (whole && i + 1 < items.size() && items[i + 1].document == early.document) {
      const WorkItem& late = items[++i];
      span.q_count = narrow(early.q_count + late.q_count);
      span.late_position = narrow(late.q_position);
      // Both see the document from its start.
      span.k_count = narrow(std::max(early.k_count, late.k_count));
    }
    result.spans.push_back(span);
    result.documents.push_back(early.document);
  }
  return result;
}

ForwardWork make_forward_work(const AttendArgs& args, bool own_rows) {
  ForwardWork work;
  const Reach reach = reach_of(args.mask);
  // Early and late rows share tiles where both see the document from its start.
  work.spans = make_spans(args, launches_express(args.mask));
  work.tile_heads = forward_tile_heads(work.spans.spans, reach, args.q.shape[1] / args.k.shape[1]);
  for (std::size_t i = 0; i < work.spans.spans.size(); ++i) {
    const Span& span = work.spans.spans[i];
    const std::vector<KeyRun> own = own_rows ? own_blocks(span) : std::vector<KeyRun>{};
    for (int64_t row = 0; row < span.q_count; row += work.tile_tokens()) {
      ForwardUnit unit = make_unit(span, reach, row, work.tile_tokens());
      unit.span = static_cast<std::int32_t>(i);
      set_runs(unit, span, own, work.runs);
      work.units.push_back(unit);
    }
  }
  std::stable_sort(
      work.units.begin(), work.units.end(),
      [](const ForwardUnit& a, const ForwardUnit& b) { return weight(a) > weight(b); });
  return work;
}

FetchWork make_fetch_work(const AttendArgs& args, const Spans& spans,
                          std::span<const std::vector<Segment>> receives, int64_t row_bytes) {
  // With a window rows may be of several spans.
  std::vector<Span> longest;
  if (launches_express(args.mask)) longest = spans.spans;
  std::stable_sort(longest.begin(), longest.end(),
                   [](const Span& a, const Span& b) { return a.k_count > b.k_count; });
  std::vector<FetchOrder> orders;
  for (std::size_t i = 0; i < longest.size(); ++i) {
    const Span& span = longest[i];
    orders.push_back({span.k_begin, int64_t{span.k_begin} + span.k_count, static_cast<int64_t>(i),
                      own_blocks(span)});
  }
  std::sort(orders.begin(), orders.end(),
            [](const FetchOrder& a, const FetchOrder& b) { return a.begin < b.begin; });
  const auto order_of = [&](int64_t row) -> const FetchOrder* {
    const auto after = std::upper_bound(
        orders.begin(), orders.end(), row,
        [](int64_t value, const FetchOrder& order) { return value < order.begin; });
    if (after == orders.begin() || row >= std::prev(after)->end) return nullptr;
    return &*std::prev(after);
  };

  struct Placed {
    FetchPiece piece;
    int64_t number;  // of the document
    int64_t turn;    // among the pieces of its document and source
    int64_t ring;    // of the source, from this rank on
  };
  std::vector<Placed> placed;
  const auto ranks = static_cast<int64_t>(receives.size());
  const int64_t most = std::max<int64_t>(1, kFetchBytes / row_bytes);
  int64_t gathered_end = 0;
  for (int64_t source = 0; source < ranks; ++source) {
    const int64_t ring = source > args.rank ? source - args.rank : source - args.rank + ranks;
    for (const Segment& segment : receives[static_cast<std::size_t>(source)]) {
      int64_t row = segment.destination_row;
      const int64_t end = row + segment.rows;
      gathered_end = std::max(gathered_end, end);
      while (row < end) {
        const FetchOrder* const order = order_of(row);
        int64_t to = std::min({end, row + most, (row / kKeyTile + 1) * kKeyTile});
        bool skipped = false;
        if (order != nullptr) {
          to = std::min(to, order->end);
          const int64_t block = (row - order->begin) / kKeyTile;
          to = std::min(to, order->begin + (block + 1) * kKeyTile);
          skipped = source == args.rank &&
                    std::any_of(order->own.begin(), order->own.end(), [&](const KeyRun& run) {
                      return block >= run.begin && block < run.end;
                    });
        }
        if (!skipped) {
          placed.push_back(
              {{narrow(source), narrow(segment.source_row + row - segment.destination_row),
                narrow(row), narrow(to - row)},
               order == nullptr ? std::ssize(orders) : order->number,
               0,
               ring});
        }
        row = to;
      }
    }
  }
  // Tiles go through their keys from the last on, and all links are to be busy at all times: the
  // sources take turns.
  std::sort(placed.begin(), placed.end(), [](const Placed& a, const Placed& b) {
    return std::tuple(a.number, a.ring, -a.piece.row) < std::tuple(b.number, b.ring, -b.piece.row);
  });
  for (std::size_t i = 1; i < placed.size(); ++i) {
    const Placed& before = placed[i - 1];
    if (before.number == placed[i].number && before.ring == placed[i].ring) {
      placed[i].turn = before.turn + 1;
    }
  }
  std::sort(placed.begin(), placed.end(), [](const Placed& a, const Placed& b) {
    return std::tuple(a.number, a.turn, a.ring) < std::tuple(b.number, b.turn, b.ring);
  });
  FetchWork work;
  work.wanted.resize(static_cast<std::size_t>((gathered_end + kKeyTile - 1) / kKeyTile));
  for (const Placed& one : placed) {
    work.pieces.push_back(one.piece);
    work.wanted[static_cast<std::size_t>(one.piece.row / kKeyTile)] += one.piece.rows;
    work.rows += one.piece.rows;
  }
  narrow(work.rows);
  return work;
}

BackwardWork make_backward_work(const AttendArgs& args, bool own_rows, int processors) {
  BackwardWork work;
  const Reach reach = reach_of(args.mask);
  work.spans = make_spans(args, true);
  std::map<int64_t, std::size_t> span_of;
  for (std::size_t i = 0; i < work.spans.documents.size(); ++i) {
    span_of[work.spans.documents[i]] = i;
  }
  const int64_t kv_heads = args.k.shape[1];
  const int64_t group = args.q.shape[1] / kv_heads;
  std::vector<BackwardUnit> blocks;
  std::vector<Owner> owners;
  for (const KeyRange& range : args.plan->gathered_ranges(args.rank, args.mask)) {
    if (range.begin == range.end) continue;
    const std::size_t index = span_of.at(range.document);
    const Span& span = work.spans.spans[index];
    for (const Keys& keys : cut(range, span, own_rows && launches_express(args.mask))) {
      for (int64_t at = keys.begin; at < keys.end; at += kKeyTile) {
        BackwardUnit unit{};
        unit.span = narrow(static_cast<int64_t>(index));
        unit.k_row = narrow(keys.row + at - keys.begin);
        unit.k_count = narrow(std::min<int64_t>(kKeyTile, keys.end - at));
        unit.k_position = narrow(at);
        unit.dk_row = narrow(keys.dk_row + at - keys.begin);
        unit.heads = 1;
        blocks.push_back(unit);
        owners.push_back(keys.owner);
      }
    }
  }
  choose_splits(work, blocks, reach, kv_heads, group, processors);
  count_tiles(work);
  const int64_t heads = group / work.splits;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    for (int64_t head = 0; head < kv_heads * work.splits; ++head) {
      BackwardUnit unit = blocks[i];
      unit.kv_head = narrow(head / work.splits);
      unit.head = narrow(head * heads);
      unit.heads = narrow(heads);
      unit.split = narrow(head % work.splits);
      (owners[i] == Owner::kOther       ? work.others
       : owners[i] == Owner::kLateChunk ? work.early
                                        : work.rest)
          .push_back(unit);
    }
  }
  for (std::vector<BackwardUnit>* units : {&work.early, &work.others, &work.rest}) {
    std::stable_sort(
        units->begin(), units->end(),
        [](const BackwardUnit& a, const BackwardUnit& b) { return weight(a) > weight(b); });
  }
  return work;
}

}  // namespace zigzag::cuda::hopper
