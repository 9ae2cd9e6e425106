#include <algorithm>
#include <limits>
#include <thread>

#include "cpu/kernel.h"

namespace zigzag::cpu {
namespace {

// Pairs that lanes [begin, end) see: exact in the middle of a mask, a mean at its edges, which is
// all that an order of tasks needs.
double visible_pairs(const Problem& problem, const WorkItem& item, std::int64_t begin,
                     std::int64_t end) {
  const VisibleKeys first = visible_keys(problem, item, begin);
  const VisibleKeys last = visible_keys(problem, item, end - 1);
  const auto keys = static_cast<double>(first.end - first.first + last.end - last.first);
  return keys / 2 * static_cast<double>(end - begin);
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

VisibleKeys visible_keys(const Problem& problem, const WorkItem& item, std::int64_t lane) {
  const Mask& mask = problem.args->mask;
  const std::int64_t position = item.q_position + lane / problem.group;
  const std::int64_t end_of_keys = item.k_position + item.k_count;
  VisibleKeys keys{std::max(mask.first_key(position), item.k_position),
                   std::min(mask.end_key(position, item.document_length), end_of_keys)};
  // An empty range stays inside the item's keys, so that ranges of neighbours still grow.
  keys.first = std::min(keys.first, end_of_keys);
  keys.end = std::max(keys.end, keys.first);
  return keys;
}

std::vector<RowGroup> row_groups(const Problem& problem, std::int64_t lanes) {
  const std::int64_t kv_heads = problem.args->k.shape[1];
  std::vector<RowGroup> groups;
  for (const WorkItem& item : problem.args->items) {
    const std::int64_t item_lanes = item.q_count * problem.group;
    if (item_lanes == 0) continue;
    const std::int64_t pieces = (item_lanes + lanes - 1) / lanes;
    for (std::int64_t piece = 0; piece < pieces; ++piece) {
      // Whole pieces first: their lanes fill panels.
      RowGroup group;
      group.item = &item;
      group.lane_begin = piece * lanes;
      group.lane_end = std::min(item_lanes, group.lane_begin + lanes);
      group.keys.first = visible_keys(problem, item, group.lane_begin).first;
      group.keys.end = visible_keys(problem, item, group.lane_end - 1).end;
      group.cost = visible_pairs(problem, item, group.lane_begin, group.lane_end);
      for (std::int64_t head = 0; head < kv_heads; ++head) {
        group.kv_head = head;
        group.unit = item.document * kv_heads + head;
        groups.push_back(group);
      }
    }
  }
  std::stable_sort(groups.begin(), groups.end(),
                   [](const RowGroup& a, const RowGroup& b) { return a.cost > b.cost; });
  return groups;
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
