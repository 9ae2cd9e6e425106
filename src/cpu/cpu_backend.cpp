#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <unordered_map>
#include <vector>

#include "cpu/backward.h"
#include "cpu/kernel.h"
#include "cpu/page_pool.h"
#include "cpu/parallel.h"
#include "cpu/target.h"
#include "zigzag/system.h"

namespace zigzag {
namespace cpu {
namespace {

TensorRows rows_of(const TensorView& x) {
  const std::int64_t item = item_size(x.dtype);
  TensorRows rows;
  rows.own = {0, x.shape[0], static_cast<std::byte*>(x.data), x.strides[0] * item,
              x.strides[1] * item};
  rows.dtype = x.dtype;
  rows.row_bytes = x.shape.size() < 3 ? item : x.shape[2] * item;
  return rows;
}

void set_scores(double scale, double softcap, Problem& problem) {
  constexpr double kLog2E = 1.4426950408889634;
  const bool capped = softcap != 0;
  problem.scale = scale;
  problem.score_scale = static_cast<float>(capped ? scale / softcap : scale * kLog2E);
  problem.cap = capped ? static_cast<float>(softcap * kLog2E) : 0.0f;
}

Problem make_problem(const AttendArgs& args) {
  Problem problem;
  problem.q = rows_of(args.q);
  problem.k = rows_of(args.k);
  problem.v = rows_of(args.v);
  problem.out = rows_of(args.out);
  problem.lse = rows_of(args.lse);
  problem.mask = args.mask;
  problem.head_dim = args.q.shape[2];
  problem.kv_heads = args.k.shape[1];
  problem.group = problem.kv_heads == 0 ? 1 : args.q.shape[1] / problem.kv_heads;
  set_scores(args.scale, args.softcap, problem);
  return problem;
}

Problem make_problem(const AttendAllArgs& args) {
  const auto rows = [&args](std::span<const LentRows> pieces) {
    TensorRows x;
    x.pieces = pieces;
    x.dtype = args.dtype;
    x.row_bytes = args.head_dim * item_size(args.dtype);
    return x;
  };
  Problem problem;
  problem.q = rows(args.q);
  problem.k = rows(args.k);
  problem.v = rows(args.v);
  problem.out = rows(args.out);
  problem.lse = rows(args.lse);
  problem.mask = args.mask;
  problem.head_dim = args.head_dim;
  problem.kv_heads = args.kv_heads;
  problem.group = args.kv_heads == 0 ? 1 : args.heads / args.kv_heads;
  set_scores(args.scale, args.softcap, problem);
  return problem;
}

// Lanes of a forward task: many, so that each block of keys is loaded for many rows, but at least
// several tasks a thread. The results do not depend on it.
std::int64_t forward_lanes(const Problem& problem, const std::vector<TaskRows>& items,
                           const KernelSet& kernels) {
  std::int64_t lanes = 0;
  for (const TaskRows& item : items) lanes += item.q_count * problem.group * problem.kv_heads;
  constexpr std::int64_t kTasksPerThread = 4;
  constexpr std::int64_t kMostPanels = 16;
  const std::int64_t threads = num_threads();
  const std::int64_t panels =
      threads == 1 ? kMostPanels : lanes / (kernels.panel_lanes * kTasksPerThread * threads);
  return kernels.panel_lanes * std::clamp<std::int64_t>(panels, 2, kMostPanels);
}

void run_forward(const Problem& problem, const std::vector<TaskRows>& items) {
  const KernelSet& kernels = kernels_of(selected_target(), problem.q.dtype);
  std::vector<RowGroup> groups =
      row_groups(problem, items, forward_lanes(problem, items, kernels), kernels.panel_lanes);
  const std::vector<std::int64_t> begins = batches(groups);
  parallel_for(std::ssize(begins) - 1, [&](std::int64_t batch) {
    for (std::int64_t i = begins[batch]; i < begins[batch + 1]; ++i) {
      const RowGroup& group = groups[i];
      std::byte* scratch = thread_scratch(kernels.forward_scratch(problem.head_dim, group.width));
      kernels.forward(problem, group, scratch);
    }
  });
}

// Every document of a pack as one item, its rows counted in tokens.
std::vector<TaskRows> whole_documents(const Plan& plan) {
  std::vector<TaskRows> items;
  for (std::int64_t document = 0; document < plan.num_documents(); ++document) {
    const std::int64_t first = plan.cu_seqlens()[static_cast<std::size_t>(document)];
    const std::int64_t length = plan.document_length(document);
    items.push_back({WorkItem{.document = document,
                              .q_begin = first,
                              .q_count = length,
                              .k_begin = first,
                              .k_count = length,
                              .q_position = 0,
                              .k_position = 0,
                              .document_length = length}});
  }
  return items;
}

// A rank's joined items with their rows counted in tokens.
std::vector<TaskRows> in_tokens(const Plan& plan, std::vector<TaskRows> items) {
  for (TaskRows& item : items) {
    const std::int64_t first = plan.cu_seqlens()[static_cast<std::size_t>(item.document)];
    item.q_begin = first + item.q_position;
    item.k_begin = first + item.k_position;
    item.rows_left_out = item.jump;
  }
  return items;
}

// The rows of a rank's documents in its gathered layout.
std::vector<DocumentRows> document_rows(const AttendArgs& args) {
  std::vector<DocumentRows> documents(static_cast<std::size_t>(args.plan->num_documents()));
  for (const WorkItem& item : args.items) {
    DocumentRows& rows = documents[static_cast<std::size_t>(item.document)];
    const bool is_new = rows.keys.first == rows.keys.end;
    const std::int64_t end = item.k_position + item.k_count;
    rows.first_row = item.k_begin - item.k_position;
    rows.keys.first = is_new ? item.k_position : std::min(rows.keys.first, item.k_position);
    rows.keys.end = is_new ? end : std::max(rows.keys.end, end);
  }
  return documents;
}

void set_zero(const TensorView& x, const RowRange& rows) {
  const std::int64_t item = item_size(x.dtype);
  parallel_ranges(rows.end - rows.begin, 256, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t head = 0; head < x.shape[1]; ++head) {
      for (std::int64_t row = rows.begin + begin; row < rows.begin + end; ++row) {
        std::byte* at = x.as<std::byte>() + (row * x.strides[0] + head * x.strides[1]) * item;
        std::fill(at, at + x.shape[2] * item, std::byte{0});
      }
    }
  });
}

}  // namespace

