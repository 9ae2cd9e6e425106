#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include <cuda_runtime_api.h>

#include "comm/transport.h"

namespace zigzag::comm {

/// Exchanges that may be under way at once before memory or an event is used again.
inline constexpr int kPeerRing = 4;
inline constexpr int kPeerSlots = 2;

/// What a rank lets its peers read: memory for packed rows, and events that order its use. Peers of
/// one process share it and it lives as long as the last of them.
struct PeerShare {
  explicit PeerShare(int device, bool interprocess);
  ~PeerShare();
  PeerShare(const PeerShare&) = delete;
  PeerShare& operator=(const PeerShare&) = delete;

  /// Slot `slot` with room for `bytes`; an outgrown one is kept until the end, since a peer may
  /// still read it.
  void* reserve(int slot, std::int64_t bytes);

  int device = 0;
  std::array<void*, kPeerSlots> slots{};
  std::array<std::int64_t, kPeerSlots> capacity{};
  std::vector<void*> outgrown;
  std::array<cudaEvent_t, kPeerRing> ready{};     // rows of exchange e are packed
  std::array<cudaEvent_t, kPeerRing> consumed{};  // this rank has read its peers' rows of e
};

/// A peer as this rank sees it.
struct Peer {
  bool same_process = true;
  std::shared_ptr<PeerShare> share;  // same process only
  std::array<cudaEvent_t, kPeerRing> ready{};
  std::array<cudaEvent_t, kPeerRing> consumed{};
  // Another process's slots, mapped here; mapped anew when the peer's slot has grown.
  std::array<void*, kPeerSlots> mapped{};
  std::array<std::int64_t, kPeerSlots> mapped_capacity{};
};

/// The ranks of one host whose GPUs read each other's memory, from one rank's side. Everything here
/// is about who may read what when; what is read is peer.cpp's.
class PeerGroup {
 public:
  /// Collective. Throws DeviceError naming the pair that does not reach each other.
  PeerGroup(std::shared_ptr<Transport> bootstrap, int device);
  ~PeerGroup();
  PeerGroup(const PeerGroup&) = delete;
  PeerGroup& operator=(const PeerGroup&) = delete;

  Transport& bootstrap() const { return *bootstrap_; }
  int rank() const { return bootstrap_->rank(); }
  int size() const { return bootstrap_->size(); }
  int device() const { return device_; }
  /// True when all ranks are threads of this process.
  bool one_process() const { return one_process_; }

  /// Starts an exchange on `stream`: returns memory of `bytes` bytes that peers will read, once
  /// nobody reads what was in it.
  void* begin(std::int64_t bytes, cudaStream_t stream);
  /// That memory holds what peers will read once the work given to `stream` so far is done. Work
  /// given between here and publish needs no peer and fills the wait for them.
  void packed(cudaStream_t stream);
  /// Publishes that memory, and `values` (as many on every rank); returns every rank's values. From
  /// here on `stream` may read peers' memory.
  std::vector<std::int64_t> publish(const std::vector<std::int64_t>& values, const Step& step,
                                    cudaStream_t stream);
  /// A peer's memory of this exchange, after publish.
  const void* memory(int peer) const;
  /// Ends the exchange: the work given to `stream` so far has read what it wanted.
  void end(cudaStream_t stream);
  /// Makes `stream` wait until every peer has ended the exchange just ended. One process only.
  void wait_for_readers(const Step& step, cudaStream_t stream);

 private:
  void connect();
  void map_slot(Peer& peer, int slot, const cudaIpcMemHandle_t& handle, std::int64_t capacity);

  std::shared_ptr<Transport> bootstrap_;
  int device_;
  bool one_process_ = true;
  std::shared_ptr<PeerShare> share_;
  std::vector<Peer> peers_;
  std::int64_t exchange_ = 0;
  std::array<std::int64_t, kPeerSlots> published_capacity_{};
  cudaStream_t last_stream_ = nullptr;
};

}  // namespace zigzag::comm
