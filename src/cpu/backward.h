#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "cpu/kernel.h"

namespace zigzag::cpu {

/// Runs backward tasks that add to `sums[unit]`; `groups` are in the order of their additions.
void run_backward(const Problem& problem, std::vector<RowGroup>& groups,
                  const std::unordered_map<std::int64_t, GradientSums>& sums);

/// Where a document's rows stand in k, v and their gradients: those of the key positions `keys`,
/// that of position p in row first_row + p.
struct DocumentRows {
  std::int64_t first_row = 0;
  VisibleKeys keys;
};

/// The backward of a whole pack: `items` of every rank, whose rows are the pack's. dk and dv are
/// written in their type, rounded once from the float32 sums: each rank's in the order of its
/// tasks, and these in rank order. Sums are held for a few documents and KV heads at a time.
void backward_in_waves(const Problem& problem, const std::vector<DocumentRows>& documents,
                       const std::vector<std::vector<TaskRows>>& items, const TensorRows& dk,
                       const TensorRows& dv);

}  // namespace zigzag::cpu
