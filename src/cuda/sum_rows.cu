#include <string>

#include <cuda_runtime.h>

#include "cuda/check.h"
#include "cuda/convert.cuh"
#include "cuda/sum_rows.h"
#include "zigzag/error.h"

namespace zigzag::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;
constexpr int kAhead = 2;
/// Loads in flight need many threads more than each needs many registers.
constexpr int kBlocksPerSm = 3;

struct SumParams {
  const void* sources[kMaxSumSources];
  const std::int64_t* begins;  // [intervals + 1], then rows [intervals, count]
  std::int64_t intervals;
  int count;
  void* destination;
  std::int64_t rows;
  std::int64_t row_stride;   // elements of the destination
  std::int64_t head_stride;  // elements of the destination
  std::uint32_t row_packs;   // of the destination
  std::uint32_t head_packs;
  std::uint32_t group;  // heads of a source that add up to one of the destination
};

/// The interval that holds `row`, by a warp that probes 32 at a time.
__device__ std::int64_t find_interval(const std::int64_t* begins, std::int64_t intervals,
                                      std::int64_t row) {
  std::int64_t low = 0;
  std::int64_t size = intervals;
  const int lane = static_cast<int>(threadIdx.x % 32);
  while (size > 1) {
    const std::int64_t stride = (size + 31) / 32;
    const std::int64_t probe = low + lane * stride;
    const bool before = probe < low + size && begins[probe] <= row;
    // Lane 0 always holds: the row is not before the range.
    const int last = 31 - __clz(static_cast<int>(__ballot_sync(0xffffffffu, before)));
    const std::int64_t end = low + size;
    low += last * stride;
    size = min(stride, end - low);
  }
  return low;
}

template <typename In, int kPack>
__device__ __forceinline__ void add(float (&sums)[kPack], const Pack<In, kPack>& values) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) sums[i] += to_float(values.values[i]);
}

/// Each thread makes kUnroll packs of kPack elements. Sources are added one after another in their
/// order, so a sum does not depend on the launch; loads run kAhead packs ahead of the additions.
template <typename In, typename Out, int kPack>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sum_rows_kernel(const __grid_constant__ SumParams params) {
  const std::int64_t total = params.rows * params.row_packs;
  const std::int64_t block_begin = static_cast<std::int64_t>(blockIdx.x) * (kThreads * kUnroll);
  const std::int64_t first_row = block_begin / params.row_packs;
  const auto skip = static_cast<std::uint32_t>(block_begin - first_row * params.row_packs);
  const std::int64_t* table_rows = params.begins + params.intervals + 1;
  const std::int64_t first_interval = find_interval(params.begins, params.intervals, first_row);

  float sums[kUnroll][kPack] = {};
  std::int64_t in_interval[kUnroll];
  const std::int64_t* origins[kUnroll];
  std::uint32_t columns[kUnroll];
  bool live[kUnroll];
  std::int64_t interval = first_interval;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const std::uint32_t offset = static_cast<std::uint32_t>(u * kThreads) + threadIdx.x;
    live[u] = block_begin + offset < total;
    const std::uint32_t row_in_block = (skip + offset) / params.row_packs;
    columns[u] = skip + offset - row_in_block * params.row_packs;
    const std::int64_t row = first_row + row_in_block;
    // A block has few rows, and their intervals follow one another.
    while (live[u] && params.begins[interval + 1] <= row) ++interval;
    in_interval[u] = row - params.begins[interval];
    origins[u] = table_rows + interval * params.count;
  }
  using Loaded = Pack<In, kPack>;
  const auto source_pack = [&](int s, int u) -> const Loaded* {
    const std::int64_t origin = live[u] && s < params.count ? origins[u][s] : -1;
    if (origin < 0) return nullptr;
    // Head h's group starts at pack h x group x head_packs of the source's row.
    const std::uint32_t head = columns[u] / params.head_packs;
    const std::int64_t column =
        columns[u] + static_cast<std::int64_t>(head) * (params.group - 1) * params.head_packs;
    return static_cast<const Loaded*>(params.sources[s]) +
           (origin + in_interval[u]) * static_cast<std::int64_t>(params.row_packs) * params.group +
           column;
  };
  Loaded loaded[kAhead][kUnroll];
  if (params.group == 1) {
    for (int s = 0; s < params.count; s += kAhead) {
      const Loaded* from[kAhead][kUnroll];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          from[a][u] = source_pack(s + a, u);
          if (from[a][u] != nullptr) loaded[a][u] = *from[a][u];
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (from[a][u] != nullptr) add(sums[u], loaded[a][u]);
        }
      }
    }
  } else {
    for (int s = 0; s < params.count; ++s) {
      const Loaded* from[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) from[u] = source_pack(s, u);
      for (std::uint32_t member = 0; member < params.group; member += kAhead) {
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (from[u] != nullptr && member + a < params.group) {
              loaded[a][u] = from[u][(member + a) * params.head_packs];
            }
          }
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (from[u] != nullptr && member + a < params.group) add(sums[u], loaded[a][u]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (!live[u]) continue;
    const std::uint32_t offset = static_cast<std::uint32_t>(u * kThreads) + threadIdx.x;
    const std::int64_t row = first_row + (skip + offset) / params.row_packs;
    const std::uint32_t head = columns[u] / params.head_packs;
    const std::uint32_t column = columns[u] - head * params.head_packs;
    Pack<Out, kPack> result;
#pragma unroll
    for (int i = 0; i < kPack; ++i) result.values[i] = from_float<Out>(sums[u][i]);
    auto* target = static_cast<Out*>(params.destination) + row * params.row_stride +
                   head * params.head_stride + static_cast<std::int64_t>(column) * kPack;
    *reinterpret_cast<Pack<Out, kPack>*>(target) = result;
  }
}

template <typename In, typename Out, int kPack>
void launch(SumParams& params, std::int64_t heads, std::int64_t head_dim, cudaStream_t stream) {
  params.head_packs = static_cast<std::uint32_t>(head_dim / kPack);
  params.row_packs = static_cast<std::uint32_t>(heads * head_dim / kPack);
  const std::int64_t per_block = kThreads * kUnroll;
  const std::int64_t blocks = (params.rows * params.row_packs + per_block - 1) / per_block;
  if (blocks > 0x7fffffff) throw DeviceError("the sum has too many rows for one launch");
  sum_rows_kernel<In, Out, kPack>
      <<<dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream>>>(params);
  check_launch("sum_rows_kernel");
}

template <typename In, typename Out>
void dispatch_pack(SumParams& params, std::int64_t heads, std::int64_t head_dim,
                   cudaStream_t stream) {
  auto bits = reinterpret_cast<std::uintptr_t>(params.destination);
  bits |= static_cast<std::uintptr_t>(params.row_stride | params.head_stride) * sizeof(Out);
  std::uintptr_t source_bits = 0;
  for (int s = 0; s < params.count; ++s) {
    source_bits |= reinterpret_cast<std::uintptr_t>(params.sources[s]);
  }
  constexpr int kWide = 16 / sizeof(In);
  constexpr std::uintptr_t kOutBytes = kWide * sizeof(Out);
  constexpr std::uintptr_t kOutAlign = kOutBytes < 16 ? kOutBytes : 16;
  if (source_bits % 16 == 0 && bits % kOutAlign == 0 && head_dim % kWide == 0) {
    launch<In, Out, kWide>(params, heads, head_dim, stream);
  } else {
    launch<In, Out, 1>(params, heads, head_dim, stream);
  }
}

template <typename In>
void dispatch_out(SumParams& params, DType out, std::int64_t heads, std::int64_t head_dim,
                  cudaStream_t stream) {
  switch (out) {
    case DType::kFloat32:
      return dispatch_pack<In, float>(params, heads, head_dim, stream);
    case DType::kFloat16:
      return dispatch_pack<In, __half>(params, heads, head_dim, stream);
    case DType::kBFloat16:
      return dispatch_pack<In, __nv_bfloat16>(params, heads, head_dim, stream);
    default:
      throw DeviceError("sums are made in float32, float16 or bfloat16, not " +
                        std::string(dtype_name(out)));
  }
}

}  // namespace

