#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <unordered_map>

#include "cpu/kernel.h"
#include "cpu/page_pool.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"
#include "cpu/target.h"
#include "zigzag/system.h"

namespace zigzag {
namespace cpu {
namespace {

// Float32 sums of 16-bit gradients held at a time, unless one document and KV head needs more.
constexpr std::int64_t kSumBytes = std::int64_t{40} << 20;

KeyRows key_rows(const TensorView& x, std::span<const LentRows> lent) {
  const std::int64_t item = item_size(x.dtype);
  KeyRows rows;
  rows.own = {0, x.shape[0], static_cast<const std::byte*>(x.data), x.strides[0] * item,
              x.strides[1] * item};
  rows.pieces = lent;
  rows.dtype = x.dtype;
  rows.row_bytes = x.shape[2] * item;
  return rows;
}

Problem make_problem(const AttendArgs& args) {
  constexpr double kLog2E = 1.4426950408889634;
  Problem problem;
  problem.args = &args;
  problem.k = key_rows(args.k, args.lent_k);
  problem.v = key_rows(args.v, args.lent_v);
  problem.head_dim = args.q.shape[2];
  problem.group = args.k.shape[1] == 0 ? 1 : args.q.shape[1] / args.k.shape[1];
  const bool capped = args.softcap != 0;
  problem.score_scale =
      static_cast<float>(capped ? args.scale / args.softcap : args.scale * kLog2E);
  problem.cap = capped ? static_cast<float>(args.softcap * kLog2E) : 0.0f;
  return problem;
}

// Lanes of a forward task: many, so that each block of keys is loaded for many rows, but at least
// several tasks a thread. The results do not depend on it.
std::int64_t forward_lanes(std::span<const AttendArgs> ranks, const KernelSet& kernels) {
  std::int64_t lanes = 0;
  for (const AttendArgs& args : ranks) {
    for (const WorkItem& item : args.items) lanes += item.q_count * args.q.shape[1];
  }
  constexpr std::int64_t kTasksPerThread = 4;
  constexpr std::int64_t kMostPanels = 16;
  const std::int64_t threads = num_threads();
  const std::int64_t panels =
      threads == 1 ? kMostPanels : lanes / (kernels.panel_lanes * kTasksPerThread * threads);
  return kernels.panel_lanes * std::clamp<std::int64_t>(panels, 2, kMostPanels);
}

// The gathered rows of each document that has work.
std::unordered_map<std::int64_t, RowRange> document_rows(const AttendArgs& args) {
  std::unordered_map<std::int64_t, RowRange> documents;
  for (const WorkItem& item : args.items) {
    const auto [entry, is_new] =
        documents.try_emplace(item.document, RowRange{item.k_begin, item.k_begin + item.k_count});
    if (is_new) continue;
    entry->second.begin = std::min(entry->second.begin, item.k_begin);
    entry->second.end = std::max(entry->second.end, item.k_begin + item.k_count);
  }
  return documents;
}

void set_zero(const TensorView& x, const RowRange& rows) {
  const std::int64_t bytes = x.shape[2] * item_size(x.dtype);
  parallel_ranges(rows.end - rows.begin, 256, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t head = 0; head < x.shape[1]; ++head) {
      for (std::int64_t row = rows.begin + begin; row < rows.begin + end; ++row) {
        std::byte* at = row_pointer(x, row, head);
        std::fill(at, at + bytes, std::byte{0});
      }
    }
  });
}

// The tasks of some ranks' calls, heaviest first, and what they point to.
struct Tasks {
  template <typename Args>
  Tasks(std::span<const Args> ranks, std::int64_t lanes, std::int64_t panel_lanes) {
    problems.reserve(ranks.size());
    items.reserve(ranks.size());
    std::int64_t first_unit = 0;
    for (const Args& args : ranks) {
      const Problem& problem = problems.emplace_back(make_problem(args));
      items.push_back(join_items(args.items));
      std::vector<RowGroup> more = row_groups(problem, items.back(), lanes, panel_lanes);
      for (RowGroup& group : more) group.unit += first_unit;
      first_unit += args.plan->num_documents() * args.k.shape[1];
      if constexpr (std::is_same_v<Args, AttendBackwardArgs>) {
        problems.back().backward = &args;
        untouched.push_back(rows_without_tasks(more, args.dk.shape[0]));
        for (const RowRange& rows : untouched.back()) {
          set_zero(args.dk, rows);
          set_zero(args.dv, rows);
        }
      }
      groups.insert(groups.end(), more.begin(), more.end());
    }
    // Stable: the order of a rank's own tasks, which is that of its sums, stays.
    std::stable_sort(groups.begin(), groups.end(),
                     [](const RowGroup& a, const RowGroup& b) { return a.cost > b.cost; });
  }
  std::vector<Problem> problems;
  std::vector<std::vector<TaskRows>> items;
  std::vector<RowGroup> groups;
  std::vector<std::vector<RowRange>> untouched;  // backward: gathered rows without tasks, set to 0
};

// Runs tasks that add to `sums[unit]`; `groups` are in the order of their additions.
void run_backward(const KernelSet& kernels, std::vector<RowGroup>& groups,
                  const std::unordered_map<std::int64_t, GradientSums>& sums) {
  std::unordered_map<std::int64_t, std::int64_t> last;
  for (std::int64_t i = 0; i < std::ssize(groups); ++i) {
    const auto [entry, is_new] = last.try_emplace(groups[i].unit, i);
    groups[i].previous = is_new ? -1 : entry->second;
    entry->second = i;
  }
  Turns turns(groups);
  parallel_for(std::ssize(groups), [&](std::int64_t i) {
    // Whatever happens, the tasks that wait for this one go on.
    struct Release {
      Turns& turns;
      std::int64_t task;
      ~Release() { turns.done(task, std::numeric_limits<std::int64_t>::max()); }
    } release{turns, i};
    const RowGroup& group = groups[i];
    const std::int64_t head_dim = group.problem->head_dim;
    std::byte* scratch = thread_scratch(kernels.backward_scratch(head_dim, group.width));
    const BackwardTask task{&group, i, sums.at(group.unit), &turns};
    kernels.backward(*group.problem, task, scratch);
  });
}

// Rounds a unit's sums of dK or dV, of `rows`, once.
void round_rows(const float* from, const RowRange& rows, std::int64_t head, const TensorView& to) {
  RowSums sums;
  sums.terms = {&from, 1};
  sums.term_stride = to.shape[2];
  sums.rows = rows.end - rows.begin;
  sums.columns = to.shape[2];
  sums.dtype = to.dtype;
  sums.to = row_pointer(to, rows.begin, head);
  sums.to_stride = to.strides[0] * item_size(to.dtype);
  sum_rows(selected_target(), sums);
}

// Clears the rows of a unit's sums that no task stores to.
void set_zero(const GradientSums& sum, const RowRange& unit_rows,
              const std::vector<RowRange>& rows_without_tasks) {
  for (const RowRange& rows : rows_without_tasks) {
    const std::int64_t begin = std::max(rows.begin, unit_rows.begin) - sum.first_row;
    const std::int64_t end = std::min(rows.end, unit_rows.end) - sum.first_row;
    if (begin >= end) continue;
    std::fill(sum.dk + begin * sum.stride_k, sum.dk + end * sum.stride_k, 0.0f);
    std::fill(sum.dv + begin * sum.stride_v, sum.dv + end * sum.stride_v, 0.0f);
  }
}

// Gradients in a 16-bit type: sums of a few documents and heads at a time, rounded once.
void backward_rounded(const Problem& problem, const KernelSet& kernels,
                      const std::vector<RowGroup>& groups,
                      const std::vector<RowRange>& rows_without_tasks) {
  const AttendBackwardArgs& args = *problem.backward;
  const std::int64_t head_dim = problem.head_dim;
  const std::int64_t kv_heads = args.k.shape[1];
  const std::unordered_map<std::int64_t, RowRange> documents = document_rows(args);
  struct Wave {
    std::int64_t floats = 0;
    std::vector<std::int64_t> units;
    std::vector<RowGroup> groups;
  };
  std::vector<Wave> waves;
  std::unordered_map<std::int64_t, std::size_t> wave_of_unit;
  for (const RowGroup& group : groups) {
    const auto [entry, is_new] = wave_of_unit.try_emplace(group.unit, waves.size());
    if (is_new) {
      const RowRange& rows = documents.at(group.item->document);
      const std::int64_t floats = 2 * (rows.end - rows.begin) * head_dim;
      if (waves.empty() || (waves.back().floats + floats) * std::int64_t{sizeof(float)} > kSumBytes)
        waves.emplace_back();
      entry->second = waves.size() - 1;
      waves.back().floats += floats;
      waves.back().units.push_back(group.unit);
    }
    waves[entry->second].groups.push_back(group);
  }
  for (Wave& wave : waves) {
    const std::shared_ptr<void> memory = pooled_pages(wave.floats * std::int64_t{sizeof(float)});
    std::unordered_map<std::int64_t, GradientSums> sums;
    auto* at = static_cast<float*>(memory.get());
    for (const std::int64_t unit : wave.units) {
      const RowRange& rows = documents.at(unit / kv_heads);
      const std::int64_t count = (rows.end - rows.begin) * head_dim;
      sums[unit] = {at, at + count, head_dim, head_dim, rows.begin};
      set_zero(sums[unit], rows, rows_without_tasks);
      at += 2 * count;
    }
    run_backward(kernels, wave.groups, sums);
    parallel_for(std::ssize(wave.units), [&](std::int64_t i) {
      const std::int64_t unit = wave.units[i];
      const RowRange& rows = documents.at(unit / kv_heads);
      const GradientSums& sum = sums.at(unit);
      round_rows(sum.dk, rows, unit % kv_heads, args.dk);
      round_rows(sum.dv, rows, unit % kv_heads, args.dv);
    });
  }
}

}  // namespace

