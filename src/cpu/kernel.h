#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "backend.h"
#include "cpu/target.h"

namespace zigzag::cpu {

/// Keys of a document that are worked on together: positions [begin, begin + keys).
struct KeyBlock {
  std::int64_t begin;
  std::int64_t keys;
  std::int64_t end() const { return begin + keys; }
};

/// Keys that one micro-tile covers; ranges of keys are widened to multiples of it.
inline constexpr std::int64_t kTileKeys = 8;

/// A tensor of a call: its rows, wherever they are.
struct TensorRows {
  LentRows own;                      // all rows, where they are in one tensor
  std::span<const LentRows> pieces;  // else, in rising order
  DType dtype = DType::kFloat32;
  std::int64_t row_bytes = 0;  // of one head
  std::span<const LentRows> all() const {
    return pieces.empty() ? std::span<const LentRows>(&own, 1) : pieces;
  }
};

/// What all tasks of a call share. Query head h = kv_head * group + member.
struct Problem {
  TensorRows q, k, v, out, lse;
  TensorRows dout, dq;  // unset in the forward
  Mask mask;
  double scale = 1;
  std::int64_t head_dim = 0;
  std::int64_t kv_heads = 0;
  std::int64_t group = 1;  // query heads of a KV head
  // Scores in units of log2: score_scale * q.k, or with a softcap cap * tanh(score_scale * q.k).
  // Kernels move the sign of score_scale into q.
  float score_scale = 0;
  float cap = 0;
  /// What q.k, or the capped score, is multiplied by to be in units of log2.
  float log2_factor() const {
    return cap != 0 || score_scale == 0 ? 1.0f : score_scale < 0 ? -score_scale : score_scale;
  }
};

/// The query rows of a work item, or those of a document's early and late item where both read the
/// same gathered rows: their rows are neighbours in the shard, and keys loaded once serve both.
struct TaskRows : WorkItem {
  std::int64_t jump_row = std::numeric_limits<std::int64_t>::max();  // the first late row
  std::int64_t jump = 0;                                             // positions left out before it
  std::int64_t rows_left_out = 0;  // likewise of the tensors' rows
  std::int64_t position(std::int64_t row) const {
    return q_position + row + (row >= jump_row ? jump : 0);
  }
  /// The row of q, out, lse, dout and dq.
  std::int64_t tensor_row(std::int64_t row) const {
    return q_begin + row + (row >= jump_row ? rows_left_out : 0);
  }
};

/// The items of a call with early and late ones joined.
std::vector<TaskRows> join_items(std::span<const WorkItem> items);

/// The key positions [first, end) of a document that a query sees of an item.
struct VisibleKeys {
  std::int64_t first = 0;
  std::int64_t end = 0;
};

/// A task: lanes of joined items and one KV head. Lane l of an item is its query row l / group
/// and the KV head's member l % group, so that all query heads of a KV head share its keys and
/// neighbouring lanes see nearly the same keys.
struct RowGroup {
  const TaskRows* item = nullptr;
  std::int64_t kv_head = 0;
  std::int64_t lane_begin = 0;
  std::int64_t lane_end = 0;
  std::int64_t width = 0;          // lanes to make room for: panels end at the jump
  VisibleKeys keys;                // that any of the lanes sees
  VisibleKeys fresh;               // of these, keys that no task of the unit before it sees
  double cost = 0;                 // visible pairs
  std::int64_t unit = 0;           // backward: which gradients of a document and KV head it adds to
  std::int64_t previous = -1;      // backward: the task of the unit that adds before this one
  const RowGroup* next = nullptr;  // the task that the thread begins after this one, where known
};

/// Cuts tasks into batches of little work that one thread runs in order, and sets what comes next
/// in them: the first task of each batch, and the number of tasks.
std::vector<std::int64_t> batches(std::vector<RowGroup>& groups);

/// The keys that one lane of an item sees; first == end when none.
VisibleKeys visible_keys(const Problem& problem, const TaskRows& item, std::int64_t lane);

/// The rows of a call cut into tasks of about `lanes` lanes (at most 1.5 times and a panel), of
/// whole panels of `panel_lanes` where the rows suffice, for KV head 0; heaviest first (ties in
/// item order). All keys are fresh.
std::vector<RowGroup> row_pieces(const Problem& problem, const std::vector<TaskRows>& items,
                                 std::int64_t lanes, std::int64_t panel_lanes);

/// The same for all KV heads, which stand together, with each document's gradients a unit of a
/// head and fresh keys set for tasks that run in this order.
std::vector<RowGroup> row_groups(const Problem& problem, const std::vector<TaskRows>& items,
                                 std::int64_t lanes, std::int64_t panel_lanes);

/// Notes that keys are seen, and gives the longest stretch of them that were not before. `seen` is
/// sorted and has gaps between its ranges.
VisibleKeys see(const VisibleKeys& keys, std::vector<VisibleKeys>& seen);

/// Rows [begin, end) of the gathered rows.
struct RowRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

/// Those of `rows` gathered rows that are fresh to no group: nothing is stored there.
std::vector<RowRange> rows_without_tasks(const std::vector<RowGroup>& groups, std::int64_t rows);

/// Where a document's dK and dV of one KV head are summed: row r of the gathered rows
/// [first_row, ...) at r * stride floats.
struct GradientSums {
  float* dk = nullptr;
  float* dv = nullptr;
  std::int64_t stride_k = 0;
  std::int64_t stride_v = 0;
  std::int64_t first_row = 0;
};

/// Puts the additions of a unit's tasks into one order, block by block, whatever threads run them.
class Turns {
 public:
  explicit Turns(const std::vector<RowGroup>& groups);
  /// Waits until every earlier task of the unit that touches `block` has added it. Tasks add blocks
  /// in ascending order.
  void wait(std::int64_t task, const KeyBlock& block) const;
  /// Says that `task` has added every key before position `key`.
  void done(std::int64_t task, std::int64_t key);

