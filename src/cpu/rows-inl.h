// Per-target: included once for each target by kernels.cpp.
#if defined(ZIGZAG_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZIGZAG_CPU_ROWS_INL_H_
#undef ZIGZAG_CPU_ROWS_INL_H_
#else
#define ZIGZAG_CPU_ROWS_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/kernel.h"
#include "cpu/matmul-inl.h"
#include "half.h"

HWY_BEFORE_NAMESPACE();
namespace zigzag::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Packed rows are this long: whole vectors and whole tiles of columns.
inline std::int64_t padded_columns(std::int64_t head_dim) {
  constexpr std::int64_t unit = std::max<std::int64_t>(kVectorLanes, kTileKeys);
  return (head_dim + unit - 1) / unit * unit;
}

HWY_INLINE FloatVec load_floats(const float* from) { return hn::LoadU(Floats(), from); }
HWY_INLINE FloatVec load_floats(const hwy::float16_t* from) {
#if HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR
  // Highway 1.0.3 emulates the conversion without inf and NaN.
  alignas(64) float values[kVectorLanes];
  for (int i = 0; i < kVectorLanes; ++i) values[i] = from_float16(from[i].bits);
  return hn::Load(Floats(), values);
#else
  const hn::Rebind<hwy::float16_t, Floats> half;
  return hn::PromoteTo(Floats(), hn::LoadU(half, from));
#endif
}
HWY_INLINE FloatVec load_floats(const hwy::bfloat16_t* from) {
  const hn::Rebind<hwy::bfloat16_t, Floats> half;
  return hn::PromoteTo(Floats(), hn::LoadU(half, from));
}

inline float to_float(float x) { return x; }
inline float to_float(hwy::float16_t x) { return from_float16(x.bits); }
inline float to_float(hwy::bfloat16_t x) { return from_bfloat16(x.bits); }
inline void from_float(float x, float& to) { to = x; }
inline void from_float(float x, hwy::float16_t& to) { to.bits = to_float16(x); }
inline void from_float(float x, hwy::bfloat16_t& to) { to.bits = to_bfloat16(x); }

/// to[0, columns) = from[0, count) and zeros. Returns whether every value is finite.
template <typename T>
HWY_INLINE bool load_row(const std::byte* source, std::int64_t count, std::int64_t columns,
                         float* HWY_RESTRICT to) {
  const Floats d;
  const hn::RebindToSigned<Floats> di;
  const auto* from = reinterpret_cast<const T*>(source);
  const auto size_bits = hn::Set(di, 0x7fffffff);
  auto largest = hn::Zero(di);
  std::int64_t c = 0;
  for (; c + kVectorLanes <= count; c += kVectorLanes) {
    const FloatVec x = load_floats(from + c);
    hn::StoreU(x, d, to + c);
    largest = hn::Max(largest, hn::And(hn::BitCast(di, x), size_bits));
  }
  for (; c < columns; ++c) to[c] = 0;
  bool finite = hn::AllTrue(di, hn::Lt(largest, hn::Set(di, 0x7f800000)));
  for (c = count / kVectorLanes * kVectorLanes; c < count; ++c) {
    to[c] = to_float(from[c]);
    finite &= std::isfinite(to[c]);
  }
  return finite;
}

HWY_INLINE bool load_row(DType dtype, const std::byte* source, std::int64_t count,
                         std::int64_t columns, float* to) {
  switch (dtype) {
    case DType::kFloat16:
      return load_row<hwy::float16_t>(source, count, columns, to);
    case DType::kBFloat16:
      return load_row<hwy::bfloat16_t>(source, count, columns, to);
    default:
      return load_row<float>(source, count, columns, to);
  }
}

template <typename T>
HWY_INLINE void store_row(const float* from, std::int64_t count, std::byte* destination) {
  auto* to = reinterpret_cast<T*>(destination);
  for (std::int64_t c = 0; c < count; ++c) from_float(from[c], to[c]);
}

/// Rounds `count` values once to the tensor's type.
HWY_INLINE void store_row(DType dtype, const float* from, std::int64_t count,
                          std::byte* destination) {
  switch (dtype) {
    case DType::kFloat16:
      return store_row<hwy::float16_t>(from, count, destination);
    case DType::kBFloat16:
      return store_row<hwy::bfloat16_t>(from, count, destination);
    default:
      return store_row<float>(from, count, destination);
  }
}

/// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns.
HWY_INLINE void transpose(const float* HWY_RESTRICT from, std::int64_t from_stride,
                          std::int64_t rows, std::int64_t columns, float* HWY_RESTRICT to,
                          std::int64_t to_stride) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

/// Replaces what is not finite by 0.
HWY_INLINE void clean(const float* from, std::int64_t count, float* to) {
  for (std::int64_t c = 0; c < count; ++c) to[c] = std::isfinite(from[c]) ? from[c] : 0.0f;
}

}  // namespace zigzag::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
