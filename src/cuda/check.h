#pragma once

#include <string>

#include <cuda_runtime_api.h>

#include "zigzag/error.h"

namespace zigzag::cuda {

/// Tells why work on a GPU ended its context, when a kernel of ours did that; empty otherwise.
inline std::string (*context_report)() = nullptr;

/// Throws Timeout with that report when there is one.
inline void throw_context_report() {
  if (context_report == nullptr) return;
  const std::string report = context_report();
  if (!report.empty()) throw Timeout(report);
}

/// Throws DeviceError with the decoded code unless `status` is success; clears a sticky-free error.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  throw_context_report();
  throw DeviceError(std::string(what) + " failed: " + cudaGetErrorString(status) + " (" +
                    cudaGetErrorName(status) + ")");
}

/// Throws DeviceError when the launch just made failed.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

/// The calling thread's current device is `index` while this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != index) check(cudaSetDevice(index), "cudaSetDevice");
    changed_ = previous_ != index;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

/// Calls that a capture of another thread or library forbids, but that have nothing to do with the
/// captured stream, are allowed while this lives.
class RelaxedCapture {
 public:
  RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace zigzag::cuda
