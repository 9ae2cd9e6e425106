// Per-target: included once for each target by kernels.cpp.
#if defined(ZIGZAG_CPU_PANEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZIGZAG_CPU_PANEL_INL_H_
#undef ZIGZAG_CPU_PANEL_INL_H_
#else
#define ZIGZAG_CPU_PANEL_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>

#include "cpu/exp-inl.h"
#include "cpu/kernel.h"
#include "cpu/matmul-inl.h"
#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace zigzag::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

inline constexpr int kPanelLanes = kPanelVectors * kVectorLanes;

/// Cuts a task's scratch into aligned arrays. Without memory it only counts bytes.
class Carver {
 public:
  explicit Carver(std::byte* memory) : memory_(memory) {}
  float* floats(std::int64_t count) {
    std::byte* at = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += (static_cast<std::size_t>(count) * sizeof(float) + 63) / 64 * 64;
    return reinterpret_cast<float*>(at);
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* memory_;
  std::size_t bytes_ = 0;
};

/// Lanes that are computed together: lane l of the panel is lane lane_begin + l of the item. Lanes
/// past `lanes` hold zeros.
struct Panel {
  std::int64_t lane_begin = 0;
  int lanes = 0;
  int vectors = 0;
  std::int64_t offset = 0;  // lanes of the panels before it
  KeyRange first;           // what its first and its last lane see
  KeyRange last;
  int width() const { return vectors * kVectorLanes; }
};

/// Vectors of the next panel when `vectors` are left: 3, but 2 + 2 rather than 3 + 1.
inline int next_vectors(std::int64_t vectors) {
  return vectors == 4 ? 2 : static_cast<int>(std::min<std::int64_t>(vectors, kPanelVectors));
}

/// Calls use(panel) for the panels of a group in lane order.
template <typename Use>
inline void for_each_panel(const Problem& problem, const RowGroup& group, const Use& use) {
  Panel panel;
  panel.lane_begin = group.lane_begin;
  while (panel.lane_begin < group.lane_end) {
    const std::int64_t left = group.lane_end - panel.lane_begin;
    panel.vectors = next_vectors((left + kVectorLanes - 1) / kVectorLanes);
    panel.lanes = static_cast<int>(std::min<std::int64_t>(left, panel.width()));
    panel.first = visible_keys(problem, *group.item, panel.lane_begin);
    panel.last = visible_keys(problem, *group.item, panel.lane_begin + panel.lanes - 1);
    use(panel);
    panel.lane_begin += panel.lanes;
    panel.offset += panel.width();
  }
}

/// The keys of one block that a panel works on, counted from the block's start: [begin, end) in
/// whole tiles, of which every lane sees [full_begin, full_end).
struct BlockRange {
  int begin = 0;
  int end = 0;
  int full_begin = 0;
  int full_end = 0;
  bool full(int key) const { return key >= full_begin && key + kTileRows <= full_end; }
};

inline BlockRange block_range(const Panel& panel, std::int64_t block) {
  const auto local = [&](std::int64_t key) {
    return static_cast<int>(std::clamp<std::int64_t>(key - block * kBlockKeys, 0, kBlockKeys));
  };
  BlockRange range;
  range.begin = static_cast<int>(local(panel.first.first) / kTileKeys * kTileKeys);
  range.end = static_cast<int>((local(panel.last.end) + kTileKeys - 1) / kTileKeys * kTileKeys);
  range.full_begin = local(panel.last.first);
  range.full_end = local(panel.first.end);
  return range;
}

/// Which keys of a block each lane sees, as float vectors: key positions are small whole numbers.
struct LaneMask {
  alignas(64) float first[kPanelLanes];
  alignas(64) float end[kPanelLanes];

  void set(const Problem& problem, const RowGroup& group, const Panel& panel, std::int64_t block) {
    for (int l = 0; l < panel.width(); ++l) {
      KeyRange keys;
      if (l < panel.lanes) keys = visible_keys(problem, *group.item, panel.lane_begin + l);
      first[l] = local(keys.first, block);
      end[l] = local(keys.end, block);
    }
  }
  bool sees(int lane, int key) const {
    return static_cast<float>(key) >= first[lane] && static_cast<float>(key) < end[lane];
  }
  HWY_INLINE hn::Mask<Floats> sees_vector(int vector, int key) const {
    const Floats d;
    const FloatVec position = hn::Set(d, static_cast<float>(key));
    return hn::And(hn::Ge(position, hn::Load(d, first + vector * kVectorLanes)),
                   hn::Lt(position, hn::Load(d, end + vector * kVectorLanes)));
  }

