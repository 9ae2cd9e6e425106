#pragma once

#include <memory>

#include "backend.h"

namespace zigzag::cpu {

/// What both CPU back ends share: one queue in which work is done when a call returns.
class CpuBackend : public Backend {
 public:
  bool overlaps() const override { return false; }
  Queue compute_queue() override { return {}; }
  Queue exchange_queue() override { return {}; }
  void order(Queue, Queue) override {}
  Buffer allocate(std::int64_t bytes, Queue queue) override;
};

/// The SIMD kernels.
class FusedBackend : public CpuBackend {
 public:
  bool attends_all() const override { return true; }
  void attend(const AttendArgs& args) override;
  void attend_backward(const AttendBackwardArgs& args) override;
  void attend_all(const AttendAllArgs& args) override;
  void attend_backward_all(const AttendBackwardAllArgs& args) override;
};

/// The plain twin: loops over the pairs of each row in float64, without blocks or panels.
class ReferenceBackend : public CpuBackend {
 public:
  void attend(const AttendArgs& args) override;
  void attend_backward(const AttendBackwardArgs& args) override;
};

}  // namespace zigzag::cpu
