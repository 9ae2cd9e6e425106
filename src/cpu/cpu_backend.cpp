#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
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
std::int64_t forward_lanes(const Problem& problem, const KernelSet& kernels) {
  std::int64_t lanes = 0;
  for (const WorkItem& item : problem.args->items) lanes += item.q_count * problem.group;
  lanes *= problem.args->k.shape[1];
  constexpr std::int64_t kTasksPerThread = 4;
  constexpr std::int64_t kMostPanels = 16;
  const std::int64_t threads = num_threads();
  const std::int64_t panels =
      threads == 1 ? kMostPanels : lanes / (kernels.panel_lanes * kTasksPerThread * threads);
  return kernels.panel_lanes * std::clamp<std::int64_t>(panels, 2, kMostPanels);
}

struct Rows {
  std::int64_t begin = std::numeric_limits<std::int64_t>::max();
  std::int64_t end = 0;
};

// The gathered rows of each document that has work.
std::unordered_map<std::int64_t, Rows> document_rows(const AttendArgs& args) {
  std::unordered_map<std::int64_t, Rows> documents;
  for (const WorkItem& item : args.items) {
    Rows& rows = documents[item.document];
    rows.begin = std::min(rows.begin, item.k_begin);
    rows.end = std::max(rows.end, item.k_begin + item.k_count);
  }
  return documents;
}

void set_zero(const TensorView& x) {
  const std::int64_t bytes = x.shape[2] * item_size(x.dtype);
  const bool head_major = x.strides[0] == x.shape[2];
  parallel_ranges(x.shape[0], 256, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t head = 0; head_major && head < x.shape[1]; ++head) {
      std::byte* at = row_pointer(x, begin, head);
      std::fill(at, at + (end - begin) * bytes, std::byte{0});
    }
    for (std::int64_t row = begin; !head_major && row < end; ++row) {
      for (std::int64_t head = 0; head < x.shape[1]; ++head) {
        std::byte* at = row_pointer(x, row, head);
        std::fill(at, at + bytes, std::byte{0});
      }
    }
  });
}

// Runs tasks that add to `sums[unit]`; `groups` are in the order of their additions.
void run_backward(const Problem& problem, const KernelSet& kernels, std::vector<RowGroup>& groups,
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
    std::byte* scratch =
        thread_scratch(kernels.backward_scratch(problem.head_dim, groups[i].width));
    const BackwardTask task{&groups[i], i, sums.at(groups[i].unit), &turns};
    kernels.backward(problem, task, scratch);
  });
}

void round_rows(Target target, const float* from, std::int64_t rows, std::int64_t first_row,
                std::int64_t head, const TensorView& to) {
  for (std::int64_t row = 0; row < rows; ++row) {
    round_row(target, to.dtype, from + row * to.shape[2], to.shape[2],
              row_pointer(to, first_row + row, head));
  }
}

// Gradients in a 16-bit type: sums of a few documents and heads at a time, rounded once.
void backward_rounded(const Problem& problem, const KernelSet& kernels,
                      const std::vector<RowGroup>& groups) {
  const AttendBackwardArgs& args = *problem.backward;
  const std::int64_t head_dim = problem.head_dim;
  const std::int64_t kv_heads = args.k.shape[1];
  const std::unordered_map<std::int64_t, Rows> documents = document_rows(args);
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
      const Rows& rows = documents.at(group.item->document);
      const std::int64_t floats = 2 * (rows.end - rows.begin) * head_dim;
      if (waves.empty() || (waves.back().floats + floats) * std::int64_t{sizeof(float)} > kSumBytes)
        waves.emplace_back();
      entry->second = waves.size() - 1;
      waves.back().floats += floats;
      waves.back().units.push_back(group.unit);
    }
    waves[entry->second].groups.push_back(group);
  }
  const Target target = selected_target();
  for (Wave& wave : waves) {
    const std::shared_ptr<void> memory = pooled_pages(wave.floats * std::int64_t{sizeof(float)});
    auto* const floats = static_cast<float*>(memory.get());
    std::unordered_map<std::int64_t, GradientSums> sums;
    float* at = floats;
    for (const std::int64_t unit : wave.units) {
      const Rows& rows = documents.at(unit / kv_heads);
      const std::int64_t count = (rows.end - rows.begin) * head_dim;
      sums[unit] = {at, at + count, head_dim, head_dim, rows.begin};
      at += 2 * count;
    }
    parallel_ranges(wave.floats, 1 << 18, [&](std::int64_t begin, std::int64_t end) {
      std::fill(floats + begin, floats + end, 0.0f);
    });
    run_backward(problem, kernels, wave.groups, sums);
    parallel_for(std::ssize(wave.units), [&](std::int64_t i) {
      const std::int64_t unit = wave.units[i];
      const Rows& rows = documents.at(unit / kv_heads);
      const GradientSums& sum = sums.at(unit);
      round_rows(target, sum.dk, rows.end - rows.begin, rows.begin, unit % kv_heads, args.dk);
      round_rows(target, sum.dv, rows.end - rows.begin, rows.begin, unit % kv_heads, args.dv);
    });
  }
}

}  // namespace

Buffer CpuBackend::allocate(std::int64_t bytes) { return {pooled_pages(bytes), bytes}; }

void FusedBackend::attend(const AttendArgs& args) {
  const KernelSet& kernels = kernels_of(selected_target(), args.q.dtype);
  const Problem problem = make_problem(args);
  const std::vector<TaskRows> items = join_items(args.items);
  const std::vector<RowGroup> groups =
      row_groups(problem, items, forward_lanes(problem, kernels), kernels.panel_lanes);
  parallel_for(std::ssize(groups), [&](std::int64_t i) {
    std::byte* scratch = thread_scratch(kernels.forward_scratch(problem.head_dim, groups[i].width));
    kernels.forward(problem, groups[i], scratch);
  });
}

void FusedBackend::attend_backward(const AttendBackwardArgs& args) {
  const KernelSet& kernels = kernels_of(selected_target(), args.q.dtype);
  Problem problem = make_problem(args);
  problem.backward = &args;
  const std::vector<TaskRows> items = join_items(args.items);
  std::vector<RowGroup> groups =
      row_groups(problem, items, kernels.backward_lanes, kernels.panel_lanes);
  set_zero(args.dk);
  set_zero(args.dv);
  if (args.dk.dtype != DType::kFloat32) return backward_rounded(problem, kernels, groups);
  std::unordered_map<std::int64_t, GradientSums> sums;
  for (const RowGroup& group : groups) {
    sums[group.unit] = {args.dk.as<float>() + group.kv_head * args.dk.strides[1],
                        args.dv.as<float>() + group.kv_head * args.dv.strides[1],
                        args.dk.strides[0], args.dv.strides[0], 0};
  }
  run_backward(problem, kernels, groups, sums);
}

}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(Kernels kernels) {
  if (kernels == Kernels::kReference) return std::make_unique<cpu::ReferenceBackend>();
  return std::make_unique<cpu::FusedBackend>();
}

}  // namespace zigzag