 private:
  static float local(std::int64_t key, std::int64_t block) {
    const std::int64_t distance = key - block * kBlockKeys;
    return static_cast<float>(std::clamp<std::int64_t>(distance, 0, kBlockKeys));
  }
};

/// Keys [begin, end) of a block of K or V as float32 rows at `stride`; rows that the item lacks
/// are 0. Returns whether all are finite.
inline HWY_ATTR bool load_block(const TensorView& x, const RowGroup& group, std::int64_t block,
                                const BlockRange& range, std::int64_t head_dim,
                                std::int64_t stride, float* to) {
  const WorkItem& item = *group.item;
  const std::int64_t columns = padded_columns(head_dim);
  bool finite = true;
  for (int key = range.begin; key < range.end; ++key) {
    const std::int64_t row = block * kBlockKeys + key - item.k_position;
    float* at = to + key * stride;
    if (row < 0 || row >= item.k_count) {
      std::fill(at, at + columns, 0.0f);
    } else {
      finite &= load_row(x.dtype, row_pointer(x, item.k_begin + row, group.kv_head), head_dim,
                         columns, at);
    }
  }
  return finite;
}

/// The block with 0 for what is not finite.
inline void clean_block(const float* from, std::int64_t stride, const BlockRange& range,
                        std::int64_t columns, float* to) {
  for (std::int64_t key = range.begin; key < range.end; ++key) {
    clean(from + key * stride, columns, to + key * stride);
  }
}

/// The rows of a panel's lanes as float32 at `stride`; rows of empty lanes are 0. Returns whether
/// all are finite.
inline HWY_ATTR bool load_lanes(const Problem& problem, const TensorView& x, const RowGroup& group,
                                const Panel& panel, std::int64_t stride, float* to) {
  const std::int64_t columns = padded_columns(problem.head_dim);
  bool finite = true;
  for (int l = 0; l < panel.width(); ++l) {
    float* at = to + l * stride;
    if (l >= panel.lanes) {
      std::fill(at, at + columns, 0.0f);
      continue;
    }
    const std::int64_t lane = panel.lane_begin + l;
    const std::int64_t head = group.kv_head * problem.group + lane % problem.group;
    const std::int64_t row = group.item->q_begin + lane / problem.group;
    finite &= load_row(x.dtype, row_pointer(x, row, head), problem.head_dim, columns, at);
  }
  return finite;
}

/// Writes a panel's rows to the tensor.
inline HWY_ATTR void store_lanes(const Problem& problem, const TensorView& x,
                                 const RowGroup& group, const Panel& panel, std::int64_t stride,
                                 const float* from) {
  for (int l = 0; l < panel.lanes; ++l) {
    const std::int64_t lane = panel.lane_begin + l;
    const std::int64_t head = group.kv_head * problem.group + lane % problem.group;
    const std::int64_t row = group.item->q_begin + lane / problem.group;
    store_row(x.dtype, from + l * stride, problem.head_dim, row_pointer(x, row, head));
  }
}

inline float* lse_pointer(const Problem& problem, const RowGroup& group, std::int64_t lane) {
  const TensorView& lse = problem.args->lse;
  const std::int64_t head = group.kv_head * problem.group + lane % problem.group;
  const std::int64_t row = group.item->q_begin + lane / problem.group;
  return lse.as<float>() + row * lse.strides[0] + head * lse.strides[1];
}

/// Scores in units of log2 from products q.k.
HWY_INLINE FloatVec score(const Problem& problem, FloatVec product) {
  const Floats d;
  const FloatVec scaled = hn::Mul(product, hn::Set(d, problem.score_scale));
  if (problem.cap == 0) return scaled;
  return hn::Mul(hn::Set(d, problem.cap), tanh(d, scaled));
}

}  // namespace zigzag::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
