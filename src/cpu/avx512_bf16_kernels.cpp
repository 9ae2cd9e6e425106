#include "cpu/bf16_kernels.h"

#if defined(__x86_64__)
#include "cpu/bf16_includes.h"

#define ZIGZAG_BF16_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"
#include "cpu/bf16_target_begin.h"

namespace zigzag::cpu::avx512_bf16 {
namespace {

#include "cpu/bf16_bits-inl.h"

/// Products of bfloat16 by AVX512_BF16's dot product of pairs.
class Engine {
 public:
  /// As amx::Engine::multiply, in tiles of 8 rows by 32 lanes.
  static void multiply(const void* a, std::int64_t a_stride, const void* b, std::int64_t b_stride,
                       float* c, std::int64_t c_stride, std::int64_t steps, bool accumulate) {
    for (int row = 0; row < 32; row += kRows) {
      tile(static_cast<const std::byte*>(a) + row / 16 * a_stride + row % 16 * 64,
           static_cast<const std::byte*>(b), b_stride, reinterpret_cast<std::byte*>(c) + row * 64,
           c_stride, steps, accumulate);
    }
  }

 private:
  static constexpr int kRows = 8;

  static void tile(const std::byte* a, const std::byte* b, std::int64_t b_stride, std::byte* c,
                   std::int64_t c_stride, std::int64_t steps, bool accumulate) {
    __m512 sum[kRows][2];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        sum[i][v] = accumulate ? _mm512_loadu_ps(c + v * c_stride + i * 64) : _mm512_setzero_ps();
      }
    }
    for (std::int64_t step = 0; step < steps; ++step) {
      for (int pair = 0; pair < 16; ++pair) {
        const __m512bh low = pairs_of(_mm512_loadu_si512(b + pair * 64));
        const __m512bh high = pairs_of(_mm512_loadu_si512(b + b_stride + pair * 64));
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          std::int32_t word;
          std::memcpy(&word, a + i * 64 + pair * 4, sizeof(word));
          const __m512bh factor = pairs_of(_mm512_set1_epi32(word));
          sum[i][0] = _mm512_dpbf16_ps(sum[i][0], factor, low);
          sum[i][1] = _mm512_dpbf16_ps(sum[i][1], factor, high);
        }
      }
      a += 1024;
      b += 1024;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c + v * c_stride + i * 64, sum[i][v]);
    }
  }
};

#include "cpu/bf16_pack-inl.h"
//
#include "cpu/bf16_forward-inl.h"
//
#include "cpu/bf16_backward-inl.h"

}  // namespace
}  // namespace zigzag::cpu::avx512_bf16

#include "cpu/bf16_target_end.h"

namespace zigzag::cpu {

const KernelSet* avx512_bf16_kernels() {
  static constexpr KernelSet kSet = {
      avx512_bf16::kBf16PanelLanes,  8 * avx512_bf16::kBf16PanelLanes,
      &avx512_bf16::forward_scratch, &avx512_bf16::backward_scratch,
      &avx512_bf16::forward_group,   &avx512_bf16::backward_group};
  return &kSet;
}

const ElementwiseSet* avx512_bf16_elementwise() {
  static constexpr ElementwiseSet kSet = {avx512_bf16::kExp2Error, avx512_bf16::kTanhError,
                                          &avx512_bf16::exp2_array, &avx512_bf16::tanh_array};
  return &kSet;
}

}  // namespace zigzag::cpu
#else
namespace zigzag::cpu {
const KernelSet* avx512_bf16_kernels() { return nullptr; }
const ElementwiseSet* avx512_bf16_elementwise() { return nullptr; }
}  // namespace zigzag::cpu
#endif
