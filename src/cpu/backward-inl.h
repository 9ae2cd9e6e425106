// Per-target: included once for each target by kernels.cpp.
#if defined(ZIGZAG_CPU_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZIGZAG_CPU_BACKWARD_INL_H_
#undef ZIGZAG_CPU_BACKWARD_INL_H_
#else
#define ZIGZAG_CPU_BACKWARD_INL_H_
#endif

#include <cmath>
#include <cstdint>
#include <limits>

#include <hwy/highway.h>

#include "cpu/panel-inl.h"

HWY_BEFORE_NAMESPACE();
namespace zigzag::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Scratch of a backward task.
struct BackwardScratch {
  BackwardScratch(std::byte* memory, std::int64_t head_dim, std::int64_t lanes)
      : columns(padded_columns(head_dim)), stride(columns + 16) {
    Carver carver(memory);
    const std::int64_t width = (lanes + kVectorLanes - 1) / kVectorLanes * kVectorLanes;
    q = carver.floats(head_dim * width);
    dout = carver.floats(head_dim * width);
    q_rows = carver.floats(width * stride);
    dout_rows = carver.floats(width * stride);
    dq = carver.floats(columns * width);
    lse = carver.floats(width);
    delta = carver.floats(width);
    k = carver.floats(kBlockKeys * stride);
    v = carver.floats(kBlockKeys * stride);
    k_clean = carver.floats(kBlockKeys * stride);
    dk = carver.floats(kBlockKeys * stride);
    dv = carver.floats(kBlockKeys * stride);
    weights = carver.floats(kBlockKeys * kPanelLanes);
    dscores = carver.floats(kBlockKeys * kPanelLanes);
    rows = carver.floats(kPanelLanes * stride);
    bytes = carver.bytes();
  }
  std::int64_t columns;  // head_dim, padded
  std::int64_t stride;   // between packed rows
  float* q;              // panels of [head_dim, width]
  float* dout;           // panels of [head_dim, width]
  float* q_rows;         // [lanes, stride], 0 for what is not finite
  float* dout_rows;      // [lanes, stride], 0 for what is not finite
  float* dq;             // panels of [columns, width]
  float* lse;            // [lanes], in units of log2
  float* delta;          // [lanes] sums of dout * out
  float* k;              // [kBlockKeys, stride]
  float* v;              // [kBlockKeys, stride]
  float* k_clean;        // k with 0 for what is not finite
  float* dk;             // [kBlockKeys, stride] sums of this task
  float* dv;             // [kBlockKeys, stride]
  float* weights;        // [kBlockKeys, width] 2^(score - lse)
  float* dscores;        // [kBlockKeys, width]
  float* rows;           // [kPanelLanes, stride]
  std::size_t bytes;
};

/// sums(key, c) += sum over lanes of factors(key, lane) * rows(lane, c).
inline HWY_ATTR void add_outer(const float* factors, std::int64_t width, const float* rows,
                               std::int64_t stride, std::int64_t columns, std::int64_t lanes,
                               const BlockRange& range, float* sums) {
  const auto chunk = [&](auto vectors, std::int64_t c) HWY_ATTR {
    constexpr int kVectors = decltype(vectors)::value;
    for (std::int64_t key = range.begin; key < range.end; key += kTileRows) {
      Tile<kVectors> tile;
      float* at = sums + key * stride + c;
      load(at, stride, tile);
      multiply<false>(factors + key * width, width, rows + c, stride, lanes, tile);
      store(tile, at, stride);
    }
  };
  for (std::int64_t c = 0; c < columns;) {
    const int vectors = next_vectors((columns - c) / kVectorLanes);
    switch (vectors) {
      case 1:
        chunk(std::integral_constant<int, 1>(), c);
        break;
      case 2:
        chunk(std::integral_constant<int, 2>(), c);
        break;
      default:
        chunk(std::integral_constant<int, 3>(), c);
    }
    c += vectors * kVectorLanes;
  }
}

