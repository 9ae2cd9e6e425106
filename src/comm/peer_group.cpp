#include "comm/peer_group.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include <unistd.h>

#include "comm/wait.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/stop.h"
#include "zigzag/communicator.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

using cuda::check;

/// How a rank introduces itself.
struct Introduction {
  char host[64] = {};
  std::int64_t process = 0;
  int device = 0;
  char bus[32] = {};
};

/// What a rank lets its peers open.
struct Opening {
  std::shared_ptr<PeerShare>* share = nullptr;  // for the same process
  cudaIpcMemHandle_t flags = {};                // for the others
};

/// What a rank says in every exchange, before its values.
struct Header {
  std::int64_t exchange = 0;
  std::uint64_t address = 0;
  std::int64_t capacity = 0;
  cudaIpcMemHandle_t handle = {};
  std::int64_t captured = 0;  // 1 + its number: the exchange is part of a graph
  std::uint64_t flags = 0;    // of that
};

/// Lets the current device read `peer`, once a process.
void enable_access(int device, int peer) {
  static std::mutex mutex;
  static std::set<std::pair<int, int>> enabled;
  const std::lock_guard lock(mutex);
  if (!enabled.insert({device, peer}).second) return;
  const cudaError_t status = cudaDeviceEnablePeerAccess(peer, 0);
  if (status == cudaErrorPeerAccessAlreadyEnabled) {
    (void)cudaGetLastError();
  } else {
    check(status, "cudaDeviceEnablePeerAccess");
  }
}

/// Zeroed memory of this device that is not the pool's, so that it can be opened elsewhere.
void* zeroed_memory(std::int64_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, static_cast<std::size_t>(bytes)), "cudaMalloc");
  check(cudaMemset(memory, 0, static_cast<std::size_t>(bytes)), "cudaMemset");
  check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
  return memory;
}

}  // namespace

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

PeerShare::PeerShare(int device_index, int rank, int size, bool interprocess)
    : device(device_index) {
  cuda::DeviceGuard guard(device);
  for (int i = 0; i < kPeerRing; ++i) {
    const auto at = static_cast<std::size_t>(i);
    check(cudaEventCreateWithFlags(&ready[at], cudaEventDisableTiming), "cudaEventCreate");
    check(cudaEventCreateWithFlags(&consumed[at], cudaEventDisableTiming), "cudaEventCreate");
  }
  if (!interprocess) return;
  flags = zeroed_memory(PeerSignals::flag_bytes(size));
  signals = std::make_unique<PeerSignals>(device, rank, size, timeout_seconds(), flags);
}

CapturedExchange::CapturedExchange(int device_index, int rank, int size, std::int64_t bytes)
    : device(device_index), peers(static_cast<std::size_t>(size)) {
  memory = zeroed_memory(bytes);
  flags = zeroed_memory(PeerSignals::flag_bytes(size));
  signals = std::make_unique<PeerSignals>(device, rank, size, timeout_seconds(), flags);
}

CapturedExchange::~CapturedExchange() {
  int previous = 0;
  (void)cudaGetDevice(&previous);
  (void)cudaSetDevice(device);
  (void)cudaFree(memory);
  (void)cudaFree(flags);
  (void)cudaSetDevice(previous);
}

PeerShare::~PeerShare() {
  int previous = 0;
  (void)cudaGetDevice(&previous);
  (void)cudaSetDevice(device);
  for (void* slot : slots) (void)cudaFree(slot);
  for (void* slot : outgrown) (void)cudaFree(slot);
  (void)cudaFree(flags);
  for (const auto& events : {ready, consumed}) {
    for (cudaEvent_t event : events) (void)cudaEventDestroy(event);
  }
  (void)cudaSetDevice(previous);
}

void* PeerShare::reserve(int slot, std::int64_t bytes) {
  const auto at = static_cast<std::size_t>(slot);
  if (bytes > capacity[at]) {
    if (slots[at] != nullptr) outgrown.push_back(std::exchange(slots[at], nullptr));
    // Grown by half, so that packs of changing length settle soon.
    const std::int64_t size = std::max(bytes, capacity[at] + capacity[at] / 2);
    capacity[at] = 0;
    cuda::DeviceGuard guard(device);
    const cudaError_t status = cudaMalloc(&slots[at], static_cast<std::size_t>(size));
    if (status == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      throw DeviceError("cuda:" + std::to_string(device) + " has too little memory: " +
                        std::to_string(size) + " bytes are needed for rows that peers read");
    }
    check(status, "cudaMalloc");
    capacity[at] = size;
  }
  return slots[at];
}

