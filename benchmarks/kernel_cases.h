#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "half.h"

namespace zigzag::benchmarks {

/// One pack on one rank with inputs and outputs in memory, ready for a CPU backend.
class KernelCase {
 public:
  /// `documents` documents of `length` tokens, causal.
  KernelCase(std::int64_t documents, std::int64_t length, std::int64_t heads, std::int64_t kv_heads,
             std::int64_t head_dim, DType dtype)
      : plan_(Plan::from_lengths(std::vector<std::int64_t>(documents, length), 1)),
        items_(plan_.work_items(0)),
        flops_(plan_.flops(0, heads, head_dim)),
        backend_(make_cpu_backend(Kernels::kFused)) {
    const std::int64_t tokens = documents * length;
    args_.q = tensor(dtype, {tokens, heads, head_dim});
    args_.k = tensor(dtype, {tokens, kv_heads, head_dim});
    args_.v = tensor(dtype, {tokens, kv_heads, head_dim});
    args_.out = tensor(dtype, {tokens, heads, head_dim});
    args_.lse = tensor(DType::kFloat32, {tokens, heads});
    args_.dout = tensor(dtype, {tokens, heads, head_dim});
    args_.dq = tensor(dtype, {tokens, heads, head_dim});
    args_.dk = tensor(dtype, {tokens, kv_heads, head_dim});
    args_.dv = tensor(dtype, {tokens, kv_heads, head_dim});
    args_.plan = &plan_;
    args_.items = items_;
    args_.scale = 1 / std::sqrt(static_cast<double>(head_dim));
  }
  KernelCase(const KernelCase&) = delete;
  KernelCase& operator=(const KernelCase&) = delete;

  void forward() { backend_->attend(args_); }
  void backward() { backend_->attend_backward(args_); }
  /// Operations of one forward; a backward has 2.5 times as many.
  double flops() const { return flops_; }

 private:
  // Filled with numbers in [-1, 1) from a fixed sequence.
  TensorView tensor(DType dtype, std::vector<std::int64_t> shape) {
    TensorView view = TensorView::contiguous(nullptr, dtype, std::move(shape));
    memory_.push_back(
        backend_->allocate(view.num_elements() * item_size(dtype), backend_->compute_queue()));
    view.data = memory_.back().memory.get();
    for (std::int64_t i = 0; i < view.num_elements(); ++i) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      const float x = static_cast<float>(static_cast<std::int64_t>(state_) >> 40) * 0x1p-23f;
      if (dtype == DType::kFloat32) {
        view.as<float>()[i] = x;
      } else {
        view.as<std::uint16_t>()[i] = dtype == DType::kFloat16 ? to_float16(x) : to_bfloat16(x);
      }
    }
    return view;
  }

  Plan plan_;
  std::vector<WorkItem> items_;
  double flops_;
  std::unique_ptr<Backend> backend_;
  std::vector<Buffer> memory_;
  std::uint64_t state_ = 1;
  AttendBackwardArgs args_;
};

}  // namespace zigzag::benchmarks
