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

/// A stage's attention: every work item of a rank in one call.
struct AttendArgs {
  TensorView q;    // [local_tokens, heads, head_dim]
  TensorView k;    // [gathered_tokens, kv_heads, head_dim]
  TensorView v;    // [gathered_tokens, kv_heads, head_dim]
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

/// A gather whose rows attention fetches itself: K and V of every rank can be read until the work
/// of the call is done.
struct OpenGather {
  TensorView own_k, own_v;        // this rank's rows [local_tokens, kv_heads, head_dim]
  std::vector<const void*> k, v;  // of each rank: its rows without gaps, for this device to read
  // By rank: what of its rows (source) goes to which gathered rows (destination).
  std::span<const std::vector<Segment>> receives;
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

/// Tokens [begin, end) of a tensor of the whole pack where a rank of this process holds them: head
/// h of token t stands at data + (t - begin) * row_stride + h * head_stride. Strides are in bytes.
struct LentRows {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::byte* data = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t head_stride = 0;
};

/// Attention of all ranks at once: their tensors as parts of the pack's, in token order.
struct AttendAllArgs {
  std::vector<LentRows> q, k, v, out, lse;
  const Plan* plan = nullptr;
  DType dtype = DType::kFloat32;  // of all but lse, which is float32
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  Mask mask;
  double scale = 1;    // multiplies q.k
  double softcap = 0;  // 0: none
};

/// The backward of all ranks at once. dk and dv are the gradients in the tensors' type: sums of
/// the ranks' partials in rank order.
struct AttendBackwardAllArgs : AttendAllArgs {
  std::vector<LentRows> dout, dq, dk, dv;
  std::vector<std::span<const WorkItem>> items;  // of each rank
};

/// Memory that a backend owns; released in the order of the queue that it was allocated for.
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
  /// True when there are attend_all and attend_backward_all.
  virtual bool attends_all() const { return false; }
  /// The queue that attention runs on, in order with the caller's work.
  virtual Queue compute_queue() = 0;
  /// The queue that exchanges run on.
  virtual Queue exchange_queue() = 0;
  /// Work given to `later` from here on starts after everything given to `earlier` so far.
  virtual void order(Queue earlier, Queue later) = 0;
  /// Uninitialised memory, aligned to 256 bytes, for work that is given to `queue` from here on or
  /// ordered after it.
  virtual Buffer allocate(std::int64_t bytes, Queue queue) = 0;
  virtual void attend(const AttendArgs& args) = 0;
  /// True when attend_open takes a call with these arguments.
  virtual bool attends_open(const AttendArgs& /*args*/, const TensorView& /*own_k*/,
                            const TensorView& /*own_v*/) const {
    return false;
  }
  /// attend while K and V are fetched: args.k and args.v hold nothing yet, and afterwards no more
  /// than what this needed.
  virtual void attend_open(const AttendArgs& /*args*/, const OpenGather& /*open*/) {}
  virtual void attend_backward(const AttendBackwardArgs& args) = 0;
  /// What all ranks would compute for themselves, bit for bit; only where attends_all().
  virtual void attend_all(const AttendAllArgs& /*args*/) {}
  virtual void attend_backward_all(const AttendBackwardAllArgs& /*args*/) {}
  /// Called before attend_backward of a stage, while its gather may still be under way, with the
  /// same arguments except that k and v are this rank's own rows [local_tokens, kv_heads,
  /// head_dim]. A backend may give the part of the work here that needs no more; attend_backward
  /// then does the rest. Only for a rank that is not alone.
  virtual void attend_backward_early(const AttendBackwardArgs& /*args*/) {}
  /// Called between the two, once K and V are gathered, with the arguments of attend_backward.
  /// In the order of compute_queue() dk and dv are then complete for all rows but the rank's own;
  /// attend_backward does the rest. False when that is not worth it: nothing has been done then.
  virtual bool attend_backward_others(const AttendBackwardArgs& /*args*/) { return false; }
};

/// src/cpu: the fast kernels, and their plain twins.
std::unique_ptr<Backend> make_cpu_backend(Kernels kernels);

/// src/cuda, or a stub that throws DeviceError saying how to build it.
std::unique_ptr<Backend> make_cuda_backend(Device device, Kernels kernels, void* stream);

}  // namespace zigzag
