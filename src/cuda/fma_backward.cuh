#pragma once

#include "cuda/fma_tiles.cuh"

namespace zigzag::cuda {

/// Rows of the tile that a backward kernel walks over: fewer for wide heads, to fit shared memory.
template <int kDim>
inline constexpr int kFmaStep = kDim > 128 ? 32 : 64;

/// Floats of shared memory that the kernels need.
template <int kDim>
inline constexpr int kDqFloats = 2 * kFmaTile* kPadded<kDim> + 2 * kFmaStep<kDim>* kPadded<kDim> +
                                 kFmaStep<kDim>* kPadded<kFmaTile>;
template <int kDim>
inline constexpr int kDkvFloats = kDqFloats<kDim> + kFmaStep<kDim>* kPadded<kFmaTile>;

/// delta [row, head] = sum over head_dim of out x dout: one warp each.
template <typename T>
__global__ void __launch_bounds__(kFmaThreads)
    fma_delta_kernel(const __grid_constant__ FmaParams params) {
  const std::int64_t warp =
      static_cast<std::int64_t>(blockIdx.x) * (kFmaThreads / 32) + threadIdx.x / 32;
  if (warp >= params.local_rows * params.heads) return;
  const std::int64_t row = warp / params.heads;
  const auto head = static_cast<int>(warp - row * params.heads);
  const T* out = static_cast<const T*>(params.out) + row * params.out_strides.row +
                 head * params.out_strides.head;
  const T* dout = static_cast<const T*>(params.dout) + row * params.dout_strides.row +
                  head * params.dout_strides.head;
  float sum = 0.f;
  for (int i = static_cast<int>(threadIdx.x % 32); i < params.head_dim; i += 32) {
    sum = fmaf(to_float(out[i]), to_float(dout[i]), sum);
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  if (threadIdx.x % 32 == 0) params.delta[warp] = sum;
}

/// P and dS of a thread's 4 x kC block, from S = q.k and dP = dout.v. Masked entries become 0.
template <int kR, int kC>
__device__ __forceinline__ void softmax_gradient(const FmaParams& params, float (&s)[kR][kC],
                                                 float (&dp)[kR][kC], const float (&lse)[kR],
                                                 const float (&delta)[kR],
                                                 const bool (&seen)[kR][kC]) {
#pragma unroll
  for (int i = 0; i < kR; ++i) {
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      if (seen[i][j]) {
        const float capped = score(params, s[i][j]);
        const float p = expf(capped - lse[i]);
        dp[i][j] = p * (dp[i][j] - delta[i]) * score_slope(params, capped) * params.scale;
        s[i][j] = p;
      } else {
        s[i][j] = 0.f;
        dp[i][j] = 0.f;
      }
    }
  }
}

/// One block: dq of one tile of queries of one work item and one head.
template <typename T, int kDim>
__global__ void __launch_bounds__(kFmaThreads)
    fma_dq_kernel(const __grid_constant__ FmaParams params) {
  constexpr int kStep = kFmaStep<kDim>;
  constexpr int kC = kStep / 16;
  extern __shared__ __align__(16) float shared[];
  float* q_tile = shared;
  float* dout_tile = q_tile + kFmaTile * kPadded<kDim>;
  float* k_tile = dout_tile + kFmaTile * kPadded<kDim>;
  float* v_tile = k_tile + kStep * kPadded<kDim>;
  float* ds_tile = v_tile + kStep * kPadded<kDim>;  // [key][query]

  const std::int64_t item_index = find_tile(params.q_tiles, params.item_count, blockIdx.x);
  const FmaItem item = params.items[item_index];
  const std::int64_t tiles = params.q_tiles[item_index + 1] - params.q_tiles[item_index];
  const std::int64_t tile = tiles - 1 - (blockIdx.x - params.q_tiles[item_index]);
  const std::int64_t q_first = tile * kFmaTile;
  const std::int64_t q_rows = min(static_cast<std::int64_t>(kFmaTile), item.q_count - q_first);
  const std::int64_t row_first = item.q_begin + q_first;
  const int head = static_cast<int>(blockIdx.y);
  const int kv_head = head / (params.heads / params.kv_heads);
  const int thread_column = static_cast<int>(threadIdx.x) % 16;
  const int row0 = static_cast<int>(threadIdx.x) / 16 * 4;

  load_tile<T, kFmaTile, kDim>(q_tile,
                               static_cast<const T*>(params.q) + row_first * params.q_strides.row +
                                   head * params.q_strides.head,
                               params.q_strides.row, q_rows, params.head_dim, params.aligned);
  load_tile<T, kFmaTile, kDim>(dout_tile,
                               static_cast<const T*>(params.dout) +
                                   row_first * params.dout_strides.row +
                                   head * params.dout_strides.head,
                               params.dout_strides.row, q_rows, params.head_dim, params.aligned);
  float lse[4];
  float delta[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::int64_t row = row_first + row0 + i;
    const bool live = row0 + i < q_rows;
    lse[i] = live ? params.lse[row * params.lse_strides.row + head * params.lse_strides.head] : 0.f;
    delta[i] = live ? params.delta[row * params.heads + head] : 0.f;
  }
  const std::int64_t i_first = item.q_position + q_first;
  const std::int64_t i_last = i_first + q_rows - 1;
  std::int64_t k_first = 0;
  std::int64_t k_end = item.k_count;
  if (params.left >= 0) k_first = max(k_first, i_first - params.left - item.k_position);
  if (params.right >= 0) k_end = min(k_end, i_last + params.right + 1 - item.k_position);
  k_first = k_first / kStep * kStep;

  float sums[4][kDim / 16] = {};
  for (std::int64_t k0 = k_first; k0 < k_end; k0 += kStep) {
    const std::int64_t k_rows = min(static_cast<std::int64_t>(kStep), item.k_count - k0);
    __syncthreads();
    load_tile<T, kStep, kDim>(k_tile,
                              static_cast<const T*>(params.k) +
                                  (item.k_begin + k0) * params.k_strides.row +
                                  kv_head * params.k_strides.head,
                              params.k_strides.row, k_rows, params.head_dim, params.aligned);
    load_tile<T, kStep, kDim>(v_tile,
                              static_cast<const T*>(params.v) +
                                  (item.k_begin + k0) * params.v_strides.row +
                                  kv_head * params.v_strides.head,
                              params.v_strides.row, k_rows, params.head_dim, params.aligned);
    __syncthreads();
    float s[4][kC] = {};
    float dp[4][kC] = {};
    multiply_rows<4, kC, kDim>(s, q_tile, row0, k_tile, thread_column);
    multiply_rows<4, kC, kDim>(dp, dout_tile, row0, v_tile, thread_column);
    bool seen[4][kC];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        const std::int64_t key = k0 + thread_column + 16 * j;
        seen[i][j] = row0 + i < q_rows && key < item.k_count &&
                     visible(params, i_first + row0 + i, item.k_position + key);
      }
    }
    softmax_gradient<4, kC>(params, s, dp, lse, delta, seen);
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      *reinterpret_cast<float4*>(ds_tile + (thread_column + 16 * j) * kPadded<kFmaTile> + row0) =
          make_float4(dp[0][j], dp[1][j], dp[2][j], dp[3][j]);
    }
    __syncthreads();
    multiply_columns<4, kDim, kStep, kFmaTile>(sums, ds_tile, row0, k_tile, thread_column);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (row0 + i >= q_rows) continue;
    T* dq = static_cast<T*>(params.dq) + (row_first + row0 + i) * params.dq_strides.row +
            head * params.dq_strides.head;
