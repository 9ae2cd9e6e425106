#include "cpu/bf16_kernels.h"

#if defined(__x86_64__)
#include "cpu/bf16_includes.h"

#define ZIGZAG_BF16_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16"
#include "cpu/bf16_target_begin.h"

namespace zigzag::cpu::amx {
namespace {

#include "cpu/bf16_bits-inl.h"

struct TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A constant: GCC does not see that the instruction reads more than its first byte.
alignas(64) constexpr TileConfig kTileConfig{};

/// Products of bfloat16 by AMX: tiles of 16 rows of 64 bytes. An object marks a stretch of work for
/// which the thread's tiles are configured.
class Engine {
 public:
  Engine() { _tile_loadconfig(&kTileConfig); }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine() { _tile_release(); }

  /// c(i, l) (+)= sum over pairs of a(i, pair) * b(pair, l) for 32 rows i and 32 lanes l, `steps`
  /// of 16 pairs deep, in the layouts of bf16_pack-inl.h. The strides, in bytes, lead from the
  /// first 16 rows of a, lanes of b and lanes of c to the second.
  static void multiply(const void* a, std::int64_t a_stride, const void* b, std::int64_t b_stride,
                       float* c, std::int64_t c_stride, std::int64_t steps, bool accumulate) {
    // GCC's tile instructions do not say that they read and write memory.
    std::atomic_signal_fence(std::memory_order_seq_cst);
    const auto* a_at = static_cast<const std::byte*>(a);
    const auto* b_at = static_cast<const std::byte*>(b);
    auto* c_low = reinterpret_cast<std::byte*>(c);
    std::byte* c_high = c_low + c_stride;
    if (accumulate) {
      _tile_loadd(0, c_low, 64);
      _tile_loadd(1, c_high, 64);
      _tile_loadd(2, c_low + 1024, 64);
      _tile_loadd(3, c_high + 1024, 64);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (std::int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, a_at, 64);
      _tile_loadd(6, b_at, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b_at + b_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a_at + a_stride, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      a_at += 1024;
      b_at += 1024;
    }
    _tile_stored(0, c_low, 64);
    _tile_stored(1, c_high, 64);
    _tile_stored(2, c_low + 1024, 64);
    _tile_stored(3, c_high + 1024, 64);
    std::atomic_signal_fence(std::memory_order_seq_cst);
  }
};

#include "cpu/bf16_pack-inl.h"
//
#include "cpu/bf16_forward-inl.h"
//
#include "cpu/bf16_backward-inl.h"

}  // namespace
}  // namespace zigzag::cpu::amx

#include "cpu/bf16_target_end.h"

namespace zigzag::cpu {

const KernelSet* amx_kernels() {
  static constexpr KernelSet kSet = {amx::kBf16PanelLanes,  16 * amx::kBf16PanelLanes,
                                     &amx::forward_scratch, &amx::backward_scratch,
                                     &amx::forward_group,   &amx::backward_group};
  return &kSet;
}

const ElementwiseSet* amx_elementwise() {
  static constexpr ElementwiseSet kSet = {amx::kExp2Error, amx::kTanhError, &amx::exp2_array,
                                          &amx::tanh_array};
  return &kSet;
}

}  // namespace zigzag::cpu
#else
namespace zigzag::cpu {
const KernelSet* amx_kernels() { return nullptr; }
const ElementwiseSet* amx_elementwise() { return nullptr; }
}  // namespace zigzag::cpu
#endif
