#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "cuda/check.h"
#include "cuda/copy_rows.cuh"
#include "cuda/device.h"
#include "cuda/layout.h"
#include "zigzag/error.h"

namespace zigzag::cuda {
namespace {

template <int kWidth>
struct Vector;
template <>
struct Vector<16> {
  using Type = uint4;
};
template <>
struct Vector<8> {
  using Type = uint2;
};
template <>
struct Vector<4> {
  using Type = unsigned int;
};
template <>
struct Vector<2> {
  using Type = unsigned short;
};
template <>
struct Vector<1> {
  using Type = unsigned char;
};

/// The entry in [low, high) that holds `row`.
__device__ std::int64_t find_entry(const CopyEntry* table, std::int64_t low, std::int64_t high,
                                   std::int64_t row) {
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    if (table[middle].begin <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// The same for the whole table by a warp that probes 32 entries at a time.
__device__ std::int64_t find_entry_by_warp(const CopyEntry* table, std::int64_t count,
                                           std::int64_t row) {
  std::int64_t low = 0;
  std::int64_t size = count;
  const int lane = static_cast<int>(threadIdx.x % 32);
  while (size > 1) {
    const std::int64_t stride = (size + 31) / 32;
    const std::int64_t probe = low + lane * stride;
    const bool before = probe < low + size && table[probe].begin <= row;
    // Lane 0 always holds: the row is not before the range.
    const int last = 31 - __clz(static_cast<int>(__ballot_sync(0xffffffffu, before)));
    const std::int64_t end = low + size;
    low += last * stride;
    size = min(stride, end - low);
  }
  return low;
}

/// Each block moves kCopyThreads x kUnroll vectors of the rows taken end to end. A row that is one
/// run needs no second division (kOneRun); vectors are loaded before the first is stored.
template <int kWidth, int kUnroll, bool kOneRun, typename Params>
__global__ void __launch_bounds__(kCopyThreads)
    copy_rows_kernel(const __grid_constant__ Params params) {
  using Vec = typename Vector<kWidth>::Type;
  constexpr std::int64_t kChunk = std::int64_t{kCopyThreads} * kUnroll;
  const CopyEntry* table = params.table != nullptr ? params.table : params.inline_table;
  const std::int64_t total = params.rows * params.row_vectors;
  const std::int64_t chunk_begin = static_cast<std::int64_t>(blockIdx.x) * kChunk;
  const std::int64_t chunk_end = min(chunk_begin + kChunk, total);
  // Rows are counted from the chunk's first one, so that divisions have 32 bits.
  const std::int64_t first_row = chunk_begin / params.row_vectors;
  const auto skip = static_cast<std::uint32_t>(chunk_begin - first_row * params.row_vectors);
  const std::int64_t last_row = (chunk_end - 1) / params.row_vectors;
  const std::int64_t first_entry = find_entry_by_warp(table, params.entries, first_row);
  std::int64_t last_entry = first_entry;
  if (first_entry + 1 < params.entries && table[first_entry + 1].begin <= last_row) {
    last_entry = first_entry +
                 find_entry_by_warp(table + first_entry, params.entries - first_entry, last_row);
  }
  Vec values[kUnroll];
  char* targets[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const std::uint32_t offset = static_cast<std::uint32_t>(i * kCopyThreads) + threadIdx.x;
    targets[i] = nullptr;
    if (chunk_begin + offset < chunk_end) {
      const std::uint32_t vector = skip + offset;
      const std::uint32_t row_in_chunk = vector / params.row_vectors;
      std::uint32_t column = vector - row_in_chunk * params.row_vectors;
      const std::int64_t row = first_row + row_in_chunk;
      std::int64_t index = first_entry;
      if (last_entry != first_entry) index = find_entry(table, first_entry, last_entry + 1, row);
      const CopyEntry entry = table[index];
      const CopySide& source = params.sources[entry.source];
      const std::int64_t in_entry = row - entry.begin;
      const char* from = source.data + blockIdx.y * source.twin +
                         (entry.source_row + in_entry) * source.row_stride;
      char* to = params.destination.data + blockIdx.y * params.destination.twin +
                 (entry.destination_row + in_entry) * params.destination.row_stride;
      if constexpr (!kOneRun) {
        const std::uint32_t run = column / params.run_vectors;
        column -= run * params.run_vectors;
        from += run * source.run_stride;
        to += run * params.destination.run_stride;
      }
      const std::int64_t byte = static_cast<std::int64_t>(column) * kWidth;
      values[i] = *reinterpret_cast<const Vec*>(from + byte);
      targets[i] = to + byte;
    }
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (targets[i] != nullptr) *reinterpret_cast<Vec*>(targets[i]) = values[i];
  }
}

/// How rows of several tensors of one shape split into runs without gaps in all of them.
struct Runs {
  std::int64_t run_bytes = 0;
  std::int64_t runs = 1;
  int run_dim = -1;        // the dimension that counts runs, -1 when there is one run
  std::vector<int> outer;  // further dimensions, outermost first: not expressible as runs
};

Runs find_runs(std::span<const TensorView* const> views) {
  const TensorView& first = *views[0];
  const int dims = static_cast<int>(first.shape.size());
  Runs result;
  std::int64_t elements = 1;
  int dim = dims - 1;
  for (; dim >= 1; --dim) {
    const auto at = static_cast<std::size_t>(dim);
    if (first.shape[at] == 1) continue;
    const bool dense = std::all_of(views.begin(), views.end(), [&](const TensorView* view) {
      return view->strides[at] == elements;
    });
    if (!dense) break;
    elements *= first.shape[at];
  }
  result.run_bytes = elements * item_size(first.dtype);
  for (; dim >= 1; --dim) {
    const auto at = static_cast<std::size_t>(dim);
    if (first.shape[at] == 1) continue;
    if (result.run_dim < 0) {
      result.run_dim = dim;
      result.runs = first.shape[at];
    } else if (std::all_of(views.begin(), views.end(), [&](const TensorView* view) {
                 return view->strides[at] ==
                        result.runs * view->strides[static_cast<std::size_t>(result.run_dim)];
               })) {
      // The run dimension keeps its stride; a dimension that continues it only adds runs.
      result.runs *= first.shape[at];
    } else {
      result.outer.insert(result.outer.begin(), dim);
    }
  }
  return result;
}

CopySide side_of(const TensorView& view, const Runs& runs) {
  const std::int64_t size = item_size(view.dtype);
  return {static_cast<char*>(view.data), view.strides[0] * size,
          runs.run_dim < 0 ? 0 : view.strides[static_cast<std::size_t>(runs.run_dim)] * size, 0};
}

/// The widest access that every address of the launch is a multiple of.
int common_width(const CopyParams& params, int sources, std::int64_t run_bytes) {
  auto bits = static_cast<std::uint64_t>(run_bytes) | 16;
  const auto add = [&](const CopySide& side) {
    bits |= reinterpret_cast<std::uintptr_t>(side.data);
    bits |= static_cast<std::uint64_t>(side.row_stride);
    bits |= static_cast<std::uint64_t>(side.run_stride);
    bits |= static_cast<std::uint64_t>(side.twin);
  };
  add(params.destination);
  for (int i = 0; i < sources; ++i) add(params.sources[i]);
  return static_cast<int>(bits & (~bits + 1));
}

template <int kWidth, int kUnroll, typename Params>
void launch_kernel(const Params& params, bool one_run, std::int64_t blocks, unsigned twins,
                   cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(blocks), twins);
  if (one_run) {
    copy_rows_kernel<kWidth, kUnroll, true><<<grid, kCopyThreads, 0, stream>>>(params);
  } else {
    copy_rows_kernel<kWidth, kUnroll, false><<<grid, kCopyThreads, 0, stream>>>(params);
  }
  check_launch("copy_rows_kernel");
}

template <int kWidth, typename Params>
void launch_unrolled(const Params& params, bool one_run, unsigned twins, cudaStream_t stream) {
  const std::int64_t vectors = params.rows * params.row_vectors;
  const auto blocks = [&](int unroll) {
    const std::int64_t chunk = std::int64_t{kCopyThreads} * unroll;
    return (vectors + chunk - 1) / chunk;
  };
  if (blocks(kCopyUnroll) > 0x7fffffff) {
    throw DeviceError("the copy has too many rows for one launch");
  }
  if (blocks(kCopyUnroll) * twins < kCopyShortBlocks) {
    launch_kernel<kWidth, kCopyShortUnroll>(params, one_run, blocks(kCopyShortUnroll), twins,
                                            stream);
  } else {
    launch_kernel<kWidth, kCopyUnroll>(params, one_run, blocks(kCopyUnroll), twins, stream);
  }
}

template <int kWidth>
void launch_width(CopyParams& params, int sources, std::int64_t run_bytes, std::int64_t runs,
                  unsigned twins, cudaStream_t stream) {
  const std::int64_t row_vectors = run_bytes / kWidth * runs;
  if (row_vectors > (std::int64_t{1} << 31)) {
    throw DeviceError("a row of " + std::to_string(run_bytes * runs) +
                      " bytes is too long for the GPU's row copy");
  }
  params.run_vectors = static_cast<std::uint32_t>(run_bytes / kWidth);
  params.row_vectors = static_cast<std::uint32_t>(row_vectors);
  if (sources <= kFewSources && (params.table != nullptr || params.entries <= kFewEntries)) {
    FewCopyParams few{};
    static_cast<CopyShape&>(few) = params;
    std::copy_n(params.sources, sources, few.sources);
    if (params.table == nullptr) {
      std::copy_n(params.inline_table, params.entries, few.inline_table);
    }
    launch_unrolled<kWidth>(few, runs == 1, twins, stream);
  } else {
    launch_unrolled<kWidth>(params, runs == 1, twins, stream);
  }
}

void launch(CopyParams& params, int sources, const Runs& runs, unsigned twins,
            cudaStream_t stream) {
  switch (common_width(params, sources, runs.run_bytes)) {
    case 16:
      return launch_width<16>(params, sources, runs.run_bytes, runs.runs, twins, stream);
    case 8:
      return launch_width<8>(params, sources, runs.run_bytes, runs.runs, twins, stream);
    case 4:
      return launch_width<4>(params, sources, runs.run_bytes, runs.runs, twins, stream);
    case 2:
      return launch_width<2>(params, sources, runs.run_bytes, runs.runs, twins, stream);
    default:
      return launch_width<1>(params, sources, runs.run_bytes, runs.runs, twins, stream);
  }
}

/// Entries of the segments whose source is in [first_source, first_source + kMaxSources), those
/// that continue one another merged.
std::vector<CopyEntry> make_entries(std::span<const Segment> segments, std::int64_t first_source,
                                    std::int64_t& rows) {
  std::vector<CopyEntry> entries;
  entries.reserve(segments.size());
  rows = 0;
  for (const Segment& segment : segments) {
    const std::int64_t source = segment.source - first_source;
    if (segment.rows <= 0 || source < 0 || source >= kMaxSources) continue;
    if (!entries.empty()) {
      const CopyEntry& last = entries.back();
      const std::int64_t length = rows - last.begin;
      if (last.source == source && last.source_row + length == segment.source_row &&
          last.destination_row + length == segment.destination_row) {
        rows += segment.rows;
        continue;
      }
    }
    entries.push_back({rows, segment.source_row, segment.destination_row, source});
    rows += segment.rows;
  }
  return entries;
}

/// Calls `body` for every entry of the outer dimensions, with views that start there.
void for_each_outer(const Runs& runs, std::vector<TensorView>& views, std::size_t depth,
                    const std::function<void()>& body) {
  if (depth == runs.outer.size()) return body();
  const auto dim = static_cast<std::size_t>(runs.outer[depth]);
  const std::int64_t extent = views[0].shape[dim];
  std::vector<void*> starts;
  for (const TensorView& view : views) starts.push_back(view.data);
  for (std::int64_t i = 0; i < extent; ++i) {
    for (std::size_t v = 0; v < views.size(); ++v) {
      views[v].data =
          static_cast<char*>(starts[v]) + i * views[v].strides[dim] * item_size(views[v].dtype);
    }
    for_each_outer(runs, views, depth + 1, body);
  }
  for (std::size_t v = 0; v < views.size(); ++v) views[v].data = starts[v];
}

std::int64_t bytes_between(const TensorView& from, const TensorView& to) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to.data) -
                                   reinterpret_cast<std::uintptr_t>(from.data));
}

