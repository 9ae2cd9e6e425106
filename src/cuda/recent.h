#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace zigzag::cuda {

/// Values made once a key and kept for the keys asked for lately. Safe to call from any thread.
template <typename Key, typename Value>
class Recent {
 public:
  explicit Recent(std::size_t kept) : kept_(kept) {}

  template <typename Make>
  std::shared_ptr<const Value> get(const Key& key, const Make& make) {
    {
      const std::lock_guard lock(mutex_);
      const auto found = entries_.find(key);
      if (found != entries_.end()) {
        found->second.last_use = ++clock_;
        return found->second.value;
      }
    }
    auto value = std::make_shared<const Value>(make());
    const std::lock_guard lock(mutex_);
    entries_[key] = {value, ++clock_};
    if (entries_.size() > kept_) {
      entries_.erase(std::min_element(
          entries_.begin(), entries_.end(),
          [](const auto& a, const auto& b) { return a.second.last_use < b.second.last_use; }));
    }
    return value;
  }

 private:
  struct Entry {
    std::shared_ptr<const Value> value;
    std::uint64_t last_use = 0;
  };
  const std::size_t kept_;
  std::mutex mutex_;
  std::map<Key, Entry> entries_;
  std::uint64_t clock_ = 0;
};

}  // namespace zigzag::cuda
