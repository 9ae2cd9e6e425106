#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <mpi.h>

#include "comm/liveness.h"

namespace zigzag::comm {

/// Sends and receives under way, and the peer of each.
struct MpiBatch {
  std::vector<MPI_Request> requests;
  std::vector<int> peers;
  std::vector<int> receives;  // bytes that a receive expects; -1: a send
  std::size_t done = 0;
  bool complete() const { return done == requests.size(); }
  void add(MPI_Request request, int peer, int receives_bytes);
  void clear();
};

/// A duplicated MPI communicator whose every wait is polled: it ends when the messages are there,
/// at the deadline, when a peer tells that it failed, when a peer's process on this machine has
/// ended, or when the launcher asks this process to end. After a failure every call throws and no
/// MPI function is called any more.
class MpiLink {
 public:
  /// `communicator` is duplicated. Collective.
  MpiLink(MPI_Comm communicator, double timeout);
  ~MpiLink();
  MpiLink(const MpiLink&) = delete;
  MpiLink& operator=(const MpiLink&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }

  /// Starts an exchange or a round of one: messages of one are never taken for those of another,
  /// even after some of its receives were cancelled.
  void begin(std::string_view step);
  /// Any number of bytes; both sides cut them at the same places.
  void send(MpiBatch& batch, int peer, const std::byte* data, std::int64_t bytes);
  void receive(MpiBatch& batch, int peer, std::byte* data, std::int64_t bytes);
  /// Returns when the batch is complete, else throws Timeout or CommunicationError that names this
  /// rank, the peers and `step`.
  void wait(MpiBatch& batch, std::string_view step);
  /// After wait(), before the rows that came are used: a peer that failed may have freed rows while
  /// they were read, and has told so before. Throws as wait() does.
  void confirm(MpiBatch& batch, std::string_view step);
  /// Sends the reason to all peers. The first call counts.
  void abort(std::string_view reason) noexcept;
  /// Gives up the requests of a batch, so that none lands in memory that the caller frees.
  void release(MpiBatch& batch) noexcept;

 private:
  struct Pause;

  void check(int code, std::string_view what, int peer, std::string_view step);
  void collect(MpiBatch& batch, std::string_view step);
  void look_around(MpiBatch& batch, std::string_view step, Pause& pause);
  void receive_abort(MpiBatch& batch, std::string_view step);
  void give_up(MpiBatch& batch, const std::string& sentence) noexcept;

  const double timeout_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  int sequence_ = 0;
  std::string step_;      // the one that began last
  std::string failure_;   // why nothing works any more; empty while it does
  std::string sentence_;  // the same as this rank says it
  PeerWatch watch_;
  std::vector<char> abort_message_;
  std::vector<int> indices_;
  std::vector<MPI_Status> statuses_;
};

}  // namespace zigzag::comm
