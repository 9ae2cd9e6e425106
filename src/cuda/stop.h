#pragma once

#include <cstddef>
#include <string>

#include <cuda_runtime_api.h>

namespace zigzag::cuda {

/// What a kernel that ends its GPU's context leaves behind, in page-locked memory, so that the host
/// can read it afterwards. A wait for a peer that never comes ends so: what stands behind it on the
/// stream must not run on with rows that are not there.
struct StopReport {
  static constexpr std::size_t kText = 96;
  int state = 0;  // 0: none
  int rank = 0;
  int peer = 0;
  double seconds = 0;
  char step[kText] = {};
};

/// The process's one report, which kernels and the host address alike. Throws DeviceError.
StopReport* stop_report();

/// A word in page-locked memory that stop_if_set looks at; freed with cudaFreeHost.
int* make_stop_flag();

/// Work given to `stream` from here on does not run when `*flag` is set by then: the context ends.
void stop_if_set(const int* flag, cudaStream_t stream);

/// Says beforehand why the host is about to set a flag.
void note_stop(const std::string& reason);

/// Why a kernel of this library ended a context of this process; empty when none did.
std::string stop_text();

}  // namespace zigzag::cuda
