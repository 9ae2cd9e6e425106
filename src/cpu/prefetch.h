#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/kernel.h"
#include "cpu/panel.h"

namespace zigzag::cpu {

/// Into the nearest cache: on some machines hints for farther ones are hardly heeded.
template <int kWrite>
inline void prefetch(const void* from, std::int64_t bytes) {
  for (std::int64_t byte = 0; byte < bytes; byte += 64) {
    __builtin_prefetch(static_cast<const std::byte*>(from) + byte, kWrite, 3);
  }
}

/// Calls rows of a tensor like q towards the cache, a lane a step, from `lane_begin` to the end of
/// the task.
class LanesAhead {
 public:
  LanesAhead(const Problem& problem, const TensorRows& x, const RowGroup& group,
             std::int64_t lane_begin)
      : rows_(problem, x, group, lane_begin),
        row_bytes_(x.row_bytes),
        left_(group.lane_end - lane_begin) {}
  void step() {
    if (left_ <= 0) return;
    --left_;
    prefetch<0>(rows_.at(lane_++), row_bytes_);
  }

 private:
  LaneCursor rows_;
  std::int64_t row_bytes_;
  std::int64_t left_;
  int lane_ = 0;
};

/// Calls what is needed next towards the cache, a few rows a step: a core has few lines on their
/// way at a time, and waits when it asks for more. That are the keys of a block or, when the task
/// has no such block, the first rows and keys of the task that follows it.
class Prefetcher {
 public:
  /// Spreads the keys of `block` over `steps` steps. With `sums`, the sums of `summed` too.
  Prefetcher(const Problem& problem, const RowGroup& group, const KeyBlock& block,
             std::int64_t steps, const GradientSums* sums = nullptr, const KeyBlock& summed = {})
      : Prefetcher(problem, next_of(group, block), steps) {
    if (sums == nullptr) return;
    sums_ = *sums;
    const std::int64_t first_row = group.item->k_begin - group.item->k_position - sums_.first_row;
    sum_row_ = first_row + std::max(group.keys.first, summed.begin);
    sum_end_ = first_row + std::min(group.keys.end, summed.end());
    a_step_ = std::max(a_step_, spread(sum_end_ - sum_row_, steps));
  }

  void step() {
    for (std::int64_t i = 0; i < a_step_ && key_ < end_; ++i, ++key_) {
      for (KeyCursor* keys : {&k_, &v_}) {
        const std::byte* row = keys->row(static_cast<int>(key_));
        if (row != nullptr) prefetch<0>(row, row_bytes_);
      }
      lanes_.step();
    }
    const std::int64_t bytes = head_dim_ * std::int64_t{sizeof(float)};
    for (std::int64_t i = 0; i < a_step_ && sum_row_ < sum_end_; ++i, ++sum_row_) {
      prefetch<1>(sums_.dk + sum_row_ * sums_.stride_k, bytes);
      prefetch<1>(sums_.dv + sum_row_ * sums_.stride_v, bytes);
    }
  }
  /// Takes the steps that are left.
  void finish() {
    while (key_ < end_ || sum_row_ < sum_end_) step();
  }

 private:
  static std::int64_t spread(std::int64_t rows, std::int64_t steps) {
    return steps < 1 ? rows : (rows + steps - 1) / steps;
  }
  struct Next {
    const RowGroup& group;
    KeyBlock block;
    std::int64_t lane_begin;
  };
  static Next next_of(const RowGroup& group, const KeyBlock& block) {
    const RowGroup* next = group.next;
    if (block.begin < group.keys.end || next == nullptr) return {group, block, group.lane_end};
    return {*next, first_block(next->keys, block.keys), next->lane_begin};
  }
  Prefetcher(const Problem& problem, const Next& next, std::int64_t steps)
      : k_(problem.k, next.group, next.block),
        v_(problem.v, next.group, next.block),
        lanes_(problem, problem.q, next.group, next.lane_begin),
        row_bytes_(problem.k.row_bytes),
        key_(in_block(next.group.keys.first, next.block)),
        end_(in_block(next.group.keys.end, next.block)),
        a_step_(spread(end_ - key_, steps)),
        head_dim_(problem.head_dim) {}

  KeyCursor k_;
  KeyCursor v_;
  LanesAhead lanes_;
  std::int64_t row_bytes_;
  std::int64_t key_;
  std::int64_t end_;
  std::int64_t a_step_;
  std::int64_t head_dim_;
  GradientSums sums_;
  std::int64_t sum_row_ = 0;
  std::int64_t sum_end_ = 0;
};

}  // namespace zigzag::cpu
