#include "cuda/hopper/work.h"

#include <algorithm>
#include <limits>
#include <map>

#include "zigzag/error.h"

namespace zigzag::cuda::hopper {
namespace {

using std::int64_t;

/// Chunks of fewer tokens are not worth units of their own that start before the gather has ended:
/// their keys would fill tiles less well.
constexpr int64_t kOwnChunk = 8 * kKeyTile;

std::int32_t narrow(int64_t value) {
  if (value > std::numeric_limits<std::int32_t>::max()) {
    throw DeviceError("a rank holds " + std::to_string(value) +
                      " rows or tiles; the GPU's kernels count up to 2^31 - 1");
  }
  return static_cast<std::int32_t>(value);
}

/// Keys [begin, end) of a document that stand one after another.
struct Keys {
  int64_t begin, end;
  int64_t row;     // of k and v
  int64_t dk_row;  // of dk and dv
  bool own;
};

/// Cuts a range of gathered keys where the rank's own rows begin and end.
std::vector<Keys> cut(const KeyRange& range, const Span& span, bool own_rows) {
  std::vector<Keys> parts{{range.begin, range.end, range.row, range.row, false}};
  if (!own_rows) return parts;
  const int64_t chunks[][3] = {
      {span.early_position, span.early_position + span.q_early, span.q_begin},
      {span.late_position, span.late_position + span.q_count - span.q_early,
       span.q_begin + span.q_early}};
  for (const auto& [begin, end, row] : chunks) {
    if (end - begin < kOwnChunk) continue;
    std::vector<Keys> next;
    for (const Keys& part : parts) {
      const int64_t from = std::max(begin, part.begin);
      const int64_t to = std::min(end, part.end);
      if (part.own || from >= to) {
        next.push_back(part);
        continue;
      }
      const auto shifted = [&](int64_t first, int64_t last, bool own) {
        if (first >= last) return;
        const int64_t gathered = range.row + first - range.begin;
        next.push_back({first, last, own ? row + first - begin : gathered, gathered, own});
      };
      shifted(part.begin, from, false);
      shifted(from, to, true);
      shifted(to, part.end, false);
    }
    parts = std::move(next);
  }
  return parts;
}

/// The first row of a span that sees the key at `position` under a causal mask.
int64_t first_row(const Span& span, int64_t position) {
  if (position < span.early_position + span.q_early) {
    return std::max<int64_t>(0, position - span.early_position);
  }
  return span.q_early + std::max<int64_t>(0, position - span.late_position);
}

/// The tiles that need no mask.
void set_full_tiles(BackwardUnit& unit, const Span& span, int tile, bool causal) {
  unit.first_full = unit.end_full = unit.first_tile;
  if (unit.k_count < kKeyTile) return;
  const int64_t last_key = unit.k_position + unit.k_count - 1;
  const int64_t row = causal ? first_row(span, last_key) : 0;
  unit.first_full = std::max(unit.first_tile, narrow((row + tile - 1) / tile));
  unit.end_full = std::max(unit.first_full, span.q_count / tile);
}

int64_t weight(const BackwardUnit& unit) {
  return static_cast<int64_t>(unit.end_tile - unit.first_tile) * unit.heads;
}

/// The smallest number of splits of a group of `group` query heads that leaves no unit longer than
/// an even share of all work.
int choose_splits(const std::vector<BackwardUnit>& blocks, int64_t kv_heads, int64_t group,
                  int processors) {
  int64_t longest = 0;
  int64_t total = 0;
  for (const BackwardUnit& block : blocks) {
    longest = std::max(longest, weight(block));
    total += weight(block);
  }
  for (int64_t splits = 1; splits < group; ++splits) {
    if (group % splits == 0 &&
        longest * (group / splits) * processors <= total * group * kv_heads) {
      return static_cast<int>(splits);
    }
  }
  return static_cast<int>(group);
}

}  // namespace

Spans make_spans(const AttendArgs& args, int tile) {
  std::map<int64_t, std::vector<const WorkItem*>> of_document;
  for (const WorkItem& item : args.items) {
    if (item.q_count > 0) of_document[item.document].push_back(&item);
  }
  Spans result;
  int64_t tiles = 0;
  for (auto& [document, items] : of_document) {
    std::sort(items.begin(), items.end(),
              [](const WorkItem* a, const WorkItem* b) { return a->q_begin < b->q_begin; });
    const WorkItem& first = *items.front();
    const WorkItem& last = *items.back();
    if (items.size() > 2 || (items.size() == 2 && first.q_begin + first.q_count != last.q_begin)) {
      throw DeviceError("the rows of a document do not lie side by side in the shard");
    }
    const int64_t count = items.size() == 2 ? first.q_count + last.q_count : first.q_count;
    const int64_t late = items.size() == 2 ? last.q_position : first.q_position + first.q_count;
    result.spans.push_back({narrow(first.q_begin), narrow(count), narrow(first.q_count),
                            narrow(first.q_position), narrow(late), narrow(tiles), 0, 0});
    result.documents.push_back(document);
    const int64_t end = tiles + (count + tile - 1) / tile;
    for (; tiles < end; ++tiles) {
      result.tile_span.push_back(static_cast<std::int32_t>(result.spans.size()) - 1);
    }
  }
  narrow(tiles);
  std::size_t index = 0;
  for (const KeyRange& range : args.plan->gathered_ranges(args.rank, args.mask)) {
    if (range.begin == range.end) continue;
    while (index < result.documents.size() && result.documents[index] < range.document) ++index;
    if (index == result.documents.size() || result.documents[index] != range.document ||
        range.begin != 0) {
      throw DeviceError("gathered keys are not those of a document from its start");
    }
    result.spans[index].k_begin = narrow(range.row);
    result.spans[index].k_count = narrow(range.end);
  }
  return result;
}

ForwardWork make_forward_work(const AttendArgs& args) {
  ForwardWork work;
  work.spans = make_spans(args, kForwardTile);
  for (std::size_t i = 0; i < work.spans.spans.size(); ++i) {
    const Span& span = work.spans.spans[i];
    for (std::int32_t tile = 0; tile * kForwardTile < span.q_count; ++tile) {
      std::int32_t end_key = span.k_count;
      if (args.mask.causal) {
        const std::int32_t last = std::min(span.q_count, (tile + 1) * kForwardTile) - 1;
        const std::int32_t position = last < span.q_early
                                          ? span.early_position + last
                                          : span.late_position + last - span.q_early;
        end_key = std::min(end_key, position + 1);
      }
      work.units.push_back({static_cast<std::int32_t>(i), tile, end_key});
    }
  }
  std::stable_sort(
      work.units.begin(), work.units.end(),
      [](const ForwardUnit& a, const ForwardUnit& b) { return a.end_key > b.end_key; });
  return work;
}

BackwardWork make_backward_work(const AttendArgs& args, bool own_rows, int processors) {
  BackwardWork work;
  constexpr int tile = kQueryTile;
  work.spans = make_spans(args, tile);
  std::map<int64_t, std::size_t> span_of;
  for (std::size_t i = 0; i < work.spans.documents.size(); ++i) {
    span_of[work.spans.documents[i]] = i;
  }
  const int64_t kv_heads = args.k.shape[1];
  const int64_t group = args.q.shape[1] / kv_heads;
  std::vector<BackwardUnit> blocks;
  std::vector<char> own;
  for (const KeyRange& range : args.plan->gathered_ranges(args.rank, args.mask)) {
    if (range.begin == range.end) continue;
    const std::size_t index = span_of.at(range.document);
    const Span& span = work.spans.spans[index];
    const int64_t end_tile = (span.q_count + tile - 1) / tile;
    for (const Keys& keys : cut(range, span, own_rows)) {
      for (int64_t at = keys.begin; at < keys.end; at += kKeyTile) {
        const int64_t first = args.mask.causal ? first_row(span, at) / tile : 0;
        BackwardUnit unit{};
        unit.span = narrow(static_cast<int64_t>(index));
        unit.k_row = narrow(keys.row + at - keys.begin);
        unit.k_count = narrow(std::min<int64_t>(kKeyTile, keys.end - at));
        unit.k_position = narrow(at);
        unit.dk_row = narrow(keys.dk_row + at - keys.begin);
        unit.end_tile = narrow(end_tile);
        unit.first_tile = narrow(std::min(first, end_tile));
        set_full_tiles(unit, span, tile, args.mask.causal);
        unit.heads = 1;
        blocks.push_back(unit);
        own.push_back(keys.own ? 1 : 0);
      }
    }
  }
  work.splits = choose_splits(blocks, kv_heads, group, processors);
  const int64_t heads = group / work.splits;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    for (int64_t head = 0; head < kv_heads * work.splits; ++head) {
      BackwardUnit unit = blocks[i];
      unit.kv_head = narrow(head / work.splits);
      unit.head = narrow(head * heads);
      unit.heads = narrow(heads);
      unit.split = narrow(head % work.splits);
      (own[i] != 0 ? work.early : work.late).push_back(unit);
    }
  }
  for (std::vector<BackwardUnit>* units : {&work.early, &work.late}) {
    std::stable_sort(
        units->begin(), units->end(),
        [](const BackwardUnit& a, const BackwardUnit& b) { return weight(a) > weight(b); });
  }
  return work;
}

}  // namespace zigzag::cuda::hopper
