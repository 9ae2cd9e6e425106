#pragma once

#include <cstdint>
#include <span>

#include "zigzag/plan.h"
#include "zigzag/tensor.h"

namespace zigzag::cuda {

/// Copies rows between tensors of one device in one launch, whatever the number of segments:
/// destination row `destination_row + i` becomes row `source_row + i` of sources[segment.source],
/// for i < rows. Serves shard (one source), unshard (W sources), unshard_rank, extract and scatter.
///
/// sources[i] [rows_i, ...] and destination [rows, ...] have one dtype and the same shape[1:];
/// strides are free. Work is ordered with `stream` (a cudaStream_t) and nothing waits for it.
/// `key` names the segment list: the table of a non-zero key stays on the device and is reused
/// while the same key comes with as many segments (Plan::fingerprint mixed with the operation, the
/// rank and the mask); 0 uploads a long list anew. Throws DeviceError when CUDA fails.
void copy_rows(std::span<const TensorView> sources, const TensorView& destination,
               std::span<const Segment> segments, std::uint64_t key, void* stream);

/// The same for one source.
inline void copy_rows(const TensorView& source, const TensorView& destination,
                      std::span<const Segment> segments, std::uint64_t key, void* stream) {
  copy_rows(std::span<const TensorView>(&source, 1), destination, segments, key, stream);
}

/// The same rows of two tensors, K and V say, in one launch where both are laid out alike.
void copy_rows_twice(std::span<const TensorView> sources, const TensorView& destination,
                     std::span<const TensorView> source_twins, const TensorView& destination_twin,
                     std::span<const Segment> segments, std::uint64_t key, void* stream);

/// Its plain twin: a thread a row, element after element. Rows of up to 8 dimensions.
void copy_rows_plain(std::span<const TensorView> sources, const TensorView& destination,
                     std::span<const Segment> segments, void* stream);

}  // namespace zigzag::cuda