#pragma unroll
    for (int e = 0; e < kDim / 16; ++e) {
      const int column = sum_column<kDim>(thread_column, e);
      if (column < params.head_dim) dq[column] = from_float<T>(sums[i][e]);
    }
  }
}

/// One block: dk and dv of one tile of keys of one document and one KV head, summed over the work
/// items, query heads and query tiles that see it, in a fixed order.
template <typename T, int kDim>
__global__ void __launch_bounds__(kFmaThreads)
    fma_dkv_kernel(const __grid_constant__ FmaParams params) {
  constexpr int kStep = kFmaStep<kDim>;
  constexpr int kR = kStep / 16;
  extern __shared__ __align__(16) float shared[];
  float* k_tile = shared;
  float* v_tile = k_tile + kFmaTile * kPadded<kDim>;
  float* q_tile = v_tile + kFmaTile * kPadded<kDim>;
  float* dout_tile = q_tile + kStep * kPadded<kDim>;
  float* p_tile = dout_tile + kStep * kPadded<kDim>;    // [query][key]
  float* ds_tile = p_tile + kStep * kPadded<kFmaTile>;  // [query][key]

  const std::int64_t document = find_tile(params.k_tiles, params.key_count, blockIdx.x);
  const FmaKeys keys = params.keys[document];
  const std::int64_t k_first = (blockIdx.x - params.k_tiles[document]) * kFmaTile;
  const std::int64_t k_rows = min(static_cast<std::int64_t>(kFmaTile), keys.count - k_first);
  const int kv_head = static_cast<int>(blockIdx.y);
  const int group = params.heads / params.kv_heads;
  const int thread_column = static_cast<int>(threadIdx.x) % 16;
  const int thread_row = static_cast<int>(threadIdx.x) / 16;
  const std::int64_t row_first = keys.begin + k_first;
  const std::int64_t j_first = keys.position + k_first;
  const std::int64_t j_last = j_first + k_rows - 1;

  load_tile<T, kFmaTile, kDim>(k_tile,
                               static_cast<const T*>(params.k) + row_first * params.k_strides.row +
                                   kv_head * params.k_strides.head,
                               params.k_strides.row, k_rows, params.head_dim, params.aligned);
  load_tile<T, kFmaTile, kDim>(v_tile,
                               static_cast<const T*>(params.v) + row_first * params.v_strides.row +
                                   kv_head * params.v_strides.head,
                               params.v_strides.row, k_rows, params.head_dim, params.aligned);
  float dk[4][kDim / 16] = {};
  float dv[4][kDim / 16] = {};
  for (const std::int64_t item_index : keys.items) {
    if (item_index < 0) continue;
    const FmaItem item = params.items[item_index];
    // Queries that see any key of the tile: j - right <= i <= j + left.
    std::int64_t q_first = 0;
    std::int64_t q_end = item.q_count;
    if (params.right >= 0) q_first = max(q_first, j_first - params.right - item.q_position);
    if (params.left >= 0) q_end = min(q_end, j_last + params.left + 1 - item.q_position);
    q_first = q_first / kStep * kStep;
    for (int member = 0; member < group; ++member) {
      const int head = kv_head * group + member;
      for (std::int64_t q0 = q_first; q0 < q_end; q0 += kStep) {
        const std::int64_t q_rows = min(static_cast<std::int64_t>(kStep), item.q_count - q0);
        const std::int64_t q_row = item.q_begin + q0;
        __syncthreads();
        load_tile<T, kStep, kDim>(q_tile,
                                  static_cast<const T*>(params.q) + q_row * params.q_strides.row +
                                      head * params.q_strides.head,
                                  params.q_strides.row, q_rows, params.head_dim, params.aligned);
        load_tile<T, kStep, kDim>(dout_tile,
                                  static_cast<const T*>(params.dout) +
                                      q_row * params.dout_strides.row +
                                      head * params.dout_strides.head,
                                  params.dout_strides.row, q_rows, params.head_dim, params.aligned);
        __syncthreads();
        // Rows are queries here, columns keys.
        float s[kR][4] = {};
        float dp[kR][4] = {};
        multiply_rows<kR, 4, kDim>(s, q_tile, thread_row * kR, k_tile, thread_column);
        multiply_rows<kR, 4, kDim>(dp, dout_tile, thread_row * kR, v_tile, thread_column);
        bool seen[kR][4];
        float lse[kR];
        float delta[kR];
#pragma unroll
        for (int i = 0; i < kR; ++i) {
          const std::int64_t in_tile = thread_row * kR + i;
          const bool live = in_tile < q_rows;
          const std::int64_t row = q_row + in_tile;
          lse[i] = live ? params.lse[row * params.lse_strides.row + head * params.lse_strides.head]
                        : 0.f;
          delta[i] = live ? params.delta[row * params.heads + head] : 0.f;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const std::int64_t key = thread_column + 16 * j;
            seen[i][j] = live && key < k_rows &&
                         visible(params, item.q_position + q0 + in_tile, j_first + key);
          }
        }
        softmax_gradient<kR, 4>(params, s, dp, lse, delta, seen);
#pragma unroll
        for (int i = 0; i < kR; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int at = (thread_row * kR + i) * kPadded<kFmaTile> + thread_column + 16 * j;
            p_tile[at] = s[i][j];
            ds_tile[at] = dp[i][j];
          }
        }
        __syncthreads();
        multiply_columns<4, kDim, kStep, kFmaTile>(dv, p_tile, thread_row * 4, dout_tile,
                                                   thread_column);
        multiply_columns<4, kDim, kStep, kFmaTile>(dk, ds_tile, thread_row * 4, q_tile,
                                                   thread_column);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (thread_row * 4 + i >= k_rows) continue;
    const std::int64_t row = row_first + thread_row * 4 + i;
    const std::int64_t dk_at = row * params.dk_strides.row + kv_head * params.dk_strides.head;
    const std::int64_t dv_at = row * params.dv_strides.row + kv_head * params.dv_strides.head;
#pragma unroll
    for (int e = 0; e < kDim / 16; ++e) {
      const int column = sum_column<kDim>(thread_column, e);
      if (column >= params.head_dim) continue;
      if (params.sums_are_float) {
        static_cast<float*>(params.dk)[dk_at + column] = dk[i][e];
        static_cast<float*>(params.dv)[dv_at + column] = dv[i][e];
      } else {
        static_cast<T*>(params.dk)[dk_at + column] = from_float<T>(dk[i][e]);
        static_cast<T*>(params.dv)[dv_at + column] = from_float<T>(dv[i][e]);
      }
    }
  }
}

}  // namespace zigzag::cuda
