// Per-target: included once for each target by kernels.cpp.
#if defined(ZIGZAG_CPU_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZIGZAG_CPU_FORWARD_INL_H_
#undef ZIGZAG_CPU_FORWARD_INL_H_
#else
#define ZIGZAG_CPU_FORWARD_INL_H_
#endif

#include <cmath>
#include <cstdint>
#include <limits>

#include <hwy/highway.h>

#include "cpu/panel-inl.h"

HWY_BEFORE_NAMESPACE();
namespace zigzag::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// The softmax of the keys that a lane has seen so far: `max` of their scores (log2) and `sum` of
/// 2^(score - max). A lane that has seen no key has max -inf and sum 0. Merging takes the larger
/// max and scales both sums to it; an empty state adds exactly nothing, and two empty states merge
/// to an empty one, since differences are taken from 0 where the larger max is -inf.
struct SoftmaxState {
  FloatVec max;
  FloatVec sum;

  /// What scores are subtracted from.
  HWY_INLINE FloatVec origin() const {
    const Floats d;
    const FloatVec lowest = hn::Set(d, -std::numeric_limits<float>::infinity());
    return hn::IfThenZeroElse(hn::Eq(max, lowest), max);
  }
  /// Takes in scores up to `other`; returns the factor that sums so far shrink by.
  HWY_INLINE FloatVec raise(FloatVec other) {
    const Floats d;
    const FloatVec before = max;
    max = hn::Max(max, other);
    const FloatVec factor = exp2(d, hn::Sub(before, origin()));
    sum = hn::Mul(sum, factor);
    return factor;
  }
};

/// Scratch of a forward task.
struct ForwardScratch {
  ForwardScratch(std::byte* memory, std::int64_t head_dim, std::int64_t lanes)
      : columns(padded_columns(head_dim)), stride(columns + 16) {
    Carver carver(memory);
    const std::int64_t width = (lanes + kVectorLanes - 1) / kVectorLanes * kVectorLanes;
    q = carver.floats(head_dim * width);
    out = carver.floats(columns * width);
    max = carver.floats(width);
    sum = carver.floats(width);
    k = carver.floats(kBlockKeys * stride);
    v = carver.floats(kBlockKeys * stride);
    v_clean = carver.floats(kBlockKeys * stride);
    weights = carver.floats(kBlockKeys * kPanelLanes);
    rows = carver.floats(kPanelLanes * stride);
    bytes = carver.bytes();
  }
  std::int64_t columns;  // head_dim, padded
  std::int64_t stride;   // between packed rows: not a power of two, for the cache's sets
  float* q;              // panels of [head_dim, width]
  float* out;            // panels of [columns, width], not yet divided by the sums
  float* max;            // [lanes]
  float* sum;            // [lanes]
  float* k;              // [kBlockKeys, stride]
  float* v;              // [kBlockKeys, stride]
  float* v_clean;        // v with 0 for what is not finite
  float* weights;        // [kBlockKeys, width] scores, then 2^(score - max)
  float* rows;           // [kPanelLanes, stride]
  std::size_t bytes;
};

/// Caps scores and hides what lanes do not see, in place; returns the largest of a vector of lanes.
/// For the tiles that need it.
template <int kVectors>
HWY_ATTR void adjust_scores(const Problem& problem, const PanelMask& mask, int key, bool full,
                            float* scores, FloatVec (&largest)[kVectors]) {
  const Floats d;
  const FloatVec lowest = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int i = 0; i < kTileRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* at = scores + (i * kVectors + v) * kVectorLanes;
      FloatVec s = hn::Load(d, at);
      if (problem.cap != 0) s = capped_score(problem, s);
      if (!full) s = hn::IfThenElse(sees_vector(mask, v, key + i), s, lowest);
      largest[v] = hn::Max(largest[v], s);
      hn::Store(s, d, at);
    }
  }
}

