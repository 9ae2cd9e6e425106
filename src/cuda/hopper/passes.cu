#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/check.h"
#include "cuda/convert.cuh"
#include "cuda/hopper/params.h"

namespace zigzag::cuda::hopper {
namespace {

constexpr int kThreads = 256;
constexpr int kPack = 8;  // elements of an access of 16 bytes

/// The row of the shard and the head of a row of a tile, whose heads are those of number `plane`.
struct RowPlace {
  std::int64_t local;
  int head;
  bool live;
};

__device__ __forceinline__ RowPlace place_of(const PassParams& params, const Span& span,
                                             std::int64_t tile, int plane, int row) {
  const int log2 = params.tile_heads_log2;
  const int token = static_cast<int>(tile - span.tile_begin) * (kQueryTile >> log2) + (row >> log2);
  return {span.q_begin + token, (plane << log2) + (row & ((1 << log2) - 1)), token < span.q_count};
}

/// One block a tile and the heads that share it: delta = sum over head_dim of out x dout, lse x
/// log2(e), and the tile's sums of dq cleared. A row without a visible key (lse -inf) gets +inf, so
/// that its weights are exp2(-inf) = 0; so do the rows that pad the tile.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    before_kernel(const __grid_constant__ PassParams params) {
  constexpr int kLanes = kWidth / kPack;  // threads of a row
  constexpr int kRows = kThreads / kLanes;
  const auto tile = static_cast<std::int64_t>(blockIdx.x);
  const int plane = static_cast<int>(blockIdx.y);
  const Span span = params.spans[params.tile_span[tile]];
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const std::int64_t padded = (plane * params.tiles + tile) * kQueryTile;
#pragma unroll
  for (int pass = 0; pass < kQueryTile / kRows; ++pass) {
    const int row = pass * kRows + static_cast<int>(threadIdx.x) / kLanes;
    const RowPlace place = place_of(params, span, tile, plane, row);
    float sum = 0;
    if (place.live && lane * kPack < params.head_dim) {
      using Values = Pack<T, kPack>;
      const auto load = [&](const Rows& x) {
        return *reinterpret_cast<const Values*>(static_cast<const T*>(x.data) +
                                                place.local * x.row + place.head * x.head +
                                                lane * kPack);
      };
      const Values out = load(params.out);
      const Values dout = load(params.dout);
#pragma unroll
      for (int i = 0; i < kPack; ++i) sum += to_float(out.values[i]) * to_float(dout.values[i]);
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) {
      float lse = INFINITY;
      if (place.live) {
        lse = params.lse[place.local * params.lse_row + place.head] * 1.4426950408889634f;
        if (lse == -INFINITY) lse = INFINITY;
      }
      params.lse_log2[padded + row] = lse;
      params.delta[padded + row] = sum;
    }
  }
  auto* sums = reinterpret_cast<float4*>(params.dq_sums + padded * kWidth);
#pragma unroll
  for (int i = 0; i < kQueryTile * kWidth / 4 / kThreads; ++i) {
    sums[i * kThreads + static_cast<int>(threadIdx.x)] = make_float4(0, 0, 0, 0);
  }
}

/// One block a tile and the heads that share it. A tile's sums lie as a warp group of the backward
/// kernel holds them (backward.cuh), 64 columns after 64 columns: for every 8 of these, four values
/// of each of 128 threads, columns c, c + 1 of row r and of row r + 8. A thread here takes 8
/// columns of two rows.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    after_kernel(const __grid_constant__ PassParams params) {
  constexpr int kColumnPacks = kWidth / kPack;
  constexpr int kRowPairs = kThreads / kColumnPacks;
  const auto tile = static_cast<std::int64_t>(blockIdx.x);
  const int plane = static_cast<int>(blockIdx.y);
  const Span span = params.spans[params.tile_span[tile]];
  const int column = static_cast<int>(threadIdx.x) % kColumnPacks;
  const auto* sums = reinterpret_cast<const float4*>(
      params.dq_sums + (plane * params.tiles + tile) * kQueryTile * kWidth);
#pragma unroll
  for (int pass = 0; pass < kQueryTile / 2 / kRowPairs; ++pass) {
    const int pair = pass * kRowPairs + static_cast<int>(threadIdx.x) / kColumnPacks;
    // A warp holds 16 rows: r and r + 8 in its lanes 4 x (r % 8) and on.
    const int row = pair / 8 * 16 + pair % 8;
    const float4* from = sums + column / 8 * 1024 + column % 8 * 128 + pair / 8 * 32 + pair % 8 * 4;
    const RowPlace places[] = {place_of(params, span, tile, plane, row),
                               place_of(params, span, tile, plane, row + 8)};
    if (!places[0].live) continue;
    Pack<T, kPack> upper;
    Pack<T, kPack> lower;
#pragma unroll
    for (int quad = 0; quad < 4; ++quad) {
      const float4 values = from[quad];
      upper.values[2 * quad] = from_float<T>(values.x * params.scale);
      upper.values[2 * quad + 1] = from_float<T>(values.y * params.scale);
      lower.values[2 * quad] = from_float<T>(values.z * params.scale);
      lower.values[2 * quad + 1] = from_float<T>(values.w * params.scale);
    }
    if (column * kPack >= params.head_dim) continue;
    const auto store = [&](const RowPlace& place, const Pack<T, kPack>& values) {
      if (!place.live) return;
      T* target = static_cast<T*>(params.dq.data) + place.local * params.dq.row +
                  place.head * params.dq.head + column * kPack;
      *reinterpret_cast<Pack<T, kPack>*>(target) = values;
    };
    store(places[0], upper);
    store(places[1], lower);
  }
}

template <typename Kernel>
void launch(Kernel kernel, const PassParams& params, const char* name, void* stream) {
  const dim3 grid(static_cast<unsigned>(params.tiles),
                  static_cast<unsigned>(params.heads >> params.tile_heads_log2));
  kernel<<<grid, kThreads, 0, as_stream(stream)>>>(params);
  check_launch(name);
}

}  // namespace

template <typename T>
void run_before(const PassParams& params, int width, void* stream) {
  launch(width == 64 ? before_kernel<T, 64> : before_kernel<T, 128>, params, "before_kernel",
         stream);
}

template <typename T>
void run_after(const PassParams& params, int width, void* stream) {
  launch(width == 64 ? after_kernel<T, 64> : after_kernel<T, 128>, params, "after_kernel", stream);
}

template void run_before<__half>(const PassParams&, int, void*);
template void run_before<__nv_bfloat16>(const PassParams&, int, void*);
template void run_after<__half>(const PassParams&, int, void*);
template void run_after<__nv_bfloat16>(const PassParams&, int, void*);

}  // namespace zigzag::cuda::hopper
