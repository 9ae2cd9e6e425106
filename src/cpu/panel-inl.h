// Per-target: included once for each target by kernels.cpp.
#if defined(ZIGZAG_CPU_PANEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZIGZAG_CPU_PANEL_INL_H_
#undef ZIGZAG_CPU_PANEL_INL_H_
#else
#define ZIGZAG_CPU_PANEL_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <hwy/highway.h>

#include "cpu/exp-inl.h"
#include "cpu/kernel.h"
#include "cpu/matmul-inl.h"
#include "cpu/panel.h"
#include "cpu/prefetch.h"
#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace zigzag::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

inline constexpr int kPanelLanes = kPanelVectors * kVectorLanes;
using PanelMask = LaneMask<kPanelLanes>;

/// The width of the next panel when `lanes` are left: 3 vectors, but 2 + 2 rather than 3 + 1.
inline int next_width(std::int64_t lanes) {
  return next_vectors((lanes + kVectorLanes - 1) / kVectorLanes) * kVectorLanes;
}

HWY_INLINE hn::Mask<Floats> sees_vector(const PanelMask& mask, int vector, int key) {
  const Floats d;
  const FloatVec position = hn::Set(d, static_cast<float>(key));
  return hn::And(hn::Ge(position, hn::Load(d, mask.first + vector * kVectorLanes)),
                 hn::Lt(position, hn::Load(d, mask.end + vector * kVectorLanes)));
}

/// Keys [begin, end) of a block of K or V as float32 rows at `stride`; rows that the item lacks
/// are 0. Returns whether all are finite.
inline HWY_ATTR bool load_block(const TensorRows& x, const RowGroup& group, const KeyBlock& block,
                                const BlockRange& range, std::int64_t head_dim, std::int64_t stride,
                                float* to) {
  const std::int64_t columns = padded_columns(head_dim);
  bool finite = true;
  KeyCursor keys(x, group, block);
  for (int key = range.begin; key < range.end; ++key) {
    float* at = to + key * stride;
    const std::byte* row = keys.row(key);
    if (row == nullptr) {
      std::fill(at, at + columns, 0.0f);
    } else {
      finite &= load_row(x.dtype, row, head_dim, columns, at);
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

/// The rows of a panel's lanes as float32 at `stride`, while those of `ahead` are called; rows of
/// empty lanes are 0. Returns whether all are finite.
inline HWY_ATTR bool load_lanes(const Problem& problem, const TensorRows& x, const RowGroup& group,
                                const Panel& panel, std::int64_t stride, LanesAhead ahead,
                                float* to) {
  const std::int64_t columns = padded_columns(problem.head_dim);
  bool finite = true;
  LaneCursor lanes(problem, x, group, panel.lane_begin);
  for (int l = 0; l < panel.width; ++l) {
    float* at = to + l * stride;
    ahead.step();
    if (l >= panel.lanes) {
      std::fill(at, at + columns, 0.0f);
    } else {
      finite &= load_row(x.dtype, lanes.at(l), problem.head_dim, columns, at);
    }
  }
  return finite;
}

/// Writes a panel's rows to the tensor.
inline HWY_ATTR void store_lanes(const Problem& problem, const TensorRows& x, const RowGroup& group,
                                 const Panel& panel, std::int64_t stride, const float* from) {
  LaneCursor lanes(problem, x, group, panel.lane_begin);
  for (int l = 0; l < panel.lanes; ++l) {
    store_row(x.dtype, from + l * stride, problem.head_dim, lanes.at(l));
  }
}

/// Changes the sign of packed q when the scale is negative, so that scores only grow with products,
/// and makes it 0 when that is 0.
inline HWY_ATTR void sign_lanes(const Problem& problem, std::int64_t count, float* q) {
  if (problem.score_scale > 0) return;
  for (std::int64_t c = 0; c < count; ++c) q[c] *= problem.score_scale == 0 ? 0.0f : -1.0f;
}

/// The tangent of a softcap at products q.k, and the score in units of log2.
HWY_INLINE FloatVec cap_tangent(const Problem& problem, FloatVec product) {
  const Floats d;
  return tanh(d, hn::Mul(product, hn::Set(d, std::fabs(problem.score_scale))));
}
HWY_INLINE FloatVec capped_score(const Problem& problem, FloatVec product) {
  const Floats d;
  return hn::Mul(cap_tangent(problem, product), hn::Set(d, problem.cap));
}

}  // namespace zigzag::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