/// Products of a panel's lanes and a block's rows: to(key, lane) = rows(key) . lanes(lane).
template <int kVectors>
HWY_INLINE void multiply_rows(const float* rows, std::int64_t stride, const float* lanes,
                              std::int64_t head_dim, const BlockRange& range, Prefetcher& ahead,
                              float* to) {
  constexpr int kWidth = kVectors * kVectorLanes;
  for (int key = range.begin; key < range.end; key += kTileRows) {
    ahead.step();
    Tile<kVectors> tile;
    set_zero(tile);
    multiply<false>(rows + key * stride, stride, lanes, kWidth, head_dim, tile);
    store(tile, to + key * kWidth, kWidth);
  }
}

/// Turns products q.k in `weights` into weights and products dout.v in `dscores` into gradients of
/// scores. kPlain: no cap, and every lane sees every key.
template <bool kPlain>
HWY_ATTR void differentiate(const Problem& problem, const PanelMask& mask, const Panel& panel,
                            const BlockRange& range, const BackwardScratch& scratch) {
  const Floats d;
  const FloatVec scale = hn::Set(d, problem.log2_factor());
  for (int lane = 0; lane < panel.width; lane += kVectorLanes) {
    const FloatVec lse = hn::Load(d, scratch.lse + panel.offset + lane);
    const FloatVec delta = hn::Load(d, scratch.delta + panel.offset + lane);
    for (int key = range.begin; key < range.end; ++key) {
      float* weight_at = scratch.weights + key * panel.width + lane;
      float* dscore_at = scratch.dscores + key * panel.width + lane;
      FloatVec s = hn::Load(d, weight_at);
      FloatVec slope = hn::Zero(d);
      if (!kPlain && problem.cap != 0) {
        const FloatVec tangent = cap_tangent(problem, s);
        slope = hn::NegMulAdd(tangent, tangent, hn::Set(d, 1.0f));
        s = hn::Mul(tangent, hn::Set(d, problem.cap));
      }
      FloatVec weight = exp2(d, hn::MulSub(s, scale, lse));
      FloatVec dscore = hn::Mul(weight, hn::Sub(hn::Load(d, dscore_at), delta));
      if (!kPlain) {
        if (problem.cap != 0) dscore = hn::Mul(dscore, slope);
        if (!range.full()) {
          const auto seen = sees_vector(mask, lane / kVectorLanes, key);
          weight = hn::IfThenElseZero(seen, weight);
          dscore = hn::IfThenElseZero(seen, dscore);
        }
      }
      hn::Store(weight, d, weight_at);
      hn::Store(dscore, d, dscore_at);
    }
  }
}

/// One panel against one block of keys: recomputes the weights P, then dV += P^T dO, dP = dO V^T,
/// dS = P (dP - delta), dQ += dS K and dK += dS^T Q, the last two still without `scale`.
template <int kVectors>
HWY_ATTR void backward_block(const Problem& problem, const RowGroup& group, const Panel& panel,
                             const KeyBlock& block, const BlockRange& range, bool finite_k,
                             bool finite_rows, Prefetcher& ahead, const BackwardScratch& scratch) {
  constexpr int kWidth = kVectors * kVectorLanes;
  const std::int64_t head_dim = problem.head_dim;
  const std::int64_t stride = scratch.stride;
  const float* q = scratch.q + head_dim * panel.offset;
  const float* dout = scratch.dout + head_dim * panel.offset;
  float* dq = scratch.dq + scratch.columns * panel.offset;
  PanelMask mask;
  if (!range.full() || !finite_k || !finite_rows) mask.set(problem, group, panel, block);

  multiply_rows<kVectors>(scratch.k, stride, q, head_dim, range, ahead, scratch.weights);
  multiply_rows<kVectors>(scratch.v, stride, dout, head_dim, range, ahead, scratch.dscores);
  if (problem.cap == 0 && range.full()) {
    differentiate<true>(problem, mask, panel, range, scratch);
  } else {
    differentiate<false>(problem, mask, panel, range, scratch);
  }
  add_outer(scratch.weights, kWidth, scratch.dout_rows + panel.offset * stride, stride,
            scratch.columns, panel.lanes, range, scratch.dv);
  add_outer(scratch.dscores, kWidth, scratch.q_rows + panel.offset * stride, stride,
            scratch.columns, panel.lanes, range, scratch.dk);
  const float* keys = finite_k ? scratch.k : scratch.k_clean;
  for (std::int64_t c = 0; c < head_dim; c += kTileRows) {
    Tile<kVectors> tile;
    set_zero(tile);
    multiply<true>(keys + range.begin * stride + c, stride, scratch.dscores + range.begin * kWidth,
                   kWidth, range.end - range.begin, tile);
    accumulate<false>(tile, nullptr, dq + c * kWidth, kWidth);
  }
  if (finite_k && finite_rows) return;
  // 0 times a value that is not finite would be NaN: such values reach only what sees them.
  const float sign = problem.score_scale < 0 ? -1.0f : 1.0f;
  for (int key = range.begin; key < range.end; ++key) {
    for (int l = 0; l < panel.lanes; ++l) {
      if (!mask.sees(l, key)) continue;
      const float weight = scratch.weights[key * kWidth + l];
      const float dscore = scratch.dscores[key * kWidth + l];
      for (std::int64_t c = 0; c < head_dim; ++c) {
        const float k = scratch.k[key * stride + c];
        const float q_value = q[c * kWidth + l];
        const float dout_value = dout[c * kWidth + l];
        if (!std::isfinite(k)) dq[c * kWidth + l] += dscore * k;
        if (!std::isfinite(q_value)) scratch.dk[key * stride + c] += dscore * sign * q_value;
        if (!std::isfinite(dout_value)) scratch.dv[key * stride + c] += weight * dout_value;
      }
    }
  }
}

