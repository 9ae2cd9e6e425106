#include "lent_attention.h"

#include <cstddef>
#include <memory>
#include <vector>

#include "schedule_tables.h"

namespace zigzag {

namespace {

using std::int64_t;

/// The ranks' parts of a tensor, in token order.
std::vector<LentRows> lent_rows(const Plan& plan, std::span<const CallTensors> ranks,
                                TensorView CallTensors::*which) {
  std::vector<LentRows> parts;
  for (int64_t document = 0; document < plan.num_documents(); ++document) {
    const int64_t first = plan.cu_seqlens()[static_cast<std::size_t>(document)];
    for (int64_t index = 0; index < plan.num_chunks(); ++index) {
      const Chunk chunk = plan.chunk(document, index);
      if (chunk.begin == chunk.end) continue;
      const TensorView& x = ranks[static_cast<std::size_t>(plan.chunk_owner(index))].*which;
      const int64_t item = item_size(x.dtype);
      parts.push_back({first + chunk.begin, first + chunk.end,
                       static_cast<std::byte*>(x.data) + chunk.local_row * x.strides[0] * item,
                       x.strides[0] * item, x.strides[1] * item});
    }
  }
  return parts;
}

void fill(AttendAllArgs& args, std::span<const CallTensors> ranks, const Plan& plan,
          const AttentionOptions& options, const Problem& problem) {
  args.q = lent_rows(plan, ranks, &CallTensors::q);
  args.k = lent_rows(plan, ranks, &CallTensors::k);
  args.v = lent_rows(plan, ranks, &CallTensors::v);
  args.out = lent_rows(plan, ranks, &CallTensors::out);
  args.lse = lent_rows(plan, ranks, &CallTensors::lse);
  args.plan = &plan;
  args.dtype = ranks.front().q.dtype;
  args.heads = problem.heads;
  args.kv_heads = problem.kv_heads;
  args.head_dim = problem.head_dim;
  args.mask = options.mask;
  args.scale = problem.scale;
  args.softcap = options.softcap;
}

}  // namespace

void forward_for_all(std::span<const CallTensors> ranks, const Plan& plan,
                     const AttentionOptions& options, const Problem& problem, Backend& backend) {
  AttendAllArgs args;
  fill(args, ranks, plan, options, problem);
  backend.attend_all(args);
}

void backward_for_all(std::span<const CallTensors> ranks, const Plan& plan,
                      const AttentionOptions& options, const Problem& problem, Backend& backend) {
  AttendBackwardAllArgs args;
  fill(args, ranks, plan, options, problem);
  args.dout = lent_rows(plan, ranks, &CallTensors::dout);
  args.dq = lent_rows(plan, ranks, &CallTensors::dq);
  args.dk = lent_rows(plan, ranks, &CallTensors::dk);
  args.dv = lent_rows(plan, ranks, &CallTensors::dv);
  std::vector<std::shared_ptr<const ScheduleTables>> tables;
  for (int64_t rank = 0; rank < plan.world_size(); ++rank) {
    tables.push_back(schedule_tables(plan, rank, options.mask));
    args.items.emplace_back(tables.back()->items);
  }
  backend.attend_backward_all(args);
}

}  // namespace zigzag
