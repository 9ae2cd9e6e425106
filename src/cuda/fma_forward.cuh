#pragma once

#include "cuda/fma_tiles.cuh"

namespace zigzag::cuda {

/// Floats of shared memory that fma_forward_kernel needs.
template <int kDim>
inline constexpr int kForwardFloats = 2 * kFmaTile* kPadded<kDim> + kFmaTile* kPadded<kFmaTile>;

/// One block: one tile of queries of one work item and one head. The softmax runs online over
/// tiles of keys; keys and values take turns in one buffer.
template <typename T, int kDim>
__global__ void __launch_bounds__(kFmaThreads, kDim <= 128 ? 2 : 1)
    fma_forward_kernel(const __grid_constant__ FmaParams params) {
  extern __shared__ __align__(16) float shared[];
  float* q_tile = shared;
  float* kv_tile = q_tile + kFmaTile * kPadded<kDim>;
  float* p_tile = kv_tile + kFmaTile * kPadded<kDim>;  // [key][query]

  const std::int64_t item_index = find_tile(params.q_tiles, params.item_count, blockIdx.x);
  const FmaItem item = params.items[item_index];
  const std::int64_t tiles = params.q_tiles[item_index + 1] - params.q_tiles[item_index];
  // The last tile sees the most keys: it goes first.
  const std::int64_t tile = tiles - 1 - (blockIdx.x - params.q_tiles[item_index]);
  const std::int64_t q_first = tile * kFmaTile;
  const std::int64_t q_rows = min(static_cast<std::int64_t>(kFmaTile), item.q_count - q_first);
  const int head = static_cast<int>(blockIdx.y);
  const int kv_head = head / (params.heads / params.kv_heads);
  const int thread_row = static_cast<int>(threadIdx.x) / 16;
  const int thread_column = static_cast<int>(threadIdx.x) % 16;
  const int row0 = thread_row * 4;

  const T* q = static_cast<const T*>(params.q) + (item.q_begin + q_first) * params.q_strides.row +
               head * params.q_strides.head;
  load_tile<T, kFmaTile, kDim>(q_tile, q, params.q_strides.row, q_rows, params.head_dim,
                               params.aligned);

  // Keys that any query of the tile sees.
  const std::int64_t i_first = item.q_position + q_first;
  const std::int64_t i_last = i_first + q_rows - 1;
  std::int64_t k_first = 0;
  std::int64_t k_end = item.k_count;
  if (params.left >= 0) k_first = max(k_first, i_first - params.left - item.k_position);
  if (params.right >= 0) k_end = min(k_end, i_last + params.right + 1 - item.k_position);
  // Tiles are anchored at the item's first key, whatever the window.
  k_first = k_first / kFmaTile * kFmaTile;

  float sums[4][kDim / 16] = {};
  float row_max[4];
  float row_sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    row_max[i] = -INFINITY;
    row_sum[i] = 0.f;
  }
  for (std::int64_t k0 = k_first; k0 < k_end; k0 += kFmaTile) {
    const std::int64_t k_rows = min(static_cast<std::int64_t>(kFmaTile), item.k_count - k0);
    __syncthreads();
    load_tile<T, kFmaTile, kDim>(kv_tile,
                                 static_cast<const T*>(params.k) +
                                     (item.k_begin + k0) * params.k_strides.row +
                                     kv_head * params.k_strides.head,
                                 params.k_strides.row, k_rows, params.head_dim, params.aligned);
    __syncthreads();
    float scores[4][4] = {};
    multiply_rows<4, 4, kDim>(scores, q_tile, row0, kv_tile, thread_column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float tile_max = -INFINITY;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const std::int64_t key = k0 + thread_column + 16 * j;
        const bool seen = key < item.k_count && row0 + i < q_rows &&
                          visible(params, i_first + row0 + i, item.k_position + key);
        scores[i][j] = seen ? score(params, scores[i][j]) : -INFINITY;
        tile_max = fmaxf(tile_max, scores[i][j]);
      }
#pragma unroll
      for (int lane = 8; lane > 0; lane /= 2) {
        tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, lane));
      }
      const float new_max = fmaxf(row_max[i], tile_max);
      // An empty row keeps max -inf; 0 stands in for it, so that no inf - inf appears.
      const float base = new_max == -INFINITY ? 0.f : new_max;
      const float rescale = expf(row_max[i] - base);
      float tile_sum = 0.f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[i][j] = expf(scores[i][j] - base);
        tile_sum += scores[i][j];
      }
#pragma unroll
      for (int lane = 8; lane > 0; lane /= 2) {
        tile_sum += __shfl_xor_sync(0xffffffffu, tile_sum, lane);
      }
      row_sum[i] = row_sum[i] * rescale + tile_sum;
      row_max[i] = new_max;
#pragma unroll
      for (int e = 0; e < kDim / 16; ++e) sums[i][e] *= rescale;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      *reinterpret_cast<float4*>(p_tile + (thread_column + 16 * j) * kPadded<kFmaTile> + row0) =
          make_float4(scores[0][j], scores[1][j], scores[2][j], scores[3][j]);
    }
    __syncthreads();
    load_tile<T, kFmaTile, kDim>(kv_tile,
                                 static_cast<const T*>(params.v) +
                                     (item.k_begin + k0) * params.v_strides.row +
                                     kv_head * params.v_strides.head,
                                 params.v_strides.row, k_rows, params.head_dim, params.aligned);
    __syncthreads();
    multiply_columns<4, kDim, kFmaTile, kFmaTile>(sums, p_tile, row0, kv_tile, thread_column);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (row0 + i >= q_rows) continue;
    const std::int64_t row = item.q_begin + q_first + row0 + i;
    const float inverse = row_sum[i] > 0.f ? 1.f / row_sum[i] : 0.f;
    T* out =
        static_cast<T*>(params.out) + row * params.out_strides.row + head * params.out_strides.head;
#pragma unroll
    for (int e = 0; e < kDim / 16; ++e) {
      const int column = sum_column<kDim>(thread_column, e);
      if (column < params.head_dim) out[column] = from_float<T>(sums[i][e] * inverse);
    }
    if (thread_column == 0) {
      params.lse[row * params.lse_strides.row + head * params.lse_strides.head] =
          row_sum[i] > 0.f ? row_max[i] + logf(row_sum[i]) : -INFINITY;
    }
  }
}

}  // namespace zigzag::cuda