/// Loads a panel's q and dout in both layouts, lse and delta. Returns whether all are finite.
inline HWY_ATTR bool start_backward(const Problem& problem, const RowGroup& group,
                                    const Panel& panel, const BackwardScratch& scratch) {
  const std::int64_t head_dim = problem.head_dim;
  const std::int64_t stride = scratch.stride;
  const Floats d;
  float* q_rows = scratch.q_rows + panel.offset * stride;
  float* dout_rows = scratch.dout_rows + panel.offset * stride;
  bool finite = load_lanes(problem, problem.q, group, panel, stride,
                           {problem, problem.dout, group, panel.lane_begin}, q_rows);
  finite &= load_lanes(problem, problem.dout, group, panel, stride,
                       {problem, problem.out, group, panel.lane_begin}, dout_rows);
  load_lanes(problem, problem.out, group, panel, stride,
             {problem, problem.q, group, panel.lane_begin + panel.lanes}, scratch.rows);
  transpose(q_rows, stride, panel.width, head_dim, scratch.q + head_dim * panel.offset,
            panel.width);
  sign_lanes(problem, head_dim * panel.width, scratch.q + head_dim * panel.offset);
  transpose(dout_rows, stride, panel.width, head_dim, scratch.dout + head_dim * panel.offset,
            panel.width);
  LaneCursor lse_rows(problem, problem.lse, group, panel.lane_begin);
  for (int l = 0; l < panel.width; ++l) {
    FloatVec sum = hn::Zero(d);
    for (std::int64_t c = 0; c < scratch.columns; c += kVectorLanes) {
      sum = hn::MulAdd(hn::Load(d, dout_rows + l * stride + c),
                       hn::Load(d, scratch.rows + l * stride + c), sum);
    }
    scratch.delta[panel.offset + l] = hn::GetLane(hn::SumOfLanes(d, sum));
    scratch.lse[panel.offset + l] =
        l < panel.lanes ? log2_lse(*reinterpret_cast<const float*>(lse_rows.at(l))) : 0.0f;
  }
  if (!finite) {
    for (int l = 0; l < panel.lanes; ++l) {
      clean(q_rows + l * stride, scratch.columns, q_rows + l * stride);
      clean(dout_rows + l * stride, scratch.columns, dout_rows + l * stride);
    }
  }
  float* dq = scratch.dq + scratch.columns * panel.offset;
  std::fill(dq, dq + scratch.columns * panel.width, 0.0f);
  return finite;
}

/// to = (fresh ? 0 : to) + from * scale.
inline HWY_ATTR void add_row(const float* from, float scale, bool fresh, std::int64_t count,
                             float* to) {
  const Floats d;
  const FloatVec factor = hn::Set(d, scale);
  std::int64_t c = 0;
  for (; c + kVectorLanes <= count; c += kVectorLanes) {
    const FloatVec old = fresh ? hn::Zero(d) : hn::LoadU(d, to + c);
    hn::StoreU(hn::Add(old, hn::Mul(hn::Load(d, from + c), factor)), d, to + c);
  }
  for (; c < count; ++c) to[c] = (fresh ? 0.0f : to[c]) + from[c] * scale;
}

