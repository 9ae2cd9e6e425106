#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "zigzag/options.h"
#include "zigzag/plan.h"
#include "zigzag/tensor.h"

namespace zigzag {

/// Rows [begin, end) of the gathered K or V where a rank of this process holds them: head h of row
/// r stands at data + (r - begin) * row_stride + h * head_stride. Strides are in bytes.
struct LentRows {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  const std::byte* data = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t head_stride = 0;
};

/// A stage's attention: every work item of a rank in one call.
struct AttendArgs {
  TensorView q;  // [local_tokens, heads, head_dim]
  TensorView k;  // [gathered_tokens, kv_heads, head_dim]; without data when the rows are lent
  TensorView v;  // as k
  std::span<const LentRows> lent_k;  // all rows in rising order; empty: they are in k and v
  std::span<const LentRows> lent_v;
  TensorView out;  // [local_tokens, heads, head_dim]
  TensorView lse;  // [local_tokens, heads] float32
  const Plan* plan = nullptr;
  std::int64_t rank = 0;
  std::span<const WorkItem> items;
  Mask mask;
  double scale = 1;    // multiplies q.k
  double softcap = 0;  // 0: none
  bool deterministic = false;
};

/// A stage's backward. dk and dv are sums over this rank's items only: either float32 partials in
/// the gathered layout or, when the rank is alone, the final gradients in their own type. Every
/// element of dq, dk and dv is written; nothing is read from them.
struct AttendBackwardArgs : AttendArgs {
  TensorView dout;  // [local_tokens, heads, head_dim]
  TensorView dq;    // [local_tokens, heads, head_dim]
  TensorView dk;    // [gathered_tokens, kv_heads, head_dim]
  TensorView dv;    // [gathered_tokens, kv_heads, head_dim]
};

/// Memory that a backend owns; released in the order of its queue.
struct Buffer {
  std::shared_ptr<void> memory;
  std::int64_t bytes = 0;
};

/// An ordered queue of a device: a CUDA stream, or nothing on the CPU, where work is done when the
/// call returns.
struct Queue {
  void* stream = nullptr;
};

/// The few calls that the schedule makes on a device. One object a call of forward or backward.
class Backend {
 public:
  virtual ~Backend() = default;
  /// True when exchange and attention can run at the same time, so that prefetching pays.
  virtual bool overlaps() const = 0;
  /// True when attention reads rows where peers hold them (lent_k, lent_v), for all of them at
  /// once.
  virtual bool reads_lent_rows() const { return false; }
  /// The queue that attention runs on, in order with the caller's work.
  virtual Queue compute_queue() = 0;
  /// The queue that exchanges run on.
  virtual Queue exchange_queue() = 0;
  /// Work given to `later` from here on starts after everything given to `earlier` so far.
  virtual void order(Queue earlier, Queue later) = 0;
  /// Uninitialised memory, aligned to 256 bytes.
  virtual Buffer allocate(std::int64_t bytes) = 0;
  virtual void attend(const AttendArgs& args) = 0;
  virtual void attend_backward(const AttendBackwardArgs& args) = 0;
  /// The same for several ranks, with the same bits.
  virtual void attend_for_all(std::span<const AttendArgs> ranks) {
    for (const AttendArgs& args : ranks) attend(args);
  }
  virtual void attend_backward_for_all(std::span<const AttendBackwardArgs> ranks) {
    for (const AttendBackwardArgs& args : ranks) attend_backward(args);
  }
  /// Called before attend_backward of a stage, while its gather may still be under way, with the
  /// same arguments except that k and v are this rank's own rows [local_tokens, kv_heads, head_dim]
  /// and dk and dv are not set. A backend may give the part of the work here that needs no more;
  /// attend_backward then does the rest. Only for a rank that is not alone.
  virtual void attend_backward_early(const AttendBackwardArgs& /*args*/) {}
};

/// src/cpu: the fast kernels, and their plain twins.
std::unique_ptr<Backend> make_cpu_backend(Kernels kernels);

/// src/cuda, or a stub that throws DeviceError saying how to build it.
std::unique_ptr<Backend> make_cuda_backend(Device device, Kernels kernels, void* stream);

}  // namespace zigzag
