#include "zigzag/layout.h"

#include <string>
#include <utility>
#include <vector>

#include "cpu/copy.h"
#include "cuda/layout.h"
#include "reference/layout.h"
#include "zigzag/error.h"

namespace zigzag {

namespace {

using std::int64_t;

/// Tells operations apart in the keys of device tables.
enum class Operation : std::uint64_t { kShard = 1, kUnshard, kUnshardRank, kExtract };

void check_rows(const char* name, const TensorView& tensor, int64_t rows, const char* meaning) {
  if (tensor.rank() < 1 || tensor.strides.size() != tensor.shape.size()) {
    throw InvalidArgument(std::string(name) + " has shape " + shape_text(tensor.shape) + " and " +
                          std::to_string(tensor.strides.size()) +
                          " strides; it needs a first dimension of rows and a stride a dimension");
  }
  if (tensor.shape[0] != rows) {
    throw InvalidArgument(std::string(name) + " has " + std::to_string(tensor.shape[0]) +
                          " rows; it must have " + std::to_string(rows) + ", " + meaning);
  }
  if (tensor.data == nullptr && tensor.num_elements() > 0) {
    throw InvalidArgument(std::string(name) + " has no data");
  }
}

void check_alike(const char* name, const TensorView& tensor, const char* other_name,
                 const TensorView& other) {
  if (tensor.dtype != other.dtype) {
    throw InvalidArgument(std::string(name) + " is " + std::string(dtype_name(tensor.dtype)) +
                          " and " + other_name + " " + std::string(dtype_name(other.dtype)) +
                          "; they must have one type");
  }
  if (!(tensor.device == other.device)) {
    throw InvalidArgument(std::string(name) + " is on " + device_name(tensor.device) + " and " +
                          other_name + " on " + device_name(other.device) +
                          "; they must be on one device");
  }
  const std::span<const int64_t> shape(tensor.shape);
  const std::span<const int64_t> other_shape(other.shape);
  if (shape.size() != other_shape.size() ||
      !std::equal(shape.begin() + 1, shape.end(), other_shape.begin() + 1)) {
    throw InvalidArgument(std::string(name) + " has shape " + shape_text(shape) + " and " +
                          other_name + " " + shape_text(other_shape) +
                          "; they must be alike but for the rows");
  }
}

Kernels resolve(const OperationOptions& options) {
  return options.kernels.value_or(default_kernels());
}

void copy_segments(std::span<const TensorView> sources, const TensorView& out,
                   std::span<const Segment> segments, std::uint64_t key,
                   const OperationOptions& options) {
  if (out.device.type == DeviceType::kCpu) {
    cpu::copy_rows(sources, out, segments);
  } else if (resolve(options) == Kernels::kReference) {
    cuda::copy_rows_plain(sources, out, segments, options.stream);
  } else {
    cuda::copy_rows(sources, out, segments, key, options.stream);
  }
}

std::uint64_t table_key(const Plan& plan, Operation operation, int64_t detail) {
  const std::uint64_t mixed = plan.fingerprint() ^ (static_cast<std::uint64_t>(operation) << 56U) ^
                              (static_cast<std::uint64_t>(detail) * 0x9e3779b97f4a7c15U);
  return mixed == 0 ? 1 : mixed;
}

/// The reference twin of the host; a GPU has its own, a plain kernel.
bool runs_reference(const TensorView& out, const OperationOptions& options) {
  return resolve(options) == Kernels::kReference && out.device.type == DeviceType::kCpu;
}

/// Rows of a rank as segments from the whole pack to its shard.
std::vector<Segment> shard_segments(const Plan& plan, int64_t rank) {
  const auto [early, late] = plan.chunk_indices(rank);
  std::vector<Segment> segments;
  const std::span<const int64_t> cu_seqlens = plan.cu_seqlens();
  for (int64_t d = 0; d < plan.num_documents(); ++d) {
    for (const int64_t index : {early, late}) {
      const Chunk chunk = plan.chunk(d, index);
      if (chunk.begin == chunk.end) continue;
      segments.push_back({0, cu_seqlens[static_cast<std::size_t>(d)] + chunk.begin, chunk.local_row,
                          chunk.end - chunk.begin});
    }
  }
  return segments;
}

/// The way back, from sources[source].
void append_inverse(std::vector<Segment>& segments, std::span<const Segment> forward,
                    int64_t source) {
  for (const Segment& segment : forward) {
    segments.push_back({source, segment.destination_row, segment.source_row, segment.rows});
  }
}

}  // namespace

void shard(const TensorView& x, const Plan& plan, int64_t rank, const TensorView& out,
           const OperationOptions& options) {
  check_rows("out", out, plan.local_tokens(rank), "the rank's share of the plan's tokens");
  check_rows("x", x, plan.total_tokens(), "the plan's tokens");
  check_alike("out", out, "x", x);
  if (runs_reference(out, options)) return reference::shard(x, plan, rank, out);
  copy_segments({&x, 1}, out, shard_segments(plan, rank), table_key(plan, Operation::kShard, rank),
                options);
}

void unshard(std::span<const TensorView> parts, const Plan& plan, const TensorView& out,
             const OperationOptions& options) {
  if (std::cmp_not_equal(parts.size(), plan.world_size())) {
    throw InvalidArgument("there are " + std::to_string(parts.size()) + " parts; the plan has " +
                          std::to_string(plan.world_size()) + " ranks");
  }
  check_rows("out", out, plan.total_tokens(), "the plan's tokens");
  std::vector<Segment> segments;
  for (int64_t r = 0; r < plan.world_size(); ++r) {
    const TensorView& part = parts[static_cast<std::size_t>(r)];
    const std::string name = "parts[" + std::to_string(r) + "]";
    check_rows(name.c_str(), part, plan.local_tokens(r), "the rank's share of the plan's tokens");
    check_alike(name.c_str(), part, "out", out);
    append_inverse(segments, shard_segments(plan, r), r);
  }
  if (runs_reference(out, options)) return reference::unshard(parts, plan, out);
  copy_segments(parts, out, segments, table_key(plan, Operation::kUnshard, 0), options);
}

void unshard_rank(const TensorView& part, const Plan& plan, int64_t rank, const TensorView& out,
                  const OperationOptions& options) {
  check_rows("part", part, plan.local_tokens(rank), "the rank's share of the plan's tokens");
  check_rows("out", out, plan.total_tokens(), "the plan's tokens");
  check_alike("part", part, "out", out);
  if (runs_reference(out, options)) return reference::unshard_rank(part, plan, rank, out);
  std::vector<Segment> segments;
  append_inverse(segments, shard_segments(plan, rank), 0);
  copy_segments({&part, 1}, out, segments, table_key(plan, Operation::kUnshardRank, rank), options);
}

int64_t extracted_tokens(const Plan& plan, std::span<const int64_t> prefix_chunks) {
  return plan.prefix_tokens(prefix_chunks);
}

void extract(const TensorView& gathered, const Plan& plan, std::span<const int64_t> prefix_chunks,
             const TensorView& out, const OperationOptions& options) {
  check_rows("out", out, plan.prefix_tokens(prefix_chunks), "the prefixes' tokens");
  check_rows("gathered", gathered, plan.total_tokens(), "the plan's tokens");
  check_alike("out", out, "gathered", gathered);
  if (runs_reference(out, options)) return reference::extract(gathered, plan, prefix_chunks, out);
  std::vector<Segment> segments;
  std::uint64_t detail = 0;
  int64_t first_row = 0;
  for (int64_t r = 0; r < plan.world_size(); ++r) {
    for (Segment segment : plan.prefix_segments(r, prefix_chunks)) {
      segment.source = 0;
      segment.source_row += first_row;
      segments.push_back(segment);
    }
    first_row += plan.local_tokens(r);
  }
  for (const int64_t chunks : prefix_chunks) {
    detail = detail * 0x100000001b3U + static_cast<std::uint64_t>(chunks) + 1;
  }
  copy_segments({&gathered, 1}, out, segments,
                table_key(plan, Operation::kExtract, static_cast<int64_t>(detail)), options);
}

void scatter(const TensorView& grad, const Plan& plan, int64_t rank, const TensorView& out,
             const OperationOptions& options) {
  check_rows("out", out, plan.local_tokens(rank), "the rank's share of the plan's tokens");
  check_rows("grad", grad, plan.total_tokens(), "the plan's tokens");
  shard(grad, plan, rank, out, options);
}

}  // namespace zigzag