/// Scores of a panel and a block, still to be multiplied by log2_factor; their largest a lane.
template <int kVectors>
HWY_INLINE void score_block(const Problem& problem, const PanelMask& mask, const BlockRange& range,
                            const float* q, Prefetcher& ahead, const ForwardScratch& scratch,
                            FloatVec (&largest)[kVectors]) {
  constexpr int kWidth = kVectors * kVectorLanes;
  for (int key = range.begin; key < range.end; key += kTileRows) {
    ahead.step();
    Tile<kVectors> tile;
    set_zero(tile);
    multiply<false>(scratch.k + key * scratch.stride, scratch.stride, q, kWidth, problem.head_dim,
                    tile);
    float* scores = scratch.weights + key * kWidth;
    store(tile, scores, kWidth);
    const bool full = range.full(key, kTileRows);
    if (problem.cap != 0 || !full) {
      adjust_scores<kVectors>(problem, mask, key, full, scores, largest);
      continue;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) largest[v] = hn::Max(largest[v], tile.value[i][v]);
    }
  }
}

/// One panel against one block of keys.
template <int kVectors>
HWY_ATTR void forward_block(const Problem& problem, const RowGroup& group, const Panel& panel,
                            const KeyBlock& block, const BlockRange& range, bool finite,
                            Prefetcher& ahead, const ForwardScratch& scratch) {
  const Floats d;
  constexpr int kWidth = kVectors * kVectorLanes;
  const float* q = scratch.q + problem.head_dim * panel.offset;
  float* out = scratch.out + scratch.columns * panel.offset;
  PanelMask mask;
  if (!range.full() || !finite) mask.set(problem, group, panel, block);

  const FloatVec scale = hn::Set(d, problem.log2_factor());
  FloatVec largest[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    largest[v] = hn::Set(d, -std::numeric_limits<float>::infinity());
  }
  score_block<kVectors>(problem, mask, range, q, ahead, scratch, largest);

  FloatVec factor[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const std::int64_t at = panel.offset + v * kVectorLanes;
    SoftmaxState state = {hn::Load(d, scratch.max + at), hn::Load(d, scratch.sum + at)};
    factor[v] = state.raise(hn::Mul(largest[v], scale));
    const FloatVec origin = state.origin();
    FloatVec even = hn::Zero(d);
    FloatVec odd = hn::Zero(d);
    float* weights = scratch.weights + v * kVectorLanes;
    for (int key = range.begin; key < range.end; key += 2) {
      float* low = weights + key * kWidth;
      float* high = low + kWidth;
      const FloatVec low_weight = exp2(d, hn::MulSub(hn::Load(d, low), scale, origin));
      const FloatVec high_weight = exp2(d, hn::MulSub(hn::Load(d, high), scale, origin));
      even = hn::Add(even, low_weight);
      odd = hn::Add(odd, high_weight);
      hn::Store(low_weight, d, low);
      hn::Store(high_weight, d, high);
    }
    hn::Store(state.max, d, scratch.max + at);
    hn::Store(hn::Add(state.sum, hn::Add(even, odd)), d, scratch.sum + at);
  }

  // Sums of a block are added to those of the blocks before it: two short chains keep float32's
  // digits where one long chain would lose them.
  const float* values = finite ? scratch.v : scratch.v_clean;
  for (std::int64_t c = 0; c < problem.head_dim; c += kTileRows) {
    Tile<kVectors> tile;
    set_zero(tile);
    multiply<true>(values + range.begin * scratch.stride + c, scratch.stride,
                   scratch.weights + range.begin * kWidth, kWidth, range.end - range.begin, tile);
    accumulate<true>(tile, factor, out + c * kWidth, kWidth);
  }
  if (finite) return;
  // 0 times a value that is not finite would be NaN: only lanes that see such a value get it.
  for (int key = range.begin; key < range.end; ++key) {
    for (std::int64_t c = 0; c < problem.head_dim; ++c) {
      const float value = scratch.v[key * scratch.stride + c];
      if (std::isfinite(value)) continue;
      for (int l = 0; l < panel.lanes; ++l) {
        if (mask.sees(l, key)) out[c * kWidth + l] += scratch.weights[key * kWidth + l] * value;
      }
    }
  }
}

