#include "schedule_tables.h"

#include <algorithm>
#include <list>
#include <mutex>
#include <utility>

namespace zigzag {

namespace {

/// Packs times ranks that are kept: a few packs in flight for the ranks of one process.
constexpr std::size_t kKept = 64;

struct Entry {
  Plan plan;
  std::int64_t rank;
  Mask mask;
  std::shared_ptr<const ScheduleTables> tables;
};

std::uint64_t mix(std::uint64_t hash, std::int64_t value) {
  return (hash ^ static_cast<std::uint64_t>(value)) * 0x9e3779b97f4a7c15U;
}

std::uint64_t table_key(const Plan& plan, std::int64_t rank, const Mask& mask) {
  std::uint64_t key = plan.fingerprint();
  for (const std::int64_t value :
       {rank, std::int64_t{mask.causal}, mask.window_left, mask.window_right}) {
    key = mix(key, value);
  }
  return key == 0 ? 1 : key;
}

}  // namespace

std::shared_ptr<const ScheduleTables> schedule_tables(const Plan& plan, std::int64_t rank,
                                                      const Mask& mask) {
  static std::mutex mutex;
  static std::list<Entry> entries;  // the most recently used first
  {
    const std::lock_guard lock(mutex);
    const auto found = std::find_if(entries.begin(), entries.end(), [&](const Entry& entry) {
      return entry.rank == rank && entry.mask == mask && entry.plan == plan;
    });
    if (found != entries.end()) {
      entries.splice(entries.begin(), entries, found);
      return entries.front().tables;
    }
  }
  auto tables = std::make_shared<ScheduleTables>();
  tables->items = plan.work_items(rank, mask);
  if (plan.world_size() > 1) {
    tables->exchange = comm::make_exchange_table(plan, rank, mask);
    tables->exchange.key = table_key(plan, rank, mask);
  }
  const std::lock_guard lock(mutex);
  entries.push_front({plan, rank, mask, tables});
  if (entries.size() > kKept) entries.pop_back();
  return tables;
}

}  // namespace zigzag