PeerGroup::PeerGroup(std::shared_ptr<Transport> bootstrap, int device)
    : bootstrap_(std::move(bootstrap)), device_(device) {
  // A rank that cannot start must not leave the others waiting.
  try {
    (void)cuda::DeviceState::get(device);
    connect();
  } catch (const std::exception& error) {
    bootstrap_->abort(error.what());
    throw;
  }
}

void PeerGroup::connect() {
  cuda::DeviceGuard guard(device_);
  Introduction mine;
  (void)gethostname(mine.host, sizeof(mine.host) - 1);
  mine.process = getpid();
  mine.device = device_;
  check(cudaDeviceGetPCIBusId(mine.bus, sizeof(mine.bus), device_), "cudaDeviceGetPCIBusId");
  const std::vector<Introduction> all = all_gather(*bootstrap_, mine);
  for (int r = 0; r < size(); ++r) {
    const Introduction& other = all[static_cast<std::size_t>(r)];
    if (std::strncmp(other.host, mine.host, sizeof(mine.host)) != 0) {
      throw DeviceError("rank " + std::to_string(rank()) + " is on host " + mine.host +
                        " and rank " + std::to_string(r) + " on host " + other.host +
                        "; peer memory needs one host (use NCCL)");
    }
    one_process_ = one_process_ && other.process == mine.process;
    if (std::strcmp(other.bus, mine.bus) == 0) continue;
    // The peer's GPU may have another number here, or none when it is hidden from this process.
    int index = 0;
    int reach = 0;
    if (cudaDeviceGetByPCIBusId(&index, other.bus) != cudaSuccess ||
        cudaDeviceCanAccessPeer(&reach, device_, index) != cudaSuccess || reach == 0) {
      (void)cudaGetLastError();
      throw DeviceError("the GPU of rank " + std::to_string(rank()) + " (" + mine.bus +
                        ") cannot reach the GPU of rank " + std::to_string(r) + " (" + other.bus +
                        ")");
    }
    enable_access(device_, index);
  }
  share_ = std::make_shared<PeerShare>(device_, rank(), size(), !one_process_);
  Opening opening;
  opening.share = &share_;
  if (!one_process_) {
    check(cudaIpcGetMemHandle(&opening.flags, share_->flags), "cudaIpcGetMemHandle");
  }
  const std::vector<Opening> openings = all_gather(*bootstrap_, opening);
  peers_.resize(static_cast<std::size_t>(size()));
  for (int r = 0; r < size(); ++r) {
    const auto at = static_cast<std::size_t>(r);
    Peer& peer = peers_[at];
    peer.same_process = all[at].process == mine.process;
    if (peer.same_process) {
      peer.share = *openings[at].share;
      peer.ready = peer.share->ready;
      peer.consumed = peer.share->consumed;
      if (!one_process_ && r != rank()) share_->signals->connect(r, peer.share->flags);
      continue;
    }
    check(cudaIpcOpenMemHandle(&peer.flags, openings[at].flags, cudaIpcMemLazyEnablePeerAccess),
          "cudaIpcOpenMemHandle");
    share_->signals->connect(r, peer.flags);
  }
  // Nobody may go on and drop its share before all have taken it.
  bootstrap_->barrier();
}

PeerGroup::~PeerGroup() {
  if (!cuda::stop_text().empty()) {
    // The GPU's context has ended, and the driver may wait for a peer that is gone: what is left
    // goes with the process.
    for (Peer& peer : peers_) new std::shared_ptr<PeerShare>(std::move(peer.share));
    new std::shared_ptr<PeerShare>(std::move(share_));
    for (auto& captured : captured_) (void)captured.release();
    return;
  }
  int previous = 0;
  (void)cudaGetDevice(&previous);
  (void)cudaSetDevice(device_);
  // Memory of peers may go once this rank's reads of it have ended. The stream may be gone by now:
  // it belongs to the thread that made the call.
  if (exchange_ > 0) {
    const auto ring = static_cast<std::size_t>((exchange_ - 1) % kPeerRing);
    (void)cudaEventSynchronize(share_->consumed[ring]);
  }
  for (Peer& peer : peers_) {
    if (peer.same_process) continue;
    for (void* mapped : peer.mapped) {
      if (mapped != nullptr) (void)cudaIpcCloseMemHandle(mapped);
    }
    if (peer.flags != nullptr) (void)cudaIpcCloseMemHandle(peer.flags);
  }
  (void)cudaSetDevice(previous);
  // Other processes may have this rank's memory mapped and may not even be alive to say so: it
  // stays until the process ends.
  if (!one_process_ && share_ != nullptr) new std::shared_ptr<PeerShare>(share_);
}

