// Per-target: included once for each target by kernels.cpp.
#if defined(ZIGZAG_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZIGZAG_CPU_ROWS_INL_H_
#undef ZIGZAG_CPU_ROWS_INL_H_
#else
#define ZIGZAG_CPU_ROWS_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <hwy/highway.h>

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

#if HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR
template <typename T>
HWY_INLINE std::int64_t store_vectors(const float*, std::int64_t, T*) {
  return 0;
}
#else
// Each returns how many values it wrote: whole vectors.
HWY_INLINE std::int64_t store_vectors(const float* from, std::int64_t count, float* to) {
  const Floats d;
  std::int64_t c = 0;
  for (; c + kVectorLanes <= count; c += kVectorLanes)
    hn::StoreU(hn::LoadU(d, from + c), d, to + c);
  return c;
}
HWY_INLINE std::int64_t store_vectors(const float* from, std::int64_t count, hwy::float16_t* to) {
  const hn::Rebind<hwy::float16_t, Floats> half;
  std::int64_t c = 0;
  for (; c + kVectorLanes <= count; c += kVectorLanes) {
    hn::StoreU(hn::DemoteTo(half, hn::LoadU(Floats(), from + c)), half, to + c);
  }
  return c;
}
// As to_bfloat16 in half.h; Highway 1.0.3's own conversion does not round.
HWY_INLINE std::int64_t store_vectors(const float* from, std::int64_t count, hwy::bfloat16_t* to) {
  const Floats d;
  const hn::RebindToUnsigned<Floats> du;
  const hn::Rebind<std::uint16_t, Floats> half;
  std::int64_t c = 0;
  for (; c + kVectorLanes <= count; c += kVectorLanes) {
    const FloatVec x = hn::LoadU(d, from + c);
    const auto bits = hn::BitCast(du, x);
    const auto top = hn::ShiftRight<16>(bits);
    const auto odd = hn::And(top, hn::Set(du, 1));
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff))));
    const auto nan = hn::Or(top, hn::Set(du, 0x40));
    const auto result = hn::IfThenElse(hn::RebindMask(du, hn::Ne(x, x)), nan, rounded);
    // All are below 2^16, so that the signed conversion, which saturates, must not see them whole.
    const hn::RebindToSigned<Floats> di;
    const hn::Rebind<std::int16_t, Floats> signed_half;
    const auto extended = hn::ShiftRight<16>(hn::ShiftLeft<16>(hn::BitCast(di, result)));
    hn::StoreU(hn::BitCast(half, hn::DemoteTo(signed_half, extended)), half,
               reinterpret_cast<std::uint16_t*>(to + c));
  }
  return c;
}
#endif

template <typename T>
HWY_INLINE void store_row(const float* from, std::int64_t count, std::byte* destination) {
  auto* to = reinterpret_cast<T*>(destination);
  for (std::int64_t c = store_vectors(from, count, to); c < count; ++c) from_float(from[c], to[c]);
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

/// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns, in blocks of 4 x 4.
HWY_INLINE void transpose(const float* HWY_RESTRICT from, std::int64_t from_stride,
                          std::int64_t rows, std::int64_t columns, float* HWY_RESTRICT to,
                          std::int64_t to_stride) {
  std::int64_t blocked = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::FixedTag<float, 4> d4;
  const hn::FixedTag<double, 2> d2;
  const auto low = [&](auto a, auto b) HWY_ATTR {
    return hn::BitCast(d4, hn::InterleaveLower(d2, hn::BitCast(d2, a), hn::BitCast(d2, b)));
  };
  const auto high = [&](auto a, auto b) HWY_ATTR {
    return hn::BitCast(d4, hn::InterleaveUpper(d2, hn::BitCast(d2, a), hn::BitCast(d2, b)));
  };
  blocked = rows / 4 * 4;
  for (std::int64_t c = 0; c + 4 <= columns; c += 4) {
    for (std::int64_t r = 0; r < blocked; r += 4) {
      const float* at = from + r * from_stride + c;
      const auto a = hn::LoadU(d4, at);
      const auto b = hn::LoadU(d4, at + from_stride);
      const auto e = hn::LoadU(d4, at + 2 * from_stride);
      const auto f = hn::LoadU(d4, at + 3 * from_stride);
      const auto ab_low = hn::InterleaveLower(d4, a, b);
      const auto ab_high = hn::InterleaveUpper(d4, a, b);
      const auto ef_low = hn::InterleaveLower(d4, e, f);
      const auto ef_high = hn::InterleaveUpper(d4, e, f);
      float* out = to + c * to_stride + r;
      hn::StoreU(low(ab_low, ef_low), d4, out);
      hn::StoreU(high(ab_low, ef_low), d4, out + to_stride);
      hn::StoreU(low(ab_high, ef_high), d4, out + 2 * to_stride);
      hn::StoreU(high(ab_high, ef_high), d4, out + 3 * to_stride);
    }
  }
  for (std::int64_t c = columns / 4 * 4; c < columns; ++c) {
    for (std::int64_t r = 0; r < blocked; ++r) to[c * to_stride + r] = from[r * from_stride + c];
  }
#endif
  for (std::int64_t r = blocked; r < rows; ++r) {
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
