#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <span>

#include "cpu/kernel.h"
#include "zigzag/tensor.h"

namespace zigzag::cpu {

/// Cuts a task's scratch into aligned arrays. Without memory it only counts bytes.
class Carver {
 public:
  explicit Carver(std::byte* memory) : memory_(memory) {}
  template <typename T>
  T* take(std::int64_t count) {
    std::byte* at = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }
  float* floats(std::int64_t count) { return take<float>(count); }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* memory_;
  std::size_t bytes_ = 0;
};

/// Lanes that are computed together: lane l of the panel is lane lane_begin + l of the item. Lanes
/// from `lanes` to `width` hold zeros.
struct Panel {
  std::int64_t lane_begin = 0;
  int lanes = 0;
  int width = 0;
  std::int64_t offset = 0;  // widths of the group's panels before it
  VisibleKeys first;        // what its first and its last lane see
  VisibleKeys last;
};

/// Calls use(panel) for the panels of a group in lane order. next_width(lanes) is the width of the
/// next panel when so many lanes are left.
template <typename NextWidth, typename Use>
inline void for_each_panel(const Problem& problem, const RowGroup& group,
                           const NextWidth& next_width, const Use& use) {
  Panel panel;
  panel.lane_begin = group.lane_begin;
  while (panel.lane_begin < group.lane_end) {
    std::int64_t end = group.lane_end;
    // Rows on both sides of a jump see keys far apart: they share no panel.
    if (group.item->jump > 0 && panel.lane_begin / problem.group < group.item->jump_row) {
      end = std::min(end, group.item->jump_row * problem.group);
    }
    const std::int64_t left = end - panel.lane_begin;
    panel.width = next_width(left);
    panel.lanes = static_cast<int>(std::min<std::int64_t>(left, panel.width));
    panel.first = visible_keys(problem, *group.item, panel.lane_begin);
    panel.last = visible_keys(problem, *group.item, panel.lane_begin + panel.lanes - 1);
    use(panel);
    panel.lane_begin += panel.lanes;
    panel.offset += panel.width;
  }
}

/// The keys of one block that a panel works on, counted from the block's start: [begin, end) in
/// whole tiles, of which every lane sees [full_begin, full_end).
struct BlockRange {
  int begin = 0;
  int end = 0;
  int full_begin = 0;
  int full_end = 0;
  bool empty() const { return begin >= end; }
  bool full() const { return begin >= full_begin && end <= full_end; }
  bool full(int key, int keys) const { return key >= full_begin && key + keys <= full_end; }
};

/// The first block that touches these keys. Blocks lie at multiples of `keys` from the document's
/// start: so a row's sums are grouped alike whichever rank, item, thread or tile computes it.
inline KeyBlock first_block(const VisibleKeys& visible, std::int64_t keys) {
  return {visible.first / keys * keys, keys};
}

/// A key's distance from the start of a block, cut to the block.
inline std::int64_t in_block(std::int64_t key, const KeyBlock& block) {
  return std::clamp<std::int64_t>(key - block.begin, 0, block.keys);
}

inline BlockRange block_range(VisibleKeys first, VisibleKeys last, const KeyBlock& block,
                              int tile_keys) {
  BlockRange range;
  range.begin = static_cast<int>(in_block(first.first, block)) / tile_keys * tile_keys;
  range.end = (static_cast<int>(in_block(last.end, block)) + tile_keys - 1) / tile_keys * tile_keys;
  range.full_begin = static_cast<int>(in_block(last.first, block));
  range.full_end = static_cast<int>(in_block(first.end, block));
  return range;
}

/// Which keys of a block each lane of a panel sees: [first, end) from the block's start, as floats
/// (small whole numbers) so that vectors of lanes compare with them.
template <int kLanes>
struct LaneMask {
  alignas(64) float first[kLanes];
  alignas(64) float end[kLanes];

