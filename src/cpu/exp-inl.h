// Per-target: included once for each target by kernels.cpp.
#if defined(ZIGZAG_CPU_EXP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ZIGZAG_CPU_EXP_INL_H_
#undef ZIGZAG_CPU_EXP_INL_H_
#else
#define ZIGZAG_CPU_EXP_INL_H_
#endif

#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace zigzag::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

inline constexpr double kExp2Error = 1.5e-7;
inline constexpr double kTanhError = 4e-7;

/// 2^x for x <= 127 with a relative error below kExp2Error; 0 below -125.5,
/// so no result is subnormal; NaN gives NaN, -inf gives 0.
///
/// 2^x = 2^n 2^f with n the whole number nearest to x. The polynomial is the minimax of 2^f on
/// [-0.5, 0.5], relative error 1.9e-9 before rounding.
template <class D, class V>
HWY_INLINE V exp2(D d, V x) {
  const hn::RebindToSigned<D> di;
  // Adding 1.5 * 2^23 + 127 rounds to a whole number and leaves n + 127 in the low bits.
  const V magic = hn::Set(d, 12582912.0f + 127.0f);
  const V shifted = hn::Add(x, magic);
  const V f = hn::Sub(x, hn::Sub(shifted, magic));
  V p = hn::Set(d, 0.00015345811f);
  p = hn::MulAdd(p, f, hn::Set(d, 0.0013399931f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.009618489f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.055503286f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.24022646f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.6931472f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const V power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(di, shifted)));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -125.5f)), hn::Mul(p, power));
}

#if HWY_TARGET == HWY_AVX3
/// The same with AVX-512's instructions for 2^n 2^f, n the whole number below x: two fewer.
HWY_INLINE hn::Vec512<float> exp2(hn::Full512<float>, hn::Vec512<float> x) {
  constexpr int kMinusFloor = 1;
  const __m512 f = _mm512_reduce_ps(x.raw, kMinusFloor);
  __m512 p = _mm512_set1_ps(0.00021702255f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0012439688f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.009678841f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05548334f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24022983f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693147f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  // Subnormal results would take a hundred times as long. Not "less than", so that NaN is kept.
  const __mmask16 keep = _mm512_cmp_ps_mask(x.raw, _mm512_set1_ps(-125.5f), _CMP_NLT_UQ);
  return hn::Vec512<float>{_mm512_maskz_scalef_ps(keep, p, x.raw)};
}
#endif

/// The hyperbolic tangent with a relative error below kTanhError; NaN gives NaN.
///
/// (1 - e) / (1 + e) with e = exp(-2|x|), which loses digits near 0: there x + x^3 P(x^2), P the
/// minimax on |x| <= 0.625.
template <class D, class V>
HWY_INLINE V tanh(D d, V x) {
  const V one = hn::Set(d, 1.0f);
  const V size = hn::Abs(x);
  const V e = exp2(d, hn::Mul(size, hn::Set(d, -2.885390082f)));
  const V large = hn::Div(hn::Sub(one, e), hn::Add(one, e));
  const V u = hn::Mul(x, x);
  V p = hn::Set(d, -0.0057170433f);
  p = hn::MulAdd(p, u, hn::Set(d, 0.020650586f));
  p = hn::MulAdd(p, u, hn::Set(d, -0.053743497f));
  p = hn::MulAdd(p, u, hn::Set(d, 0.13331491f));
  p = hn::MulAdd(p, u, hn::Set(d, -0.33333284f));
  const V small = hn::MulAdd(hn::Mul(size, u), p, size);
  const V result = hn::IfThenElse(hn::Lt(size, hn::Set(d, 0.625f)), small, large);
  return hn::CopySignToAbs(result, x);
}

}  // namespace zigzag::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
