// Per-target: included once for each target by kernels.cpp.
#if defined(ZIGZAG_CPU_MATMUL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZIGZAG_CPU_MATMUL_INL_H_
#undef ZIGZAG_CPU_MATMUL_INL_H_
#else
#define ZIGZAG_CPU_MATMUL_INL_H_
#endif

#include <cstdint>

#include <hwy/highway.h>

#include "cpu/kernel.h"

HWY_BEFORE_NAMESPACE();
namespace zigzag::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET == HWY_EMU128
using Floats = hn::CappedTag<float, 4>;
#else
using Floats = hn::ScalableTag<float>;
#endif
using FloatVec = hn::Vec<Floats>;
inline constexpr int kVectorLanes = static_cast<int>(hn::MaxLanes(Floats()));

/// A panel is up to this many vectors of lanes wide: with kTileRows rows of accumulators it fills
/// the registers (24 of 32, or 12 of 16).
inline constexpr int kPanelVectors = 3;
#if HWY_TARGET == HWY_AVX2
inline constexpr int kTileRows = 4;
#else
inline constexpr int kTileRows = 8;
#endif
static_assert(kTileKeys % kTileRows == 0);

/// Vectors of the next panel when `vectors` are left: 3, but 2 + 2 rather than 3 + 1.
inline int next_vectors(std::int64_t vectors) {
  return vectors == 4 ? 2 : static_cast<int>(vectors < kPanelVectors ? vectors : kPanelVectors);
}

/// Keys of a block: its weights stay in a first-level cache.
inline constexpr int kBlockKeys = 128;

/// Accumulators of a tile of kTileRows rows and kVectors vectors.
template <int kVectors>
struct Tile {
  FloatVec value[kTileRows][kVectors];
};

template <int kVectors>
HWY_INLINE void set_zero(Tile<kVectors>& tile) {
  const Floats d;
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) tile.value[i][v] = hn::Zero(d);
  }
}

/// tile(i, v) += sum over c in [0, count) of a(i, c) * b(c, v), c ascending, one chain an element.
/// a(i, c) is a[i * stride + c], or with kByColumn a[c * stride + i]; b's row c starts at
/// b + c * b_stride.
template <bool kByColumn, int kVectors>
HWY_INLINE void multiply(const float* HWY_RESTRICT a, std::int64_t stride,
                         const float* HWY_RESTRICT b, std::int64_t b_stride, std::int64_t count,
                         Tile<kVectors>& tile) {
  const Floats d;
  Tile<kVectors> sum = tile;
  for (std::int64_t c = 0; c < count; ++c) {
    FloatVec row[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) row[v] = hn::Load(d, b + v * kVectorLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const FloatVec factor = hn::Set(d, kByColumn ? a[i] : a[i * stride]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        sum.value[i][v] = hn::MulAdd(factor, row[v], sum.value[i][v]);
      }
    }
    a += kByColumn ? stride : 1;
    b += b_stride;
  }
  tile = sum;
}

/// Writes a tile to rows at `stride`.
template <int kVectors>
HWY_INLINE void store(const Tile<kVectors>& tile, float* HWY_RESTRICT to, std::int64_t stride) {
  const Floats d;
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      hn::Store(tile.value[i][v], d, to + i * stride + v * kVectorLanes);
    }
  }
}

/// Reads a tile from rows at `stride`.
template <int kVectors>
HWY_INLINE void load(const float* HWY_RESTRICT from, std::int64_t stride, Tile<kVectors>& tile) {
  const Floats d;
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      tile.value[i][v] = hn::Load(d, from + i * stride + v * kVectorLanes);
    }
  }
}

/// rows(i, v) = rows(i, v) * factor(v) + tile(i, v), or without kScale rows + tile.
template <bool kScale, int kVectors>
HWY_INLINE void accumulate(const Tile<kVectors>& tile, const FloatVec* factor,
                           float* HWY_RESTRICT rows, std::int64_t stride) {
  const Floats d;
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      float* at = rows + i * stride + v * kVectorLanes;
      const FloatVec before = hn::Load(d, at);
      hn::Store(kScale ? hn::MulAdd(before, factor[v], tile.value[i][v])
                       : hn::Add(before, tile.value[i][v]),
                d, at);
    }
  }
}

}  // namespace zigzag::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
