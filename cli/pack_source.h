#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "io/generate.h"
#include "pack_options.h"
#include "tensor_memory.h"
#include "zigzag/plan.h"

namespace zigzag::cli {

/// Consecutive tokens of one document that are consecutive rows of a rank's shard.
struct Run {
  std::int64_t token;     // first global token
  std::int64_t position;  // its position in the document
  std::int64_t document;
  std::int64_t row;  // its local row
  std::int64_t rows;
};

/// The rows of a rank's shard as runs, in their order.
std::vector<Run> rank_runs(const Plan& plan, std::int64_t rank);

/// Where q, k, v and dout of a pack come from. Safe to read from many threads.
class PackSource {
 public:
  virtual ~PackSource() = default;

  const std::vector<std::int64_t>& cu_seqlens() const { return cu_seqlens_; }
  /// Heads, KV heads, head_dim and type of the tensors.
  const io::ModelShape& shape() const { return shape_; }
  DType dtype() const { return dtype_; }
  /// True when dout comes from a file; otherwise it can be drawn from the seed.
  bool has_dout() const { return has_dout_; }
  /// True when the pack asks for a backward unless told otherwise.
  bool wants_backward() const { return wants_backward_; }
  const std::vector<std::string>& notes() const { return notes_; }

  /// Bytes of q, k, v or dout for a run, end to end.
  virtual void fill(io::Stream stream, const Run& run, void* out) const = 0;

  /// A fingerprint of the bytes that were or will be read from files, for ranks to compare; of each
  /// tensor above 64 MiB, 64 pieces of 1 MiB. 0 when everything is drawn.
  virtual std::uint64_t contents() const { return 0; }

  /// The rows of one of the tensors that these runs name -> [rows, heads or kv_heads, head_dim] on
  /// the CPU.
  TensorMemory load(io::Stream stream, const std::vector<Run>& runs) const;

 protected:
  std::vector<std::int64_t> cu_seqlens_;
  io::ModelShape shape_;
  DType dtype_ = DType::kFloat32;
  bool has_dout_ = false;
  bool wants_backward_ = true;
  std::vector<std::string> notes_;
};

/// Opens what the options name. Throws InvalidArgument when files are missing or malformed, or
/// when the options contradict them.
std::unique_ptr<PackSource> open_source(const PackOptions& pack, const ShapeOptions& shape);

}  // namespace zigzag::cli