Buffer CpuBackend::allocate(std::int64_t bytes) { return {pooled_pages(bytes), bytes}; }

void FusedBackend::attend_for_all(std::span<const AttendArgs> ranks) {
  const KernelSet& kernels = kernels_of(selected_target(), ranks.front().q.dtype);
  const std::int64_t lanes = forward_lanes(ranks, kernels);
  const Tasks tasks(ranks, lanes, kernels.panel_lanes);
  parallel_for(std::ssize(tasks.groups), [&](std::int64_t i) {
    const RowGroup& group = tasks.groups[i];
    const std::int64_t head_dim = group.problem->head_dim;
    std::byte* scratch = thread_scratch(kernels.forward_scratch(head_dim, group.width));
    kernels.forward(*group.problem, group, scratch);
  });
}

void FusedBackend::attend_backward_for_all(std::span<const AttendBackwardArgs> ranks) {
  const KernelSet& kernels = kernels_of(selected_target(), ranks.front().q.dtype);
  Tasks tasks(ranks, kernels.backward_lanes, kernels.panel_lanes);
  if (ranks.front().dk.dtype != DType::kFloat32) {
    // A rank alone: only its gradients are rounded here.
    return backward_rounded(tasks.problems.front(), kernels, tasks.groups, tasks.untouched.front());
  }
  std::unordered_map<std::int64_t, GradientSums> sums;
  for (const RowGroup& group : tasks.groups) {
    const AttendBackwardArgs& args = *group.problem->backward;
    sums[group.unit] = {args.dk.as<float>() + group.kv_head * args.dk.strides[1],
                        args.dv.as<float>() + group.kv_head * args.dv.strides[1],
                        args.dk.strides[0], args.dv.strides[0], 0};
  }
  run_backward(kernels, tasks.groups, sums);
}

}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(Kernels kernels) {
  if (kernels == Kernels::kReference) return std::make_unique<cpu::ReferenceBackend>();
  return std::make_unique<cpu::FusedBackend>();
}

}  // namespace zigzag
