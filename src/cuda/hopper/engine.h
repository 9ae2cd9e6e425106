#pragma once

#include <memory>
#include <string>

#include "backend.h"

namespace zigzag::cuda::hopper {

/// Why this device cannot run the tensor-core kernels; empty when it can.
std::string unavailable(int device);

/// True when forward takes this call with an open gather.
bool fetches(const AttendArgs& args, const TensorView& own_k, const TensorView& own_v);

/// A forward by the library's tensor-core kernels for Hopper GPUs. False, and says why, when this
/// call is not one for them: nothing has been done then. `open`: null when K and V are complete;
/// otherwise the kernel fetches their rows itself, beside work on the rank's own.
bool forward(const AttendArgs& args, const OpenGather* open, void* stream, std::string& why);

/// A backward by the library's tensor-core kernels for Hopper GPUs, in parts: begin gives what
/// needs no K and V but the rank's own, others what other ranks wait for, finish the rest, all in
/// the order of one stream: side by side they are slower (docs/gpu.md). dK and dV are summed in
/// float32 registers and dQ in float32 memory, in an order that changes from call to call; each is
/// rounded once.
class HopperBackward {
 public:
  /// Null, and says why, when this call is not one for these kernels: nothing has been done then.
  /// `own_rows`: k and v are the rank's own rows.
  static std::unique_ptr<HopperBackward> begin(const AttendBackwardArgs& args, bool own_rows,
                                               void* stream, std::string& why);
  ~HopperBackward();
  HopperBackward(const HopperBackward&) = delete;
  HopperBackward& operator=(const HopperBackward&) = delete;

  /// With K and V gathered: makes dk and dv complete for all rows but the rank's own, unless that
  /// is not worth a launch of its own: false, and finish does it.
  bool others(const AttendBackwardArgs& args);
  void finish(const AttendBackwardArgs& args);

 private:
  struct State;
  explicit HopperBackward(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace zigzag::cuda::hopper