void sum_rows(std::span<const void* const> sources, DType source_type, std::int64_t group,
              const TensorView& destination, const TableKey& key,
              const std::function<SumTable()>& build, void* stream_pointer) {
  if (destination.num_elements() == 0) return;
  if (sources.size() > kMaxSumSources) {
    throw DeviceError("a sum takes at most " + std::to_string(kMaxSumSources) + " sources, not " +
                      std::to_string(sources.size()));
  }
  const cudaStream_t stream = as_stream(stream_pointer);
  DeviceState& device = DeviceState::get(destination.device.index);
  DeviceGuard guard(destination.device.index);
  const auto make_bytes = [&] {
    const SumTable table = build();
    std::vector<std::int64_t> values = table.begins;
    values.insert(values.end(), table.rows.begin(), table.rows.end());
    return bytes_of(values);
  };
  const std::shared_ptr<DeviceTable> table = device.table(key, make_bytes);
  const TableUse use(table, stream);

  SumParams params{};
  for (std::size_t s = 0; s < sources.size(); ++s) params.sources[s] = sources[s];
  params.count = static_cast<int>(sources.size());
  params.begins = use.as<std::int64_t>();
  // intervals + 1 begins and intervals x count rows.
  params.intervals =
      (static_cast<std::int64_t>(table->bytes() / sizeof(std::int64_t)) - 1) / (params.count + 1);
  params.group = static_cast<std::uint32_t>(group);
  params.destination = destination.data;
  params.rows = destination.shape[0];
  params.row_stride = destination.strides[0];
  params.head_stride = destination.strides[1];
  const std::int64_t heads = destination.shape[1];
  const std::int64_t head_dim = destination.shape[2];
  switch (source_type) {
    case DType::kFloat32:
      return dispatch_out<float>(params, destination.dtype, heads, head_dim, stream);
    case DType::kFloat16:
      return dispatch_out<__half>(params, destination.dtype, heads, head_dim, stream);
    case DType::kBFloat16:
      return dispatch_out<__nv_bfloat16>(params, destination.dtype, heads, head_dim, stream);
    default:
      throw DeviceError("sums are made of float32, float16 or bfloat16, not " +
                        std::string(dtype_name(source_type)));
  }
}

}  // namespace zigzag::cuda
