#include "cpu/page_pool.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

#include "cpu/parallel.h"

namespace zigzag::cpu {
namespace {

constexpr std::int64_t kMostKept = std::int64_t{256} << 20;
// malloc keeps smaller blocks for itself; larger ones are new pages, each a fault.
constexpr std::int64_t kSmallest = std::int64_t{128} << 10;

// Blocks that nobody uses, by size.
struct Pool {
  std::mutex mutex;
  std::multimap<std::int64_t, void*> blocks;
  std::int64_t bytes = 0;
};

// Never destroyed: rank threads may outlive static objects.
Pool& pool() {
  static Pool& instance = *new Pool;
  return instance;
}

// Sizes in eighths of a power of two, so that packs of nearly equal lengths find a block again.
std::int64_t rounded(std::int64_t bytes) {
  std::int64_t step = kSmallest / 8;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

void give_back(void* memory, std::int64_t bytes) noexcept {
  Pool& kept = pool();
  const std::lock_guard<std::mutex> lock(kept.mutex);
  if (bytes > kMostKept) return std::free(memory);
  // The largest go first: what is asked for often is what is kept.
  while (kept.bytes + bytes > kMostKept) {
    const auto largest = std::prev(kept.blocks.end());
    std::free(largest->second);
    kept.bytes -= largest->first;
    kept.blocks.erase(largest);
  }
  try {
    kept.blocks.emplace(bytes, memory);
    kept.bytes += bytes;
  } catch (const std::bad_alloc&) {
    std::free(memory);
  }
}

}  // namespace

std::shared_ptr<void> pooled_pages(std::int64_t bytes) {
  if (bytes < kSmallest) {
    return {allocate_pages(bytes), [](void* memory) { std::free(memory); }};
  }
  const std::int64_t size = rounded(bytes);
  Pool& kept = pool();
  std::unique_lock<std::mutex> lock(kept.mutex);
  // A block up to a quarter too large is as good.
  const auto found = kept.blocks.lower_bound(size);
  std::int64_t block = size;
  void* memory = nullptr;
  if (found != kept.blocks.end() && found->first <= size + size / 4) {
    block = found->first;
    memory = found->second;
    kept.bytes -= block;
    kept.blocks.erase(found);
  }
  lock.unlock();
  if (memory == nullptr) memory = allocate_pages(size);
  return {memory, [block](void* done) { give_back(done, block); }};
}

}  // namespace zigzag::cpu
