#include <algorithm>
#include <limits>
#include <thread>
#include <unordered_map>

#include "cpu/kernel.h"
#include "zigzag/system.h"

namespace zigzag::cpu {
namespace {

// Pairs that lanes [begin, end) see: exact in the middle of a mask, a mean at its edges, which is
// all that an order of tasks needs.
double visible_pairs(const Problem& problem, const TaskRows& item, std::int64_t begin,
                     std::int64_t end) {
  const std::int64_t jump = item.jump < 1 ? begin : item.jump_row * problem.group;
  if (begin < jump && jump < end) {
    return visible_pairs(problem, item, begin, jump) + visible_pairs(problem, item, jump, end);
  }
  const VisibleKeys first = visible_keys(problem, item, begin);
  const VisibleKeys last = visible_keys(problem, item, end - 1);
  const auto keys = static_cast<double>(first.end - first.first + last.end - last.first);
  return keys / 2 * static_cast<double>(end - begin);
}

// Adds the ends of pieces of about `lanes` lanes of [begin, end): of whole panels and alike in
// size, since a small piece would load its keys for a few lanes.
void cut_evenly(std::int64_t begin, std::int64_t end, std::int64_t lanes, std::int64_t panel_lanes,
                std::vector<std::int64_t>& cuts) {
  const std::int64_t pieces = std::max<std::int64_t>(1, (end - begin + lanes / 2) / lanes);
  const std::int64_t panels = (end - begin + panel_lanes * pieces - 1) / (panel_lanes * pieces);
  while (begin < end) {
    begin = std::min(end, begin + panels * panel_lanes);
    cuts.push_back(begin);
  }
}

// The keys that pieces load, all together.
std::int64_t keys_loaded(const Problem& problem, const TaskRows& item,
                         const std::vector<std::int64_t>& cuts) {
  std::int64_t keys = 0;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    keys += visible_keys(problem, item, cuts[i + 1] - 1).end -
            visible_keys(problem, item, cuts[i]).first;
  }
  return keys;
}

// Where an item's lanes are cut, from 0 to the last: with a cut between early and late rows where
// fewer keys are loaded that way.
std::vector<std::int64_t> piece_cuts(const Problem& problem, const TaskRows& item,
                                     std::int64_t lanes, std::int64_t panel_lanes) {
  const std::int64_t end = item.q_count * problem.group;
  std::vector<std::int64_t> joined{0};
  cut_evenly(0, end, lanes, panel_lanes, joined);
  if (item.jump == 0 || joined.size() == 2) return joined;
  std::vector<std::int64_t> parted{0};
  cut_evenly(0, item.jump_row * problem.group, lanes, panel_lanes, parted);
  cut_evenly(item.jump_row * problem.group, end, lanes, panel_lanes, parted);
  return keys_loaded(problem, item, parted) < keys_loaded(problem, item, joined) ? parted : joined;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

VisibleKeys visible_keys(const Problem& problem, const TaskRows& item, std::int64_t lane) {
  const Mask& mask = problem.mask;
  const std::int64_t position = item.position(lane / problem.group);
  const std::int64_t end_of_keys = item.k_position + item.k_count;
  VisibleKeys keys{std::max(mask.first_key(position), item.k_position),
                   std::min(mask.end_key(position, item.document_length), end_of_keys)};
  // An empty range stays inside the item's keys, so that ranges of neighbours still grow.
  keys.first = std::min(keys.first, end_of_keys);
  keys.end = std::max(keys.end, keys.first);
  return keys;
}

std::vector<TaskRows> join_items(std::span<const WorkItem> items) {
  std::vector<TaskRows> joined;
  std::unordered_map<std::int64_t, std::size_t> of_document;
  for (const WorkItem& item : items) {
    const auto [entry, is_new] = of_document.try_emplace(item.document, joined.size());
    if (!is_new) {
      TaskRows& other = joined[entry->second];
      const WorkItem& early = item.q_begin < other.q_begin ? item : other;
      const WorkItem& late = item.q_begin < other.q_begin ? other : item;
      if (early.q_begin + early.q_count == late.q_begin && early.k_begin == late.k_begin &&
          early.k_position == late.k_position && early.k_count <= late.k_count) {
        TaskRows both{early};
        both.q_count += late.q_count;
        both.k_count = late.k_count;
        both.jump_row = early.q_count;
        both.jump = late.q_position - early.q_position - early.q_count;
        other = both;
        continue;
      }
    }
    joined.push_back({item});
  }
  return joined;
}

std::vector<RowGroup> row_pieces(const Problem& problem, const std::vector<TaskRows>& items,
                                 std::int64_t lanes, std::int64_t panel_lanes) {
  std::vector<RowGroup> pieces;
  for (const TaskRows& item : items) {
    if (item.q_count == 0) continue;
    const std::vector<std::int64_t> cuts = piece_cuts(problem, item, lanes, panel_lanes);
    for (std::size_t piece = 0; piece + 1 < cuts.size(); ++piece) {
      RowGroup group;
      group.item = &item;
      group.lane_begin = cuts[piece];
      group.lane_end = cuts[piece + 1];
      group.width = group.lane_end - group.lane_begin;
      if (item.jump > 0 && group.lane_begin / problem.group < item.jump_row) {
        group.width += panel_lanes;
      }
      group.keys.first = visible_keys(problem, item, group.lane_begin).first;
      group.keys.end = visible_keys(problem, item, group.lane_end - 1).end;
      group.fresh = group.keys;
      group.cost = visible_pairs(problem, item, group.lane_begin, group.lane_end);
      pieces.push_back(group);
    }
  }
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const RowGroup& a, const RowGroup& b) { return a.cost > b.cost; });
  return pieces;
}

