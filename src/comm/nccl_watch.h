#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

#include <cuda_runtime_api.h>

#include "comm/nccl_library.h"

namespace zigzag::comm {

/// Watches the exchanges that a rank has given to NCCL from a thread of its own. When one is still
/// under way after the deadline, or NCCL reports an error, the communicator is aborted, which ends
/// its kernels, and the rank's next call throws what happened.
class NcclWatch {
 public:
  NcclWatch(const NcclLibrary& nccl, ncclComm_t comm, int device, int rank, double timeout);
  ~NcclWatch();
  NcclWatch(const NcclWatch&) = delete;
  NcclWatch& operator=(const NcclWatch&) = delete;

  /// An exchange has been given to `stream`.
  void started(const std::string& step, cudaStream_t stream);
  /// Throws Timeout or CommunicationError when an earlier exchange failed.
  void check();
  /// Aborts the communicator because this rank failed.
  void abort(std::string_view reason) noexcept;
  /// Ends the thread. True when the communicator has been aborted.
  bool stop();

 private:
  struct Entry {
    std::string step;
    cudaEvent_t done;
    std::chrono::steady_clock::time_point start;
  };
  void run();
  void look();
  void fail(std::string message, bool timed_out);

  const NcclLibrary& nccl_;
  ncclComm_t comm_;
  int device_;
  int rank_;
  double timeout_;
  int* stop_;  // set when what exchanges have left on the GPU must not be used
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Entry> entries_;
  std::deque<cudaEvent_t> spare_;
  std::chrono::steady_clock::time_point progress_;
  std::string failure_;
  bool timed_out_ = false;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace zigzag::comm
