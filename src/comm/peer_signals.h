#pragma once

#include <array>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "comm/transport.h"

namespace zigzag::comm {

/// Ranks that one group of signals serves at most.
inline constexpr int kMaxSignalRanks = 64;

/// What a rank tells its peers on the GPU.
enum class PeerSignal : std::uint8_t {
  kReady,     // its rows are packed
  kConsumed,  // it has read its peers' rows
};

/// Counters in GPU memory by which ranks wait for one another without events: between processes,
/// where an event of a killed one would never come, and inside captured graphs, where every replay
/// counts on. Waits are bounded: past the deadline the kernel leaves a report and ends the context.
class PeerSignals {
 public:
  /// Bytes of the flags that peers write, for the caller to make reachable for them.
  static std::int64_t flag_bytes(int size);

  /// `flags`: this rank's own zeroed memory of flag_bytes on `device`, kept by the caller.
  PeerSignals(int device, int rank, int size, double timeout_seconds, void* flags);
  ~PeerSignals();
  PeerSignals(const PeerSignals&) = delete;
  PeerSignals& operator=(const PeerSignals&) = delete;

  /// Where peer `peer` takes its flags, as seen from this rank.
  void connect(int peer, void* flags);
  /// Counts this rank's signal on, and tells the peers, once the work given to `stream` is done.
  void send(PeerSignal signal, cudaStream_t stream);
  /// Makes `stream` wait until every peer's signal stands at this rank's own count of `counted`,
  /// less `behind`. `step` is for the message when it does not come.
  void wait(PeerSignal signal, PeerSignal counted, int behind, const Step& step,
            cudaStream_t stream);

 private:
  int device_;
  int rank_;
  int size_;
  double timeout_;
  std::uint64_t* flags_;
  std::array<std::uint64_t*, kMaxSignalRanks> peers_{};
  std::uint64_t* counters_ = nullptr;
};

}  // namespace zigzag::comm
