#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace zigzag::comm {

/// Which process of which machine a rank is. Plain bytes, so that ranks can exchange it.
struct ProcessIdentity {
  std::uint64_t machine = 0;  // of one boot and one process-id namespace; 0 when unknown
  std::int64_t pid = 0;
};

/// This process.
ProcessIdentity this_process();

/// Watches the peers that are processes of this machine, so that a dead one is noticed in
/// milliseconds and not at the deadline. Peers elsewhere are not watched.
class PeerWatch {
 public:
  PeerWatch() = default;
  PeerWatch(std::span<const ProcessIdentity> ranks, int self);
  ~PeerWatch();
  PeerWatch(PeerWatch&& other) noexcept;
  PeerWatch& operator=(PeerWatch&& other) noexcept;

  /// True when that rank's process was seen to have ended. One system call.
  bool dead(int rank) const;
  /// "rank 3 (process 4711 of this machine)".
  std::string describe(int rank) const;

 private:
  struct Peer {
    std::int64_t pid = 0;  // 0: not watched
    int descriptor = -1;   // readable once the process has ended; -1: ask by pid
  };
  std::vector<Peer> peers_;
};

}  // namespace zigzag::comm
