#pragma once

#include <cstdint>
#include <span>

#include "zigzag/options.h"
#include "zigzag/plan.h"
#include "zigzag/tensor.h"

namespace zigzag {

/// Copies a rank's zigzag rows: x [tokens, ...] of the whole pack -> out [local_tokens, ...]. Any
/// type; strides are free. Throws InvalidArgument when shapes, types or devices do not fit.
void shard(const TensorView& x, const Plan& plan, std::int64_t rank, const TensorView& out,
           const OperationOptions& options = {});

/// The inverse: parts[r] [local_tokens(r), ...] of every rank -> out [tokens, ...].
void unshard(std::span<const TensorView> parts, const Plan& plan, const TensorView& out,
             const OperationOptions& options = {});

/// Writes one rank's rows to their places in the whole pack: part [local_tokens, ...] ->
/// out [tokens, ...]; other rows of out stay as they are.
void unshard_rank(const TensorView& part, const Plan& plan, std::int64_t rank,
                  const TensorView& out, const OperationOptions& options = {});

/// The prefix of every document, in sequence order, out of a rank-ordered gathered buffer.
/// gathered [tokens, ...]: the shards of ranks 0..W-1 end to end, as a plain all-gather leaves
/// them. prefix_chunks [documents]: how many chunks of each document, 0..2W. out [rows, ...]: the
/// prefixes end to end, rows = extracted_tokens(plan, prefix_chunks).
void extract(const TensorView& gathered, const Plan& plan,
             std::span<const std::int64_t> prefix_chunks, const TensorView& out,
             const OperationOptions& options = {});

/// Rows that extract writes for these prefixes.
std::int64_t extracted_tokens(const Plan& plan, std::span<const std::int64_t> prefix_chunks);

/// The rows of a sequence-ordered gradient that belong to `rank`: grad [tokens, ...] ->
/// out [local_tokens, ...]. The inverse of extract for one rank; the same rows as shard.
void scatter(const TensorView& grad, const Plan& plan, std::int64_t rank, const TensorView& out,
             const OperationOptions& options = {});

}  // namespace zigzag