 private:
  const std::vector<RowGroup>& groups_;
  std::vector<std::atomic<std::int64_t>> added_;
};

/// One backward task: which group, where its gradients go, and when.
struct BackwardTask {
  const RowGroup* group = nullptr;
  std::int64_t index = 0;
  GradientSums sums;
  Turns* turns = nullptr;
};

/// The kernels of one target and one element type.
struct KernelSet {
  std::int64_t panel_lanes;     // lanes that are computed together
  std::int64_t backward_lanes;  // lanes of a backward task; fixes the order of dK, dV sums
  /// Bytes of scratch that a task of `lanes` lanes needs.
  std::size_t (*forward_scratch)(std::int64_t head_dim, std::int64_t lanes);
  std::size_t (*backward_scratch)(std::int64_t head_dim, std::int64_t lanes);
  /// Writes out and lse of the group's rows.
  void (*forward)(const Problem& problem, const RowGroup& group, std::byte* scratch);
  /// Writes dq of the group's rows, stores the unit's sums of its fresh keys and adds to the
  /// others.
  void (*backward)(const Problem& problem, const BackwardTask& task, std::byte* scratch);
};

/// Vectorised functions of a target, for tests: y[i] = f(x[i]), and their relative errors.
struct ElementwiseSet {
  double exp2_error;
  double tanh_error;
  void (*exp2)(const float* x, float* y, std::int64_t count);
  void (*tanh)(const float* x, float* y, std::int64_t count);
};

/// Rows of a result, each the sum of the same row of some float32 terms.
struct RowSums {
  std::span<const float* const> terms;  // the first row of each
  std::int64_t term_stride = 0;         // floats from one row of a term to the next
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  DType dtype = DType::kFloat32;  // of the result: float32, float16 or bfloat16
  std::byte* to = nullptr;
  std::int64_t to_stride = 0;  // bytes from one row of the result to the next
};

/// Writes 0 plus the terms, added one after another in float32 and rounded once to nearest even,
/// with the target's vectors.
void sum_rows(Target target, const RowSums& sums);

/// The kernels that `target` runs tensors of `dtype` with.
const KernelSet& kernels_of(Target target, DType dtype);

/// The elementwise functions of a target: those of its bfloat16 kernels where it has its own.
const ElementwiseSet& elementwise_of(Target target);

}  // namespace zigzag::cpu
