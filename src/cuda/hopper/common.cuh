#pragma once

#include <cuda_runtime.h>
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include "cuda/hopper/params.h"

// What the forward and the backward kernel share.
namespace zigzag::cuda::hopper {

using Barrier = cutlass::arch::ClusterTransactionBarrier;
using cute::_;
using cute::_1;
using cute::_2;
using cute::Int;
using cute::Layout;
using cute::Shape;

/// Threads of a block: a warp group that loads, and two that compute.
constexpr int kBlockThreads = 384;
constexpr int kComputeThreads = 256;

/// Numbers of named barriers; 0 is __syncthreads. kGroupBarrier has one a warp group that computes,
/// kTurnBarrier two.
enum NamedBarrier : std::uint32_t { kComputeBarrier = 1, kGroupBarrier = 2, kTurnBarrier = 4 };

/// Waits until the other warp group has passed this one its turn `count`, and passes one. A group
/// that passes turns without taking one in between may be one turn ahead of the other, so turns go
/// to two barriers in turn.
__device__ __forceinline__ void take_turn(int group, int count = 0) {
  cutlass::arch::NamedBarrier::sync(
      kComputeThreads, kTurnBarrier + static_cast<std::uint32_t>(group + count % 2 * 2));
}
__device__ __forceinline__ void pass_turn(int group, int count = 0) {
  cutlass::arch::NamedBarrier::arrive(
      kComputeThreads, kTurnBarrier + static_cast<std::uint32_t>(1 - group + count % 2 * 2));
}

__device__ __forceinline__ void compute_barrier() {
  cutlass::arch::NamedBarrier::sync(kComputeThreads, kComputeBarrier);
}
__device__ __forceinline__ void group_barrier(int group) {
  cutlass::arch::NamedBarrier::sync(128, kGroupBarrier + static_cast<std::uint32_t>(group));
}

/// A value that is the same in all lanes of a warp, told to the compiler: addresses of tiles and
/// branches that rest on it take no registers of each thread.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

/// 2^x, 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// tanh(x) within a few units in the last place of 1: 1 - 2 / (1 + e^2x).
__device__ __forceinline__ float tanh_fast(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(x * 2.8853900817779268f));
}

__device__ __forceinline__ std::uint32_t pack(float low, float high, cutlass::bfloat16_t) {
  std::uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ std::uint32_t pack(float low, float high, cutlass::half_t) {
  std::uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

/// Rounds a fragment to another's type, in the same order. Words are written whole: element by
/// element the compiler takes them apart and puts them together again.
template <class Fragment, class Result>
__device__ __forceinline__ void round_into(const Fragment& values, Result& result) {
  auto words = cute::recast<std::uint32_t>(result);
#pragma unroll
  for (int i = 0; i < cute::size(words); ++i) {
    words(i) = pack(values(2 * i), values(2 * i + 1), typename Result::value_type{});
  }
}

/// A fragment rounded to T, in the same order.
template <typename T, class Fragment>
__device__ __forceinline__ auto rounded(const Fragment& values) {
  auto result = cute::make_tensor<T>(values.layout());
  round_into(values, result);
  return result;
}

/// c (+)= a x b for the tiles of a warp group, given to the tensor cores and not waited for; or
/// part `part` of kParts of the sum.
template <bool kClear, int kParts = 1, class Mma, class A, class B, class C>
__device__ __forceinline__ void multiply(Mma& mma, A&& a, const B& b, C& c, int part = 0) {
  constexpr bool kFromRegisters =
      !std::is_base_of_v<cute::GMMA::DescriptorIterator, typename Mma::FrgTypeA>;
  if constexpr (kFromRegisters) cute::warpgroup_fence_operand(a);
  cute::warpgroup_fence_operand(c);
  cute::warpgroup_arrive();
  mma.accumulate_ = kClear ? cute::GMMA::ScaleOut::Zero : cute::GMMA::ScaleOut::One;
  CUTE_UNROLL
  for (int i = 0; i < cute::size<2>(a) / kParts; ++i) {
    const int step = part * (cute::size<2>(a) / kParts) + i;
    cute::gemm(mma, a(_, _, step), b(_, _, step), c);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_fence_operand(c);
  if constexpr (kFromRegisters) cute::warpgroup_fence_operand(a);
}

/// Sets rows [first, kRows) of a tile that load_tile has put into shared memory to zero, by
/// kThreads threads. The swizzle stays inside the 128 bytes that a row has in each 64 columns.
template <int kRows, int kWidth, int kThreads, typename T>
__device__ __forceinline__ void clear_rows(T* tile, int first, int thread) {
  const int packs = (kRows - first) * 8;
#pragma unroll 1
  for (int i = thread; i < packs * (kWidth / 64); i += kThreads) {
    const int part = i / packs;
    reinterpret_cast<uint4*>(tile)[part * kRows * 8 + first * 8 + i - part * packs] =
        make_uint4(0, 0, 0, 0);
  }
}

/// Loads a box, 64 columns a copy, `pitch` rows apart; `barrier` is told the bytes. `x` and `y` are
/// the map's second and third coordinate.
template <int kWidth, typename T>
__device__ __forceinline__ void load_tile(const CUtensorMap& map, std::uint64_t* barrier, T* tile,
                                          int pitch, int x, int y) {
  constexpr auto kHint = static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
#pragma unroll
  for (int part = 0; part < kWidth / 64; ++part) {
    cute::SM90_TMA_LOAD_3D::copy(&map, barrier, kHint, tile + part * pitch * 64, part * 64, x, y);
  }
}

/// The position in its document of a row of a span.
__device__ __forceinline__ int position_of(const Span& span, int row) {
  return row < span.q_early ? span.early_position + row : span.late_position + row - span.q_early;
}

/// The block's structure in dynamic shared memory. Its tiles want to start at multiples of 1024
/// bytes, and an address that the compiler knows takes no registers.
template <class Shared>
__device__ __forceinline__ Shared& shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  if (cute::cast_smem_ptr_to_uint(memory) % 1024 != 0) __trap();
  return *reinterpret_cast<Shared*>(memory);
}

}  // namespace zigzag::cuda::hopper