/// `source_twins`, `destination_twin`: laid out as sources and destination; empty and null when
/// there are none.
void copy(std::span<const TensorView> sources, const TensorView& destination,
          std::span<const TensorView> source_twins, const TensorView* destination_twin,
          std::span<const Segment> segments, std::uint64_t key, void* stream_pointer) {
  if (segments.empty() || destination.row_elements() == 0) return;
  const cudaStream_t stream = as_stream(stream_pointer);
  DeviceState& device = DeviceState::get(destination.device.index);
  DeviceGuard guard(destination.device.index);
  for (std::size_t first = 0; first < sources.size(); first += kMaxSources) {
    const std::size_t count = std::min<std::size_t>(kMaxSources, sources.size() - first);
    std::vector<TensorView> views{destination};
    views.insert(views.end(), sources.begin() + static_cast<std::ptrdiff_t>(first),
                 sources.begin() + static_cast<std::ptrdiff_t>(first + count));
    std::vector<const TensorView*> pointers;
    for (const TensorView& view : views) pointers.push_back(&view);
    const Runs runs = find_runs(pointers);

    CopyParams params{};
    std::shared_ptr<DeviceTable> table;
    std::int64_t rows = 0;
    if (key != 0 && segments.size() > kInlineEntries) {
      for (const Segment& segment : segments) {
        const auto source = static_cast<std::size_t>(segment.source);
        if (source >= first && source < first + count)
          rows += std::max<std::int64_t>(segment.rows, 0);
      }
      const TableKey name{key, mix(segments.size(), first), 1};
      table = device.table(name, [&] {
        std::int64_t unused = 0;
        return bytes_of(make_entries(segments, static_cast<std::int64_t>(first), unused));
      });
      params.entries = static_cast<std::int64_t>(table->bytes() / sizeof(CopyEntry));
    } else {
      const auto entries = make_entries(segments, static_cast<std::int64_t>(first), rows);
      params.entries = static_cast<std::int64_t>(entries.size());
      if (entries.size() <= kInlineEntries) {
        std::copy(entries.begin(), entries.end(), params.inline_table);
      } else {
        table = device.table(entries.data(), entries.size() * sizeof(CopyEntry));
      }
    }
    if (rows == 0) continue;
    params.rows = rows;
    std::unique_ptr<TableUse> use;
    if (table != nullptr) {
      use = std::make_unique<TableUse>(table, stream);
      params.table = use->as<CopyEntry>();
    }
    for_each_outer(runs, views, 0, [&] {
      params.destination = side_of(views[0], runs);
      for (std::size_t i = 0; i < count; ++i) params.sources[i] = side_of(views[i + 1], runs);
      if (destination_twin != nullptr) {
        params.destination.twin = bytes_between(destination, *destination_twin);
        for (std::size_t i = 0; i < count; ++i) {
          params.sources[i].twin = bytes_between(sources[first + i], source_twins[first + i]);
        }
      }
      launch(params, static_cast<int>(count), runs, destination_twin != nullptr ? 2 : 1, stream);
    });
  }
}

bool laid_out_alike(const TensorView& a, const TensorView& b) {
  return a.dtype == b.dtype && a.shape == b.shape && a.strides == b.strides;
}

}  // namespace

void copy_rows(std::span<const TensorView> sources, const TensorView& destination,
               std::span<const Segment> segments, std::uint64_t key, void* stream) {
  copy(sources, destination, {}, nullptr, segments, key, stream);
}

void copy_rows_twice(std::span<const TensorView> sources, const TensorView& destination,
                     std::span<const TensorView> source_twins, const TensorView& destination_twin,
                     std::span<const Segment> segments, std::uint64_t key, void* stream) {
  bool alike = laid_out_alike(destination, destination_twin);
  for (std::size_t i = 0; i < sources.size(); ++i) {
    alike = alike && laid_out_alike(sources[i], source_twins[i]);
  }
  if (alike) {
    copy(sources, destination, source_twins, &destination_twin, segments, key, stream);
  } else {
    copy(sources, destination, {}, nullptr, segments, key, stream);
    copy(source_twins, destination_twin, {}, nullptr, segments, key, stream);
  }
}

}  // namespace zigzag::cuda