bool PeerGroup::shares_addresses(cudaStream_t stream) const {
  return one_process_ && !is_capturing(stream);
}

void* PeerGroup::begin(std::int64_t bytes, const Step& step, cudaStream_t stream) {
  capturing_ = is_capturing(stream);
  if (capturing_) return begin_captured(bytes, step, stream);
  const auto slot = static_cast<int>(exchange_ % kPeerSlots);
  if (exchange_ >= kPeerSlots) {
    if (!one_process_) {
      share_->signals->wait(PeerSignal::kConsumed, PeerSignal::kReady, kPeerSlots - 1, step,
                            stream);
    }
    // Recorded by every peer before it came to the last exchange, so these waits bind to it. This
    // rank may have read its own rows on another stream.
    const auto ring = static_cast<std::size_t>((exchange_ - kPeerSlots) % kPeerRing);
    for (int r = 0; r < size(); ++r) {
      if (!one_process_ && r != rank()) continue;
      check(cudaStreamWaitEvent(stream, peers_[static_cast<std::size_t>(r)].consumed[ring], 0),
            "cudaStreamWaitEvent");
    }
  }
  return share_->reserve(slot, bytes);
}

void* PeerGroup::begin_captured(std::int64_t bytes, const Step& step, cudaStream_t stream) {
  if (!one_process_) {
    throw DeviceError(
        "a CUDA graph over several ranks needs them to be threads of one process; rank " +
        std::to_string(rank()) +
        " has peers in other processes (capture attention at one rank, or " +
        "leave it out of the graph)");
  }
  const cuda::RelaxedCapture relaxed;
  captured_.push_back(std::make_unique<CapturedExchange>(device_, rank(), size(), bytes));
  CapturedExchange& exchange = *captured_.back();
  // Peers have read what the last launch of the graph put here.
  exchange.signals->wait(PeerSignal::kConsumed, PeerSignal::kReady, 0, step, stream);
  return exchange.memory;
}

void PeerGroup::packed(cudaStream_t stream) {
  // In a graph peers are told in publish, which learns where their flags are.
  if (capturing_) return;
  if (!one_process_) return share_->signals->send(PeerSignal::kReady, stream);
  const auto ring = static_cast<std::size_t>(exchange_ % kPeerRing);
  check(cudaEventRecord(share_->ready[ring], stream), "cudaEventRecord");
}

std::vector<std::int64_t> PeerGroup::publish(const std::vector<std::int64_t>& values,
                                             const Step& step, cudaStream_t stream) {
  const auto slot = static_cast<std::size_t>(exchange_ % kPeerSlots);
  const auto ring = static_cast<std::size_t>(exchange_ % kPeerRing);
  Header header;
  header.exchange = exchange_;
  header.address = reinterpret_cast<std::uintptr_t>(share_->slots[slot]);
  header.capacity = share_->capacity[slot];
  CapturedExchange* const captured = capturing_ ? captured_.back().get() : nullptr;
  if (captured != nullptr) {
    header.captured = static_cast<std::int64_t>(captured_.size());
    header.address = reinterpret_cast<std::uintptr_t>(captured->memory);
    header.flags = reinterpret_cast<std::uintptr_t>(captured->flags);
  }
  if (!one_process_ && share_->slots[slot] != nullptr) {
    check(cudaIpcGetMemHandle(&header.handle, share_->slots[slot]), "cudaIpcGetMemHandle");
  }
  const std::size_t value_bytes = values.size() * sizeof(std::int64_t);
  const std::size_t bytes = sizeof(Header) + value_bytes;
  std::vector<std::byte> mine(bytes);
  std::memcpy(mine.data(), &header, sizeof(Header));
  if (value_bytes != 0) std::memcpy(mine.data() + sizeof(Header), values.data(), value_bytes);
  std::vector<std::byte> all(bytes * static_cast<std::size_t>(size()));
  try {
    bootstrap_->all_gather(mine, all);
  } catch (const Timeout& timeout) {
    throw Timeout(step_text(step) + ": " + timeout.what());
  } catch (const CommunicationError& error) {
    throw CommunicationError(step_text(step) + ": " + error.what());
  }

  std::vector<std::int64_t> result(values.size() * static_cast<std::size_t>(size()));
  for (int r = 0; r < size(); ++r) {
    const auto at = static_cast<std::size_t>(r);
    const std::byte* entry = all.data() + bytes * at;
    Header other;
    std::memcpy(&other, entry, sizeof(Header));
    if (value_bytes != 0) {
      std::memcpy(result.data() + values.size() * at, entry + sizeof(Header), value_bytes);
    }
    if (other.exchange != exchange_) {
      throw CommunicationError("rank " + std::to_string(rank()) + " is at exchange " +
                               std::to_string(exchange_) + " (" + step_text(step) + ") and rank " +
                               std::to_string(r) + " at exchange " +
                               std::to_string(other.exchange));
    }
    if (other.captured != header.captured) {
      throw CommunicationError("rank " + std::to_string(rank()) +
                               (header.captured != 0 ? " captures" : " does not capture") +
                               " a CUDA graph in " + step_text(step) + " and rank " +
                               std::to_string(r) + (other.captured != 0 ? " does" : " does not") +
                               "; all ranks capture the same calls, from the first one on");
    }
    if (r == rank()) continue;
    Peer& peer = peers_[at];
    if (captured != nullptr) {
      captured->peers[at] = reinterpret_cast<void*>(other.address);
      captured->signals->connect(r, reinterpret_cast<void*>(other.flags));
      continue;
    }
    if (peer.same_process) {
      peer.mapped[slot] = reinterpret_cast<void*>(other.address);
    } else if (other.address != 0) {
      map_slot(peer, static_cast<int>(slot), other.handle, other.capacity);
    }
    if (one_process_) {
      check(cudaStreamWaitEvent(stream, peer.ready[ring], 0), "cudaStreamWaitEvent");
    }
  }
  PeerSignals* const signals = captured != nullptr ? captured->signals.get()
                               : one_process_      ? nullptr
                                                   : share_->signals.get();
  if (captured != nullptr) signals->send(PeerSignal::kReady, stream);
  if (signals != nullptr) signals->wait(PeerSignal::kReady, PeerSignal::kReady, 0, step, stream);
  return result;
}