std::vector<RowGroup> row_groups(const Problem& problem, const std::vector<TaskRows>& items,
                                 std::int64_t lanes, std::int64_t panel_lanes) {
  std::vector<RowGroup> pieces = row_pieces(problem, items, lanes, panel_lanes);
  std::vector<RowGroup> groups;
  groups.reserve(pieces.size() * static_cast<std::size_t>(problem.kv_heads));
  std::unordered_map<std::int64_t, std::vector<VisibleKeys>> seen;  // of each document
  for (RowGroup& group : pieces) {
    group.fresh = see(group.keys, seen[group.item->document]);
    for (std::int64_t head = 0; head < problem.kv_heads; ++head) {
      group.kv_head = head;
      group.unit = group.item->document * problem.kv_heads + head;
      groups.push_back(group);
    }
  }
  return groups;
}

std::vector<std::int64_t> batches(std::vector<RowGroup>& groups) {
  // 16 documents of 64 tokens; and every thread gets several batches.
  constexpr double kMostPairs = 32768;
  constexpr double kBatchesPerThread = 8;
  double pairs = 0;
  for (const RowGroup& group : groups) pairs += group.cost;
  const double most = std::min(kMostPairs, pairs / (kBatchesPerThread * num_threads()));
  std::vector<std::int64_t> begins;
  double sum = 0;
  for (std::int64_t i = 0; i < std::ssize(groups); ++i) {
    sum += groups[i].cost;
    if (i == 0 || sum > most) {
      begins.push_back(i);
      sum = groups[i].cost;
    } else {
      groups[i - 1].next = &groups[i];
    }
  }
  begins.push_back(std::ssize(groups));
  return begins;
}

VisibleKeys see(const VisibleKeys& keys, std::vector<VisibleKeys>& seen) {
  if (keys.first >= keys.end) return {keys.first, keys.first};
  const auto begin =
      std::lower_bound(seen.begin(), seen.end(), keys.first,
                       [](const VisibleKeys& range, std::int64_t key) { return range.end < key; });
  VisibleKeys whole = keys;
  VisibleKeys fresh{keys.first, keys.first};
  const auto offer = [&fresh](std::int64_t first, std::int64_t end) {
    if (end - first > fresh.end - fresh.first) fresh = {first, end};
  };
  std::int64_t from = keys.first;
  auto end = begin;
  for (; end != seen.end() && end->first <= keys.end; ++end) {
    offer(from, end->first);
    from = end->end;
    whole = {std::min(whole.first, end->first), std::max(whole.end, end->end)};
  }
  offer(from, keys.end);
  seen.insert(seen.erase(begin, end), whole);
  return fresh;
}

std::vector<RowRange> rows_without_tasks(const std::vector<RowGroup>& groups, std::int64_t rows) {
  std::vector<RowRange> stored;
  for (const RowGroup& group : groups) {
    if (group.kv_head != 0 || group.fresh.first >= group.fresh.end) continue;
    const std::int64_t first_row = group.item->k_begin - group.item->k_position;
    stored.push_back({first_row + group.fresh.first, first_row + group.fresh.end});
  }
  std::sort(stored.begin(), stored.end(),
            [](const RowRange& a, const RowRange& b) { return a.begin < b.begin; });
  stored.push_back({rows, rows});
  std::vector<RowRange> gaps;
  std::int64_t from = 0;
  for (const RowRange& range : stored) {
    if (from < range.begin) gaps.push_back({from, range.begin});
    from = range.end;
  }
  return gaps;
}

Turns::Turns(const std::vector<RowGroup>& groups) : groups_(groups), added_(groups.size()) {}

void Turns::wait(std::int64_t task, const KeyBlock& block) const {
  // A task that touches the block has itself waited for those before it.
  std::int64_t earlier = groups_[task].previous;
  for (; earlier >= 0; earlier = groups_[earlier].previous) {
    const VisibleKeys& keys = groups_[earlier].keys;
    if (keys.first < block.end() && keys.end > block.begin) break;
  }
  if (earlier < 0) return;
  for (int spins = 0; added_[earlier].load(std::memory_order_acquire) < block.end(); ++spins) {
    if (spins < 256) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

void Turns::done(std::int64_t task, std::int64_t key) {
  added_[task].store(key, std::memory_order_release);
}

}  // namespace zigzag::cpu