/// Divides a panel's sums and writes its rows of out and lse.
inline HWY_ATTR void finish_forward(const Problem& problem, const RowGroup& group,
                                    const Panel& panel, const ForwardScratch& scratch) {
  const float* out = scratch.out + scratch.columns * panel.offset;
  transpose(out, panel.width, problem.head_dim, panel.width, scratch.rows, scratch.stride);
  LaneCursor lse_rows(problem, problem.lse, group, panel.lane_begin);
  for (int l = 0; l < panel.lanes; ++l) {
    const float sum = scratch.sum[panel.offset + l];
    const float scale = sum == 0 ? 0 : 1 / sum;
    float* row = scratch.rows + l * scratch.stride;
    // Adding 0 makes -0 into 0: a tiny sum that rounded to -0 depends on later zero weights.
    for (std::int64_t c = 0; c < problem.head_dim; ++c) row[c] = row[c] * scale + 0.0f;
    constexpr double kLn2 = 0.6931471805599453;
    const double lse = static_cast<double>(scratch.max[panel.offset + l]) * kLn2 +
                       std::log(static_cast<double>(sum));
    *reinterpret_cast<float*>(lse_rows.at(l)) = static_cast<float>(lse);
  }
  store_lanes(problem, problem.out, group, panel, scratch.stride, scratch.rows);
}

inline HWY_ATTR void forward_group(const Problem& problem, const RowGroup& group,
                                   std::byte* memory) {
  const ForwardScratch scratch(memory, problem.head_dim, group.width);
  const std::int64_t parts = panel_count(group, kPanelLanes);
  Prefetcher first(problem, group, first_block(group.keys, kBlockKeys), parts);
  for_each_panel(problem, group, next_width, [&](const Panel& panel) HWY_ATTR {
    first.step();
    load_lanes(problem, problem.q, group, panel, scratch.stride,
               {problem, problem.q, group, panel.lane_begin + panel.lanes}, scratch.rows);
    transpose(scratch.rows, scratch.stride, panel.width, problem.head_dim,
              scratch.q + problem.head_dim * panel.offset, panel.width);
    sign_lanes(problem, problem.head_dim * panel.width,
               scratch.q + problem.head_dim * panel.offset);
    float* out = scratch.out + scratch.columns * panel.offset;
    std::fill(out, out + scratch.columns * panel.width, 0.0f);
    std::fill_n(scratch.max + panel.offset, panel.width, -std::numeric_limits<float>::infinity());
    std::fill_n(scratch.sum + panel.offset, panel.width, 0.0f);
  });
  const std::int64_t end = group.keys.end;
  for (KeyBlock block = first_block(group.keys, kBlockKeys); block.begin < end;
       block.begin += block.keys) {
    const BlockRange all = block_range(group.keys, group.keys, block, kTileKeys);
    load_block(problem.k, group, block, all, problem.head_dim, scratch.stride, scratch.k);
    const bool finite =
        load_block(problem.v, group, block, all, problem.head_dim, scratch.stride, scratch.v);
    if (!finite) {
      clean_block(scratch.v, scratch.stride, all, scratch.columns, scratch.v_clean);
    }
    Prefetcher ahead(problem, group, {block.end(), block.keys},
                     parts * (all.end - all.begin) / kTileKeys);
    for_each_panel(problem, group, next_width, [&](const Panel& panel) HWY_ATTR {
      const BlockRange range = block_range(panel.first, panel.last, block, kTileKeys);
      if (range.empty()) return;
      switch (panel.width / kVectorLanes) {
        case 1:
          return forward_block<1>(problem, group, panel, block, range, finite, ahead, scratch);
        case 2:
          return forward_block<2>(problem, group, panel, block, range, finite, ahead, scratch);
        default:
          return forward_block<3>(problem, group, panel, block, range, finite, ahead, scratch);
      }
    });
    ahead.finish();
  }
  for_each_panel(problem, group, next_width, [&](const Panel& panel) HWY_ATTR {
    finish_forward(problem, group, panel, scratch);
  });
}

inline std::size_t forward_scratch(std::int64_t head_dim, std::int64_t lanes) {
  return ForwardScratch(nullptr, head_dim, lanes).bytes;
}

}  // namespace zigzag::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