void PeerGroup::map_slot(Peer& peer, int slot, const cudaIpcMemHandle_t& handle,
                         std::int64_t capacity) {
  const auto at = static_cast<std::size_t>(slot);
  if (peer.mapped[at] != nullptr && peer.mapped_capacity[at] == capacity) return;
  if (peer.mapped[at] != nullptr) {
    // Rare: the peer's rows outgrew the slot. This rank's reads of the old one must have ended.
    if (exchange_ > 0) {
      const auto ring = static_cast<std::size_t>((exchange_ - 1) % kPeerRing);
      check(cudaEventSynchronize(share_->consumed[ring]), "cudaEventSynchronize");
    }
    check(cudaIpcCloseMemHandle(peer.mapped[at]), "cudaIpcCloseMemHandle");
    peer.mapped[at] = nullptr;
  }
  check(cudaIpcOpenMemHandle(&peer.mapped[at], handle, cudaIpcMemLazyEnablePeerAccess),
        "cudaIpcOpenMemHandle");
  peer.mapped_capacity[at] = capacity;
}

const void* PeerGroup::memory(int peer) const {
  const auto at = static_cast<std::size_t>(peer);
  if (capturing_) {
    const CapturedExchange& captured = *captured_.back();
    return peer == rank() ? captured.memory : captured.peers[at];
  }
  const auto slot = static_cast<std::size_t>(exchange_ % kPeerSlots);
  return peer == rank() ? share_->slots[slot] : peers_[at].mapped[slot];
}

void PeerGroup::end(cudaStream_t stream) {
  if (capturing_) return captured_.back()->signals->send(PeerSignal::kConsumed, stream);
  const auto ring = static_cast<std::size_t>(exchange_ % kPeerRing);
  if (!one_process_) share_->signals->send(PeerSignal::kConsumed, stream);
  check(cudaEventRecord(share_->consumed[ring], stream), "cudaEventRecord");
  ++exchange_;
}

void PeerGroup::wait_for_readers(const Step& step, cudaStream_t stream) {
  const auto ring = static_cast<std::size_t>((exchange_ - 1) % kPeerRing);
  try {
    bootstrap_->barrier();
  } catch (const Timeout& timeout) {
    throw Timeout(step_text(step) + ": " + timeout.what());
  }
  for (int r = 0; r < size(); ++r) {
    if (r == rank()) continue;
    check(cudaStreamWaitEvent(stream, peers_[static_cast<std::size_t>(r)].consumed[ring], 0),
          "cudaStreamWaitEvent");
  }
}

}  // namespace zigzag::comm
