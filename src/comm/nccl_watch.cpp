#include "comm/nccl_watch.h"

#include <utility>

#include "comm/wait.h"
#include "cuda/check.h"
#include "cuda/stop.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

constexpr std::chrono::milliseconds kPeriod{50};

}  // namespace

NcclWatch::NcclWatch(const NcclLibrary& nccl, ncclComm_t comm, int device, int rank, double timeout)
    : nccl_(nccl),
      comm_(comm),
      device_(device),
      rank_(rank),
      timeout_(timeout),
      stop_(cuda::make_stop_flag()),
      progress_(std::chrono::steady_clock::now()),
      thread_([this] { run(); }) {}

NcclWatch::~NcclWatch() {
  (void)stop();
  for (const Entry& entry : entries_) (void)cudaEventDestroy(entry.done);
  for (cudaEvent_t event : spare_) (void)cudaEventDestroy(event);
  // When the flag is set, a kernel that looks at it may still be under way.
  if (*stop_ == 0) (void)cudaFreeHost(stop_);
}

void NcclWatch::started(const std::string& step, cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  cudaEvent_t event = nullptr;
  if (!spare_.empty()) {
    event = spare_.front();
    spare_.pop_front();
  } else {
    cuda::check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  }
  cuda::check(cudaEventRecord(event, stream), "cudaEventRecord");
  // An aborted exchange ends as if it were complete: nothing may run on with what it left.
  cuda::stop_if_set(stop_, stream);
  entries_.push_back({step, event, std::chrono::steady_clock::now()});
}

void NcclWatch::check() {
  const std::lock_guard lock(mutex_);
  if (failure_.empty()) return;
  if (timed_out_) throw Timeout(failure_);
  throw CommunicationError(failure_);
}

void NcclWatch::abort(std::string_view reason) noexcept {
  const std::lock_guard lock(mutex_);
  try {
    if (!failure_.empty()) return;
    // The peers hear of it from this rank, so the GPU may go on.
    failure_ = "this rank failed: " + std::string(reason);
    (void)nccl_.abort(comm_);
  } catch (...) {
    // Out of memory for a message: the abort itself has been made or needs none.
  }
}

bool NcclWatch::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
  return !failure_.empty();
}

void NcclWatch::run() {
  (void)cudaSetDevice(device_);
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    wake_.wait_for(lock, kPeriod);
    if (!stopping_ && failure_.empty()) look();
  }
}

void NcclWatch::look() {
  const auto now = std::chrono::steady_clock::now();
  while (!entries_.empty()) {
    const cudaError_t status = cudaEventQuery(entries_.front().done);
    if (status == cudaErrorNotReady) break;
    if (status != cudaSuccess) (void)cudaGetLastError();
    spare_.push_back(entries_.front().done);
    entries_.pop_front();
    progress_ = now;
  }
  ncclResult_t error = ncclSuccess;
  if (nccl_.get_async_error(comm_, &error) == ncclSuccess && error != ncclSuccess &&
      error != ncclInProgress) {
    fail("rank " + std::to_string(rank_) + ": NCCL failed: " + nccl_.error_string(error), false);
    return;
  }
  if (entries_.empty()) return;
  // The clock starts when the GPU has come to the exchange or, unknown that, at the last progress.
  const auto since = std::max(progress_, entries_.front().start);
  if (std::chrono::duration<double>(now - since).count() > timeout_) {
    fail("rank " + std::to_string(rank_) + " waited " + seconds_text(timeout_) +
             " for its peers in " + entries_.front().step,
         true);
  }
}

void NcclWatch::fail(std::string message, bool timed_out) {
  failure_ = std::move(message);
  timed_out_ = timed_out;
  cuda::note_stop(failure_);
  *static_cast<volatile int*>(stop_) = 1;
  (void)nccl_.abort(comm_);
}

}  // namespace zigzag::comm
