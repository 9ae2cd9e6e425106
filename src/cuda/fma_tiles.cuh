#pragma once

#include <cstdint>

#include "cuda/convert.cuh"
#include "cuda/fma_params.h"

namespace zigzag::cuda {

constexpr int kFmaThreads = 256;

/// Rows in shared memory are padded by 4 floats: neighbouring rows start 4 banks apart, so that
/// eight threads that read 16 bytes of eight rows touch every bank once.
template <int kColumns>
inline constexpr int kPadded = kColumns + 4;

/// Copies `rows` rows of up to head_dim elements into shared memory as floats; rows from `count`
/// on and columns from head_dim on become 0.
template <typename T, int kRows, int kColumns>
__device__ void load_tile(float* tile, const T* source, std::int64_t row_stride, std::int64_t count,
                          int head_dim, bool aligned) {
  constexpr int kPacks = kColumns / 4;
  for (int index = static_cast<int>(threadIdx.x); index < kRows * kPacks; index += kFmaThreads) {
    const int row = index / kPacks;
    const int column = (index % kPacks) * 4;
    float4 value = make_float4(0.f, 0.f, 0.f, 0.f);
    if (row < count && column < head_dim) {
      const T* at = source + row * row_stride + column;
      if (aligned) {
        const Pack<T, 4> pack = *reinterpret_cast<const Pack<T, 4>*>(at);
        value = make_float4(to_float(pack.values[0]), to_float(pack.values[1]),
                            to_float(pack.values[2]), to_float(pack.values[3]));
      } else {
        value.x = to_float(at[0]);
        if (column + 1 < head_dim) value.y = to_float(at[1]);
        if (column + 2 < head_dim) value.z = to_float(at[2]);
        if (column + 3 < head_dim) value.w = to_float(at[3]);
      }
    }
    *reinterpret_cast<float4*>(tile + row * kPadded<kColumns> + column) = value;
  }
}

/// sums[i][j] += A[row0 + i] . B[column0 + 16 j] over kDepth floats.
template <int kR, int kC, int kDepth>
__device__ __forceinline__ void multiply_rows(float (&sums)[kR][kC], const float* a, int row0,
                                              const float* b, int column0) {
#pragma unroll 2
  for (int d = 0; d < kDepth; d += 4) {
    float4 left[kR];
    float4 right[kC];
#pragma unroll
    for (int i = 0; i < kR; ++i) {
      left[i] = *reinterpret_cast<const float4*>(a + (row0 + i) * kPadded<kDepth> + d);
    }
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      right[j] = *reinterpret_cast<const float4*>(b + (column0 + 16 * j) * kPadded<kDepth> + d);
    }
#pragma unroll
    for (int i = 0; i < kR; ++i) {
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        sums[i][j] = fmaf(left[i].x, right[j].x, sums[i][j]);
        sums[i][j] = fmaf(left[i].y, right[j].y, sums[i][j]);
        sums[i][j] = fmaf(left[i].z, right[j].z, sums[i][j]);
        sums[i][j] = fmaf(left[i].w, right[j].w, sums[i][j]);
      }
    }
  }
}

/// sums[i][4 c + e] += sum over n < kDepth of A[n][row0 + i] * B[n][64 c + column0 + e]: A is
/// stored with the summed index as its row, kAColumns wide.
template <int kR, int kColumns, int kDepth, int kAColumns>
__device__ __forceinline__ void multiply_columns(float (&sums)[kR][kColumns / 16], const float* a,
                                                 int row0, const float* b, int column0) {
  static_assert(kR == 4 || kR == 2);
#pragma unroll 4
  for (int n = 0; n < kDepth; ++n) {
    float left[kR];
    if constexpr (kR == 4) {
      const float4 x = *reinterpret_cast<const float4*>(a + n * kPadded<kAColumns> + row0);
      left[0] = x.x;
      left[1] = x.y;
      left[2] = x.z;
      left[3] = x.w;
    } else {
      const float2 x = *reinterpret_cast<const float2*>(a + n * kPadded<kAColumns> + row0);
      left[0] = x.x;
      left[1] = x.y;
    }
    if constexpr (kColumns >= 64) {
#pragma unroll
      for (int c = 0; c < kColumns / 64; ++c) {
        const float4 x =
            *reinterpret_cast<const float4*>(b + n * kPadded<kColumns> + 64 * c + column0 * 4);
#pragma unroll
        for (int i = 0; i < kR; ++i) {
          sums[i][4 * c + 0] = fmaf(left[i], x.x, sums[i][4 * c + 0]);
          sums[i][4 * c + 1] = fmaf(left[i], x.y, sums[i][4 * c + 1]);
          sums[i][4 * c + 2] = fmaf(left[i], x.z, sums[i][4 * c + 2]);
          sums[i][4 * c + 3] = fmaf(left[i], x.w, sums[i][4 * c + 3]);
        }
      }
    } else {
      const float2 x = *reinterpret_cast<const float2*>(b + n * kPadded<kColumns> + column0 * 2);
#pragma unroll
      for (int i = 0; i < kR; ++i) {
        sums[i][0] = fmaf(left[i], x.x, sums[i][0]);
        sums[i][1] = fmaf(left[i], x.y, sums[i][1]);
      }
    }
  }
}

/// The column that element `e` of a thread's row of sums belongs to (see multiply_columns).
template <int kColumns>
__device__ __forceinline__ int sum_column(int thread_column, int e) {
  if constexpr (kColumns >= 64) {
    return 64 * (e / 4) + thread_column * 4 + e % 4;
  } else {
    return thread_column * 2 + e;
  }
}

/// The entry of `starts` [count + 1] that holds tile `tile`.
__device__ inline std::int64_t find_tile(const std::int64_t* starts, std::int64_t count,
                                         std::int64_t tile) {
  std::int64_t low = 0;
  std::int64_t high = count;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    if (starts[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// True when the query at position i sees the key at position j.
__device__ __forceinline__ bool visible(const FmaParams& params, std::int64_t i, std::int64_t j) {
  return (params.left < 0 || j >= i - params.left) && (params.right < 0 || j <= i + params.right);
}

/// A score after scale and softcap.
__device__ __forceinline__ float score(const FmaParams& params, float product) {
  const float x = product * params.scale;
  return params.softcap > 0.f ? params.softcap * tanhf(x / params.softcap) : x;
}

/// d score / d (scale * q.k), from the capped score.
__device__ __forceinline__ float score_slope(const FmaParams& params, float capped) {
  if (params.softcap <= 0.f) return 1.f;
  const float t = capped / params.softcap;
  return 1.f - t * t;
}

}  // namespace zigzag::cuda