/// Adds a task's dK and dV of one block to the unit's.
inline HWY_ATTR void add_gradients(const Problem& problem, const RowGroup& group,
                                   const KeyBlock& block, const GradientSums& sums,
                                   const BackwardScratch& scratch) {
  const auto scale = static_cast<float>(problem.scale);
  for_each_sum(group, block, sums,
               [&](std::int64_t key, float* dk, float* dv, bool fresh) HWY_ATTR {
                 add_row(scratch.dk + key * scratch.stride, scale, fresh, problem.head_dim, dk);
                 add_row(scratch.dv + key * scratch.stride, 1.0f, fresh, problem.head_dim, dv);
               });
}

inline HWY_ATTR void backward_group(const Problem& problem, const BackwardTask& task,
                                    std::byte* memory) {
  const RowGroup& group = *task.group;
  const BackwardScratch scratch(memory, problem.head_dim, group.width);
  bool finite_rows = true;
  const std::int64_t parts = panel_count(group, kPanelLanes);
  Prefetcher first(problem, group, first_block(group.keys, kBlockKeys), parts);
  for_each_panel(problem, group, next_width, [&](const Panel& panel) HWY_ATTR {
    first.step();
    finite_rows &= start_backward(problem, group, panel, scratch);
  });
  const std::int64_t end = group.keys.end;
  for (KeyBlock block = first_block(group.keys, kBlockKeys); block.begin < end;
       block.begin += block.keys) {
    const BlockRange all = block_range(group.keys, group.keys, block, kTileKeys);
    const bool finite_k =
        load_block(problem.k, group, block, all, problem.head_dim, scratch.stride, scratch.k);
    load_block(problem.v, group, block, all, problem.head_dim, scratch.stride, scratch.v);
    if (!finite_k) {
      clean_block(scratch.k, scratch.stride, all, scratch.columns, scratch.k_clean);
    }
    std::fill(scratch.dk + all.begin * scratch.stride, scratch.dk + all.end * scratch.stride, 0.0f);
    std::fill(scratch.dv + all.begin * scratch.stride, scratch.dv + all.end * scratch.stride, 0.0f);
    Prefetcher ahead(problem, group, {block.end(), block.keys},
                     parts * (all.end - all.begin) / kTileKeys, &task.sums, block);
    for_each_panel(problem, group, next_width, [&](const Panel& panel) HWY_ATTR {
      const BlockRange range = block_range(panel.first, panel.last, block, kTileKeys);
      if (range.empty()) return;
      switch (panel.width / kVectorLanes) {
        case 1:
          return backward_block<1>(problem, group, panel, block, range, finite_k, finite_rows,
                                   ahead, scratch);
        case 2:
          return backward_block<2>(problem, group, panel, block, range, finite_k, finite_rows,
                                   ahead, scratch);
        default:
          return backward_block<3>(problem, group, panel, block, range, finite_k, finite_rows,
                                   ahead, scratch);
      }
    });
    ahead.finish();
    task.turns->wait(task.index, block);
    add_gradients(problem, group, block, task.sums, scratch);
    task.turns->done(task.index, block.end());
  }
  const auto scale = static_cast<float>(problem.scale);
  for_each_panel(problem, group, next_width, [&](const Panel& panel) HWY_ATTR {
    transpose(scratch.dq + scratch.columns * panel.offset, panel.width, problem.head_dim,
              panel.width, scratch.rows, scratch.stride);
    for (int l = 0; l < panel.lanes; ++l) {
      float* row = scratch.rows + l * scratch.stride;
      for (std::int64_t c = 0; c < problem.head_dim; ++c) row[c] = row[c] * scale + 0.0f;
    }
    store_lanes(problem, problem.dq, group, panel, scratch.stride, scratch.rows);
  });
}

inline std::size_t backward_scratch(std::int64_t head_dim, std::int64_t lanes) {
  return BackwardScratch(nullptr, head_dim, lanes).bytes;
}

}  // namespace zigzag::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
