// The float32 kernels, and by conversion those of float16 and bfloat16, for every target of
// Highway that we use. The included files are compiled once a target.
#include "cpu/kernel.h"

#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "cpu/backward-inl.h"
#include "cpu/exp-inl.h"
#include "cpu/forward-inl.h"

HWY_BEFORE_NAMESPACE();
namespace zigzag::cpu::HWY_NAMESPACE {

HWY_ATTR void exp2_array(const float* x, float* y, std::int64_t count) {
  const Floats d;
  for (std::int64_t i = 0; i < count; ++i) y[i] = hn::GetLane(exp2(d, hn::Set(d, x[i])));
}

HWY_ATTR void tanh_array(const float* x, float* y, std::int64_t count) {
  const Floats d;
  for (std::int64_t i = 0; i < count; ++i) y[i] = hn::GetLane(tanh(d, hn::Set(d, x[i])));
}

HWY_ATTR void sum_term_rows(const RowSums& sums) {
  constexpr std::int64_t kPart = 256;
  static_assert(kPart % kVectorLanes == 0);
  alignas(64) float sum[kPart];
  const Floats d;
  for (std::int64_t row = 0; row < sums.rows; ++row) {
    std::byte* to = sums.to + row * sums.to_stride;
    for (std::int64_t first = 0; first < sums.columns; first += kPart) {
      const std::int64_t count = std::min(sums.columns - first, kPart);
      const std::int64_t from = row * sums.term_stride + first;
      std::int64_t c = 0;
      for (; c + kVectorLanes <= count; c += kVectorLanes) {
        FloatVec x = hn::Zero(d);
        for (const float* term : sums.terms) x = hn::Add(x, hn::LoadU(d, term + from + c));
        hn::Store(x, d, sum + c);
      }
      for (; c < count; ++c) {
        float x = 0;
        for (const float* term : sums.terms) x += term[from + c];
        sum[c] = x;
      }
      store_row(sums.dtype, sum, count, to + first * item_size(sums.dtype));
    }
  }
}

const KernelSet* kernel_set() {
  // Lanes of a backward task: its panels' rows and gradients stay in a second-level cache.
  static constexpr KernelSet kSet = {kPanelLanes,       8 * kPanelLanes, &forward_scratch,
                                     &backward_scratch, &forward_group,  &backward_group};
  return &kSet;
}

const ElementwiseSet* elementwise_set() {
  static constexpr ElementwiseSet kSet = {kExp2Error, kTanhError, &exp2_array, &tanh_array};
  return &kSet;
}

}  // namespace zigzag::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "cpu/bf16_kernels.h"

namespace zigzag::cpu {
namespace {

HWY_EXPORT(kernel_set);
HWY_EXPORT(elementwise_set);
HWY_EXPORT(sum_term_rows);

// Where a target stands in Highway's tables.
std::size_t table_index(Target target) {
  hwy::ChosenTarget chosen;
  switch (target) {
    case Target::kBaseline:
#if HWY_ARCH_X86
      chosen.Update(0);
#else
      chosen.Update(hwy::SupportedTargets());
#endif
      break;
    case Target::kAvx2:
      chosen.Update(HWY_AVX2);
      break;
    default:
      chosen.Update(HWY_AVX3);
  }
  return chosen.GetIndex();
}

}  // namespace

void sum_rows(Target target, const RowSums& sums) {
  HWY_DISPATCH_TABLE(sum_term_rows)[table_index(target)](sums);
}

const KernelSet& kernels_of(Target target, DType dtype) {
  if (dtype == DType::kBFloat16) {
    const KernelSet* set = target == Target::kAmx          ? amx_kernels()
                           : target == Target::kAvx512Bf16 ? avx512_bf16_kernels()
                                                           : nullptr;
    if (set != nullptr) return *set;
  }
  return *HWY_DISPATCH_TABLE(kernel_set)[table_index(target)]();
}

const ElementwiseSet& elementwise_of(Target target) {
  const ElementwiseSet* set = target == Target::kAmx          ? amx_elementwise()
                              : target == Target::kAvx512Bf16 ? avx512_bf16_elementwise()
                                                              : nullptr;
  if (set != nullptr) return *set;
  return *HWY_DISPATCH_TABLE(elementwise_set)[table_index(target)]();
}

}  // namespace zigzag::cpu
#endif  // HWY_ONCE
