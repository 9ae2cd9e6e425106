#pragma once

#include <cstdint>
#include <span>

#include "zigzag/plan.h"
#include "zigzag/tensor.h"

/// The layout operations row by row: each row's place is looked up on its own.
namespace zigzag::reference {

void shard(const TensorView& x, const Plan& plan, std::int64_t rank, const TensorView& out);
void unshard(std::span<const TensorView> parts, const Plan& plan, const TensorView& out);
void unshard_rank(const TensorView& part, const Plan& plan, std::int64_t rank,
                  const TensorView& out);
void extract(const TensorView& gathered, const Plan& plan,
             std::span<const std::int64_t> prefix_chunks, const TensorView& out);

}  // namespace zigzag::reference
