#include "comm/peer_group.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>
#include <utility>

#include <unistd.h>

#include "comm/wait.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

using cuda::check;

template <typename T>
std::vector<T> all_gather(Transport& transport, const T& mine) {
  std::vector<T> all(static_cast<std::size_t>(transport.size()));
  transport.all_gather(std::as_bytes(std::span<const T>(&mine, 1)),
                       std::as_writable_bytes(std::span<T>(all)));
  return all;
}

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
  cudaIpcEventHandle_t ready[kPeerRing] = {};
  cudaIpcEventHandle_t consumed[kPeerRing] = {};
};

/// What a rank says in every exchange, before its values.
struct Header {
  std::int64_t exchange = 0;
  std::uint64_t address = 0;
  std::int64_t capacity = 0;
  cudaIpcMemHandle_t handle = {};
};

}  // namespace

PeerShare::PeerShare(int device_index, bool interprocess) : device(device_index) {
  cuda::DeviceGuard guard(device);
  const unsigned flags =
      cudaEventDisableTiming | (interprocess ? unsigned{cudaEventInterprocess} : 0u);
  for (int i = 0; i < kPeerRing; ++i) {
    const auto at = static_cast<std::size_t>(i);
    check(cudaEventCreateWithFlags(&ready[at], flags), "cudaEventCreate");
    check(cudaEventCreateWithFlags(&consumed[at], flags), "cudaEventCreate");
  }
}

PeerShare::~PeerShare() {
  int previous = 0;
  (void)cudaGetDevice(&previous);
  (void)cudaSetDevice(device);
  for (void* slot : slots) (void)cudaFree(slot);
  for (void* slot : outgrown) (void)cudaFree(slot);
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
    const cudaError_t status = cudaDeviceEnablePeerAccess(index, 0);
    if (status == cudaErrorPeerAccessAlreadyEnabled) {
      (void)cudaGetLastError();
    } else {
      check(status, "cudaDeviceEnablePeerAccess");
    }
  }
  share_ = std::make_shared<PeerShare>(device_, !one_process_);
  Opening opening;
  opening.share = &share_;
  if (!one_process_) {
    for (int i = 0; i < kPeerRing; ++i) {
      const auto at = static_cast<std::size_t>(i);
      check(cudaIpcGetEventHandle(&opening.ready[i], share_->ready[at]), "cudaIpcGetEventHandle");
      check(cudaIpcGetEventHandle(&opening.consumed[i], share_->consumed[at]),
            "cudaIpcGetEventHandle");
    }
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
      continue;
    }
    for (int i = 0; i < kPeerRing; ++i) {
      check(cudaIpcOpenEventHandle(&peer.ready[static_cast<std::size_t>(i)], openings[at].ready[i]),
            "cudaIpcOpenEventHandle");
      check(cudaIpcOpenEventHandle(&peer.consumed[static_cast<std::size_t>(i)],
                                   openings[at].consumed[i]),
            "cudaIpcOpenEventHandle");
    }
  }
  // Nobody may go on and drop its share before all have taken it.
  bootstrap_->barrier();
}

PeerGroup::~PeerGroup() {
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
    for (const auto& events : {peer.ready, peer.consumed}) {
      for (cudaEvent_t event : events) (void)cudaEventDestroy(event);
    }
  }
  (void)cudaSetDevice(previous);
  // Other processes may have this rank's memory mapped and may not even be alive to say so: it
  // stays until the process ends.
  if (!one_process_ && share_ != nullptr) new std::shared_ptr<PeerShare>(share_);
}

void* PeerGroup::begin(std::int64_t bytes, cudaStream_t stream) {
  last_stream_ = stream;
  const auto slot = static_cast<int>(exchange_ % kPeerSlots);
  if (exchange_ >= kPeerSlots) {
    // Recorded by every peer before it came to the last exchange, so these waits bind to it.
    const auto ring = static_cast<std::size_t>((exchange_ - kPeerSlots) % kPeerRing);
    for (int r = 0; r < size(); ++r) {
      if (r == rank()) continue;
      check(cudaStreamWaitEvent(stream, peers_[static_cast<std::size_t>(r)].consumed[ring], 0),
            "cudaStreamWaitEvent");
    }
  }
  return share_->reserve(slot, bytes);
}

void PeerGroup::packed(cudaStream_t stream) {
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
    if (r == rank()) continue;
    Peer& peer = peers_[at];
    if (peer.same_process) {
      peer.mapped[slot] = reinterpret_cast<void*>(other.address);
    } else if (other.address != 0) {
      map_slot(peer, static_cast<int>(slot), other.handle, other.capacity);
    }
    check(cudaStreamWaitEvent(stream, peer.ready[ring], 0), "cudaStreamWaitEvent");
  }
  return result;
}

void PeerGroup::map_slot(Peer& peer, int slot, const cudaIpcMemHandle_t& handle,
                         std::int64_t capacity) {
  const auto at = static_cast<std::size_t>(slot);
  if (peer.mapped[at] != nullptr && peer.mapped_capacity[at] == capacity) return;
  if (peer.mapped[at] != nullptr) {
    // Rare: the peer's rows outgrew the slot. This rank's reads of the old one must have ended.
    check(cudaStreamSynchronize(last_stream_), "cudaStreamSynchronize");
    check(cudaIpcCloseMemHandle(peer.mapped[at]), "cudaIpcCloseMemHandle");
    peer.mapped[at] = nullptr;
  }
  check(cudaIpcOpenMemHandle(&peer.mapped[at], handle, cudaIpcMemLazyEnablePeerAccess),
        "cudaIpcOpenMemHandle");
  peer.mapped_capacity[at] = capacity;
}

const void* PeerGroup::memory(int peer) const {
  const auto slot = static_cast<std::size_t>(exchange_ % kPeerSlots);
  return peer == rank() ? share_->slots[slot] : peers_[static_cast<std::size_t>(peer)].mapped[slot];
}

void PeerGroup::end(cudaStream_t stream) {
  const auto ring = static_cast<std::size_t>(exchange_ % kPeerRing);
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