Buffer CpuBackend::allocate(std::int64_t bytes, Queue /*queue*/) {
  return {pooled_pages(bytes), bytes};
}

void FusedBackend::attend(const AttendArgs& args) {
  run_forward(make_problem(args), join_items(args.items));
}

void FusedBackend::attend_all(const AttendAllArgs& args) {
  run_forward(make_problem(args), whole_documents(*args.plan));
}

void FusedBackend::attend_backward(const AttendBackwardArgs& args) {
  Problem problem = make_problem(args);
  problem.dout = rows_of(args.dout);
  problem.dq = rows_of(args.dq);
  if (args.dk.dtype != DType::kFloat32) {
    backward_in_waves(problem, document_rows(args), {join_items(args.items)}, rows_of(args.dk),
                      rows_of(args.dv));
    return;
  }
  const KernelSet& kernels = kernels_of(selected_target(), problem.q.dtype);
  const std::vector<TaskRows> items = join_items(args.items);
  std::vector<RowGroup> groups =
      row_groups(problem, items, kernels.backward_lanes, kernels.panel_lanes);
  for (const RowRange& rows : rows_without_tasks(groups, args.dk.shape[0])) {
    set_zero(args.dk, rows);
    set_zero(args.dv, rows);
  }
  std::unordered_map<std::int64_t, GradientSums> sums;
  for (const RowGroup& group : groups) {
    sums[group.unit] = {args.dk.as<float>() + group.kv_head * args.dk.strides[1],
                        args.dv.as<float>() + group.kv_head * args.dv.strides[1],
                        args.dk.strides[0], args.dv.strides[0], 0};
  }
  run_backward(problem, groups, sums);
}

void FusedBackend::attend_backward_all(const AttendBackwardAllArgs& args) {
  Problem problem = make_problem(args);
  problem.dout = problem.dq = problem.q;
  problem.dout.pieces = args.dout;
  problem.dq.pieces = args.dq;
  TensorRows dk = problem.k;
  TensorRows dv = problem.k;
  dk.pieces = args.dk;
  dv.pieces = args.dv;
  const std::span<const std::int64_t> cu_seqlens = args.plan->cu_seqlens();
  std::vector<DocumentRows> documents;
  for (std::size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
    documents.push_back({cu_seqlens[i], {0, cu_seqlens[i + 1] - cu_seqlens[i]}});
  }
  std::vector<std::vector<TaskRows>> items;
  for (const std::span<const WorkItem>& rank : args.items) {
    items.push_back(in_tokens(*args.plan, join_items(rank)));
  }
  backward_in_waves(problem, documents, items, dk, dv);
}

}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(Kernels kernels) {
  if (kernels == Kernels::kReference) return std::make_unique<cpu::ReferenceBackend>();
  return std::make_unique<cpu::FusedBackend>();
}

}  // namespace zigzag
