#pragma once

#include <memory>
#include <span>

#include "backend.h"

namespace zigzag::cpu {

/// What both CPU back ends share: one queue in which work is done when a call returns.
class CpuBackend : public Backend {
 public:
  bool overlaps() const override { return false; }
  Queue compute_queue() override { return {}; }
  Queue exchange_queue() override { return {}; }
  void order(Queue, Queue) override {}
  Buffer allocate(std::int64_t bytes) override;
};

/// The SIMD kernels.
class FusedBackend : public CpuBackend {
 public:
  bool reads_lent_rows() const override { return true; }
  void attend(const AttendArgs& args) override { attend_for_all({&args, 1}); }
  void attend_backward(const AttendBackwardArgs& args) override {
    attend_backward_for_all({&args, 1});
  }
  void attend_for_all(std::span<const AttendArgs> ranks) override;
  void attend_backward_for_all(std::span<const AttendBackwardArgs> ranks) override;
};

/// The plain twin: loops over the pairs of each row in float64, without blocks or panels.
class ReferenceBackend : public CpuBackend {
 public:
  void attend(const AttendArgs& args) override;
  void attend_backward(const AttendBackwardArgs& args) override;
};

}  // namespace zigzag::cpu
