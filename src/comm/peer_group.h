#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include <cuda_runtime_api.h>

#include "comm/peer_signals.h"
#include "comm/transport.h"

namespace zigzag::comm {

/// Exchanges that may be under way at once before memory or an event is used again.
inline constexpr int kPeerRing = 4;
inline constexpr int kPeerSlots = 2;

/// Whether the work given to a stream goes into a CUDA graph.
bool is_capturing(cudaStream_t stream);

/// What a rank lets its peers read: memory for packed rows, and what orders its use: events among
/// ranks of one process, else flags. Peers of one process share it and it lives as long as the last
/// of them.
struct PeerShare {
  PeerShare(int device, int rank, int size, bool interprocess);
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
  void* flags = nullptr;                          // between processes
  std::unique_ptr<PeerSignals> signals;           // likewise
};

/// An exchange inside a graph runs again whenever the graph is launched, at whatever time beside
/// the others: it has memory and flags of its own.
struct CapturedExchange {
  CapturedExchange(int device, int rank, int size, std::int64_t bytes);
  ~CapturedExchange();
  CapturedExchange(const CapturedExchange&) = delete;
  CapturedExchange& operator=(const CapturedExchange&) = delete;

  int device;
  void* memory = nullptr;
  void* flags = nullptr;
  std::unique_ptr<PeerSignals> signals;
  std::vector<void*> peers;  // their memory
};

/// A peer as this rank sees it.
struct Peer {
  bool same_process = true;
  std::shared_ptr<PeerShare> share;  // same process only
  // Same process only.
  std::array<cudaEvent_t, kPeerRing> ready{};
  std::array<cudaEvent_t, kPeerRing> consumed{};
  void* flags = nullptr;  // another process's, mapped here
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
  /// True when peers can read this rank's tensors where they lie: all ranks are threads of this
  /// process, and `stream` is not being captured, since a graph's memory is its own.
  bool shares_addresses(cudaStream_t stream) const;

  /// Starts an exchange on `stream`: returns memory of `bytes` bytes that peers will read, once
  /// nobody reads what was in it.
  void* begin(std::int64_t bytes, const Step& step, cudaStream_t stream);
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
  void* begin_captured(std::int64_t bytes, const Step& step, cudaStream_t stream);

  std::shared_ptr<Transport> bootstrap_;
  int device_;
  bool one_process_ = true;
  std::shared_ptr<PeerShare> share_;
  std::vector<Peer> peers_;
  std::int64_t exchange_ = 0;
  std::vector<std::unique_ptr<CapturedExchange>> captured_;
  bool capturing_ = false;  // the exchange under way is the last of captured_
};

}  // namespace zigzag::comm