  void set(const Problem& problem, const RowGroup& group, const Panel& panel,
           const KeyBlock& block) {
    for (int l = 0; l < panel.width; ++l) {
      VisibleKeys keys;
      if (l < panel.lanes) keys = visible_keys(problem, *group.item, panel.lane_begin + l);
      first[l] = static_cast<float>(in_block(keys.first, block));
      end[l] = static_cast<float>(in_block(keys.end, block));
    }
  }
  bool sees(int lane, int key) const {
    return static_cast<float>(key) >= first[lane] && static_cast<float>(key) < end[lane];
  }
};

/// Finds rows of a tensor. They are asked for in rising order: a search is made only where the rows
/// of one rank end.
class RowCursor {
 public:
  explicit RowCursor(const TensorRows& x) : pieces_(x.all()) {}
  std::byte* at(std::int64_t row, std::int64_t head) {
    if (row < piece_.begin || row >= piece_.end) find(row);
    return piece_.data + (row - piece_.begin) * piece_.row_stride + head * piece_.head_stride;
  }
  /// The rows that stand together with the last one asked for.
  const LentRows& piece() const { return piece_; }

 private:
  void find(std::int64_t row) {
    const auto next = std::upper_bound(
        pieces_.begin(), pieces_.end(), row,
        [](std::int64_t value, const LentRows& piece) { return value < piece.begin; });
    piece_ = *std::prev(next);
  }

  std::span<const LentRows> pieces_;
  LentRows piece_;
};

/// Finds the rows of lanes from `lane_begin` in a tensor like q, [tokens, heads, ...].
class LaneCursor {
 public:
  LaneCursor(const Problem& problem, const TensorRows& x, const RowGroup& group,
             std::int64_t lane_begin)
      : rows_(x),
        item_(*group.item),
        first_lane_(lane_begin),
        group_(problem.group),
        first_head_(group.kv_head * problem.group) {}
  std::byte* at(int l) {
    const std::int64_t lane = first_lane_ + l;
    return rows_.at(item_.tensor_row(lane / group_), first_head_ + lane % group_);
  }

 private:
  RowCursor rows_;
  const TaskRows& item_;
  std::int64_t first_lane_;
  std::int64_t group_;
  std::int64_t first_head_;
};

/// A row's lse in units of log2, as the backward subtracts it from scores. A row that sees no score
/// but -inf is empty: there +inf, so that its weights are 0 and not 2^(-inf - -inf).
inline float log2_lse(float lse) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kLog2E = 1.4426950408889634f;
  return lse == -kInfinity ? kInfinity : lse * kLog2E;
}

/// Finds the rows of a block's keys in k or v.
class KeyCursor {
 public:
  KeyCursor(const TensorRows& x, const RowGroup& group, const KeyBlock& block)
      : rows_(x),
        first_(block.begin - group.item->k_position),
        k_begin_(group.item->k_begin),
        k_count_(group.item->k_count),
        kv_head_(group.kv_head) {}

  /// Null when the item lacks the key.
  const std::byte* row(int key) {
    const std::int64_t index = first_ + key;
    if (index < 0 || index >= k_count_) return nullptr;
    return rows_.at(k_begin_ + index, kv_head_);
  }

 private:
  RowCursor rows_;
  std::int64_t first_;
  std::int64_t k_begin_;
  std::int64_t k_count_;
  std::int64_t kv_head_;
};

/// Panels that a group is cut into when each is `lanes` wide.
inline std::int64_t panel_count(const RowGroup& group, std::int64_t lanes) {
  return (group.lane_end - group.lane_begin + lanes - 1) / lanes;
}

/// Calls use(key, dk, dv, fresh) for the keys of a block that a task's lanes see, counted from the
/// block's start: where they are summed, and whether nothing is there yet.
template <typename Use>
inline void for_each_sum(const RowGroup& group, const KeyBlock& block, const GradientSums& sums,
                         const Use& use) {
  const std::int64_t first_row = group.item->k_begin - group.item->k_position - sums.first_row;
  const std::int64_t end = std::min(group.keys.end, block.end());
  for (std::int64_t key = std::max(group.keys.first, block.begin); key < end; ++key) {
    const std::int64_t row = first_row + key;
    use(key - block.begin, sums.dk + row * sums.stride_k, sums.dv + row * sums.stride_v,
        key >= group.fresh.first && key < group.fresh.end);
  }
}

}  // namespace zigzag::cpu
