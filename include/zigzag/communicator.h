#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace zigzag {

namespace comm {
class Transport;  // private: src/comm/transport.h
}

/// The caller's own collectives over a group (torch.distributed, mpi4py, ...). Buffers are host
/// memory unless `device_buffers`; calls are made in the same order on every rank. An exception
/// that a function throws passes through the operation unchanged.
struct CallbackCollectives {
  int rank = 0;
  int size = 1;
  /// True when buffers passed to all_to_all may be CUDA memory, used in stream order.
  bool device_buffers = false;
  /// Every rank gives `bytes` bytes; `out` [size x bytes] receives all, in rank order.
  std::function<void(const void* in, std::size_t bytes, void* out)> all_gather;
  /// Rank r sends send_bytes[p] bytes to each p, taken end to end from `send`; it receives
  /// receive_bytes[p] from each p, placed end to end in `receive`.
  std::function<void(const void* send, std::span<const std::int64_t> send_bytes, void* receive,
                     std::span<const std::int64_t> receive_bytes)>
      all_to_all;
  /// Tells the other ranks that this one failed and why, so that their functions stop waiting and
  /// throw. May be empty: they then wait until their own deadline. Its exceptions are ignored.
  std::function<void(std::string_view reason)> abort = {};
};

/// A group of ranks that exchange K/V and gradients. A value: copies share the group. One rank is
/// a group like any other and makes no exchange. All ranks of a group must make the same calls in
/// the same order; one thread at a time may use a rank's communicator.
class Communicator {
 public:
  /// The group of one rank.
  static Communicator self();
  /// A group of `size` ranks that are threads of this process; element r is for the thread of rank
  /// r. Throws InvalidArgument unless size >= 1.
  static std::vector<Communicator> threads(int size);
  /// The ranks of an MPI communicator (a pointer to an MPI_Comm; null means MPI_COMM_WORLD). MPI
  /// must be initialised, with MPI_THREAD_FUNNELED when other threads run and this thread the one
  /// that initialised it. The communicator is duplicated. Throws CommunicationError when MPI is
  /// not initialised or the library was built without it.
  static Communicator mpi(void* mpi_comm = nullptr);
  /// GPU `device` of each rank, exchanging through GPU memory that all ranks of one host reach
  /// (NVLink or PCIe peer access, CUDA IPC between processes). `bootstrap`, a group of threads,
  /// MPI or callback, carries the host's messages; ranks may share a GPU. A collective call. Throws
  /// DeviceError when the GPUs do not reach each other, naming the pair.
  static Communicator peer(const Communicator& bootstrap, int device);
  /// GPU `device` of each rank, exchanging through NCCL, which is opened at run time
  /// (`ZIGZAG_NCCL_PATH`, beside Python, the system). A collective call; one GPU a rank.
  static Communicator nccl(const Communicator& bootstrap, int device);
  /// A group that exchanges through the caller's functions.
  static Communicator callback(CallbackCollectives collectives);

  /// This rank's number in the group.
  int rank() const;
  /// Number of ranks.
  int size() const;
  /// "self", "threads", "mpi", "callback", "nccl" or "peer".
  std::string_view name() const;
  /// Waits until every rank has come here. Throws Timeout or CommunicationError.
  void barrier() const;
  /// Every rank gives the same number of bytes; returns those of all ranks in rank order.
  std::vector<std::byte> all_gather(std::span<const std::byte> bytes) const;
  /// Tells the other ranks that this one failed and why, so that they stop waiting with a
  /// CommunicationError. Operations call it when they throw between exchanges.
  void abort(std::string_view reason) const noexcept;

  /// Private to the library and its back ends.
  explicit Communicator(std::shared_ptr<comm::Transport> transport);
  /// Private to the library and its back ends.
  comm::Transport& transport() const { return *transport_; }

 private:
  std::shared_ptr<comm::Transport> transport_;
};

/// Seconds that a rank waits for a peer: `ZIGZAG_TIMEOUT_S`, default 300. Throws InvalidArgument
/// when the variable is not a positive number.
double timeout_seconds();

}  // namespace zigzag
