#include "comm/mpi_link.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include <fmt/format.h>

#include "comm/mpi_environment.h"
#include "comm/mpi_guard.h"
#include "comm/wait.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

// MPI counts in int; a piece stays well below.
constexpr std::int64_t kPieceBytes = std::int64_t{1} << 30;
constexpr int kAbortTag = 1;
constexpr int kFirstTag = 2;
constexpr int kTags = 16384;  // MPI guarantees tags to 32767
constexpr std::size_t kAbortBytes = 768;

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

// After a reason to stop was seen, messages that are still on their way get this long. A dead peer
// sends nothing any more; a launcher that ends the job kills a second after it has asked.
constexpr auto kAfterDeath = 20ms;
constexpr auto kAfterSignal = 200ms;
constexpr auto kForAbort = 100ms;
constexpr auto kForRelease = 100ms;

std::string error_text(int code) {
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) return fmt::format("code {}", code);
  return std::string(text, static_cast<std::size_t>(length));
}

}  // namespace

void MpiBatch::add(MPI_Request request, int peer, int receives_bytes) {
  requests.push_back(request);
  peers.push_back(peer);
  receives.push_back(receives_bytes);
}

void MpiBatch::clear() {
  requests.clear();
  peers.clear();
  receives.clear();
  done = 0;
}

// How long a wait has found nothing: it spins, then yields, then sleeps a little, and every few
// milliseconds looks for what is not a message.
struct MpiLink::Pause {
  explicit Pause(double timeout) : deadline(timeout) {}

  void idle() {
    ++idle_rounds;
    if (idle_rounds < 64) return;
    if (idle_rounds < 4096) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(50us);
    }
  }
  bool time_to_look() {
    if (idle_rounds % 32 != 1) return false;
    const auto now = Clock::now();
    if (now < next_look) return false;
    next_look = now + 5ms;
    return true;
  }

  Deadline deadline;
  std::uint64_t idle_rounds = 0;
  Clock::time_point next_look{};
  Clock::time_point give_up = Clock::time_point::max();  // set when a reason to stop was seen
  bool peer_died = false;
  std::string reason;
};

MpiLink::MpiLink(MPI_Comm communicator, double timeout)
    : timeout_(timeout), abort_message_(kAbortBytes, '\0') {
  detail::set_mpi_limit(timeout);
  MPI_Comm_rank(communicator, &rank_);
  MPI_Comm_size(communicator, &size_);
  MpiBatch batch;
  batch.add(MPI_REQUEST_NULL, -1, -1);
  constexpr std::string_view kStep = "the duplication of the MPI communicator";
  // Not in comm_ yet: what is not complete may not be looked at.
  MPI_Comm duplicate = MPI_COMM_NULL;
  check(MPI_Comm_idup(communicator, &duplicate, &batch.requests[0]), "MPI_Comm_idup", -1, kStep);
  wait(batch, kStep);
  comm_ = duplicate;
  check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler", -1, kStep);

  constexpr std::string_view kMeet = "the first meeting of the group";
  std::vector<ProcessIdentity> identities(static_cast<std::size_t>(size_), this_process());
  const ProcessIdentity mine = this_process();
  begin(kMeet);
  batch.clear();
  for (int peer = 0; peer < size_; ++peer) {
    if (peer == rank_) continue;
    auto* theirs = reinterpret_cast<std::byte*>(&identities[static_cast<std::size_t>(peer)]);
    receive(batch, peer, theirs, sizeof(ProcessIdentity));
  }
  for (int peer = 0; peer < size_; ++peer) {
    if (peer == rank_) continue;
    send(batch, peer, reinterpret_cast<const std::byte*>(&mine), sizeof(ProcessIdentity));
  }
  wait(batch, kMeet);
  watch_ = PeerWatch(identities, rank_);
}

MpiLink::~MpiLink() {
  int finalised = 0;
  MPI_Finalized(&finalised);
  if (finalised != 0 || !failure_.empty() || comm_ == MPI_COMM_NULL) return;
  const InsideMpi inside(rank_, "the end of the group", {}, timeout_);
  MPI_Comm_free(&comm_);
}

void MpiLink::begin(std::string_view step) {
  if (!failure_.empty()) {
    throw CommunicationError(
        fmt::format("rank {} cannot start {}: the group failed before: {}", rank_, step, failure_));
  }
  sequence_ = (sequence_ + 1) % kTags;
  step_ = step;
}

void MpiLink::check(int code, std::string_view what, int peer, std::string_view step) {
  if (code == MPI_SUCCESS) return;
  const std::string with = peer < 0 ? std::string() : fmt::format(" with rank {}", peer);
  const std::string sentence =
      fmt::format("rank {} failed in {}{}: {}: {}", rank_, step, with, what, error_text(code));
  abort(sentence);
  throw CommunicationError(sentence);
}

void MpiLink::send(MpiBatch& batch, int peer, const std::byte* data, std::int64_t bytes) {
  const InsideMpi inside(rank_, step_, {&peer, 1}, timeout_);
  for (std::int64_t at = 0; at < bytes; at += kPieceBytes) {
    const int count = static_cast<int>(std::min(kPieceBytes, bytes - at));
    MPI_Request request = MPI_REQUEST_NULL;
    check(MPI_Isend(data + at, count, MPI_BYTE, peer, kFirstTag + sequence_, comm_, &request),
          "MPI_Isend", peer, "a send");
    batch.add(request, peer, -1);
  }
}

void MpiLink::receive(MpiBatch& batch, int peer, std::byte* data, std::int64_t bytes) {
  const InsideMpi inside(rank_, step_, {&peer, 1}, timeout_);
  for (std::int64_t at = 0; at < bytes; at += kPieceBytes) {
    const int count = static_cast<int>(std::min(kPieceBytes, bytes - at));
    MPI_Request request = MPI_REQUEST_NULL;
    check(MPI_Irecv(data + at, count, MPI_BYTE, peer, kFirstTag + sequence_, comm_, &request),
          "MPI_Irecv", peer, "a receive");
    batch.add(request, peer, count);
  }
}

void MpiLink::collect(MpiBatch& batch, std::string_view step) {
  const std::size_t count = batch.requests.size();
  indices_.resize(count);
  statuses_.resize(count);
  int finished = 0;
  const int code = MPI_Testsome(static_cast<int>(count), batch.requests.data(), &finished,
                                indices_.data(), statuses_.data());
  if (finished == MPI_UNDEFINED) {
    batch.done = count;
    return;
  }
  if (code == MPI_ERR_IN_STATUS) {
    for (std::size_t i = 0; i < static_cast<std::size_t>(finished); ++i) {
      const int peer = batch.peers[static_cast<std::size_t>(indices_[i])];
      check(statuses_[i].MPI_ERROR, "a message", peer, step);
    }
  }
  check(code, "MPI_Testsome", -1, step);
  // A longer message than expected is MPI's own error; a shorter one it takes for granted.
  for (std::size_t i = 0; i < static_cast<std::size_t>(finished); ++i) {
    const auto which = static_cast<std::size_t>(indices_[i]);
    int came = 0;
    if (batch.receives[which] < 0 || MPI_Get_count(&statuses_[i], MPI_BYTE, &came) != MPI_SUCCESS ||
        came == batch.receives[which]) {
      continue;
    }
    const std::string sentence = fmt::format(
        "rank {} stopped in {}: rank {} gave {} bytes where {} were expected; all ranks must make "
        "the same calls",
        rank_, step, batch.peers[which], came, batch.receives[which]);
    abort(sentence);
    throw CommunicationError(sentence);
  }
  batch.done += static_cast<std::size_t>(finished);
}

void MpiLink::wait(MpiBatch& batch, std::string_view step) {
  const InsideMpi inside(rank_, step, batch.peers, timeout_);
  Pause pause(timeout_);
  if (detail::termination_signal() != 0) look_around(batch, step, pause);
  while (!batch.complete()) {
    const std::size_t before = batch.done;
    collect(batch, step);
    InsideMpi::returned();
    if (batch.complete()) break;
    if (batch.done != before) {
      pause.idle_rounds = 0;
      continue;
    }
    pause.idle();
    if (pause.time_to_look()) look_around(batch, step, pause);
  }
}

void MpiLink::confirm(MpiBatch& batch, std::string_view step) {
  const InsideMpi inside(rank_, step, batch.peers, timeout_);
  receive_abort(batch, step);
}

void MpiLink::look_around(MpiBatch& batch, std::string_view step, Pause& pause) {
  receive_abort(batch, step);
  std::vector<int> missing;
  for (std::size_t i = 0; i < batch.requests.size(); ++i) {
    if (batch.requests[i] == MPI_REQUEST_NULL) continue;
    if (batch.peers[i] >= 0) missing.push_back(batch.peers[i]);
  }
  std::sort(missing.begin(), missing.end());
  missing.erase(std::unique(missing.begin(), missing.end()), missing.end());

  // A reason to stop is acted on a little later: the messages of a peer that ended well, and a
  // peer's word about why it failed, may still be on their way.
  const auto stop = [&](std::string reason, std::chrono::milliseconds grace) {
    pause.reason = std::move(reason);
    pause.give_up = std::min(pause.give_up, Clock::now() + grace);
  };
  const bool terminated = detail::termination_signal() != 0;
  if (terminated && !pause.peer_died) {
    stop(fmt::format("rank {} stopped in {} while it waited for {}: signal {} asked it to end, as "
                     "mpirun does when another rank has died",
                     rank_, step, ranks_text(missing), detail::termination_signal()),
         kAfterSignal);
  }
  for (int peer = 0; peer < size_; ++peer) {
    const bool needed = std::binary_search(missing.begin(), missing.end(), peer);
    if ((!needed && !terminated) || pause.peer_died || !watch_.dead(peer)) continue;
    pause.peer_died = true;
    stop(fmt::format("rank {} stopped in {}: {} has died", rank_, step, watch_.describe(peer)),
         kAfterDeath);
  }
  if (Clock::now() >= pause.give_up) {
    give_up(batch, pause.reason);
    throw CommunicationError(pause.reason);
  }
  if (pause.deadline.passed()) {
    try {
      throw_timeout(rank_, missing, step, timeout_);
    } catch (const Timeout& timeout) {
      give_up(batch, timeout.what());
      throw;
    }
  }
}

void MpiLink::receive_abort(MpiBatch& batch, std::string_view step) {
  if (comm_ == MPI_COMM_NULL) return;
  int there = 0;
  MPI_Status status;
  if (MPI_Iprobe(MPI_ANY_SOURCE, kAbortTag, comm_, &there, &status) != MPI_SUCCESS || there == 0) {
    return;
  }
  std::vector<char> text(kAbortBytes, '\0');
  MPI_Recv(text.data(), static_cast<int>(kAbortBytes), MPI_CHAR, status.MPI_SOURCE, kAbortTag,
           comm_, MPI_STATUS_IGNORE);
  text.back() = '\0';
  failure_ = text.data();
  detail::mark_mpi_failed();
  try {
    throw_peer_failed(rank_, status.MPI_SOURCE, step, text.data());
  } catch (const CommunicationError& error) {
    sentence_ = error.what();
    release(batch);
    throw;
  }
}

void MpiLink::release(MpiBatch& batch) noexcept {
  const InsideMpi inside(rank_, "the end of an exchange", batch.peers, timeout_);
  InsideMpi::will_say(sentence_);
  // A receive may not land in memory that the caller frees after the exception, nor a peer read
  // rows from it. Cancelled receives and messages between living ranks end at once; a message
  // with a dead rank never does, and nobody touches its memory any more.
  for (std::size_t i = 0; i < batch.requests.size(); ++i) {
    if (batch.requests[i] != MPI_REQUEST_NULL && batch.receives[i] >= 0) {
      MPI_Cancel(&batch.requests[i]);
    }
  }
  const auto end = Clock::now() + kForRelease;
  for (MPI_Request& request : batch.requests) {
    int done = 0;
    while (request != MPI_REQUEST_NULL && done == 0 &&
           MPI_Test(&request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && Clock::now() < end) {
      if (done == 0) std::this_thread::yield();
    }
    if (request != MPI_REQUEST_NULL) MPI_Request_free(&request);
  }
}

void MpiLink::give_up(MpiBatch& batch, const std::string& sentence) noexcept {
  // First the word to the peers, so that they leave what this rank still waits for.
  abort(sentence);
  // The duplication of a communicator cannot be cancelled.
  if (comm_ != MPI_COMM_NULL) release(batch);
}

void MpiLink::abort(std::string_view reason) noexcept {
  int finalised = 0;
  MPI_Finalized(&finalised);
  if (!failure_.empty() || finalised != 0) return;
  const InsideMpi inside(rank_, "its word to the others that it failed", {}, timeout_);
  try {
    failure_ = reason.empty() ? "no reason given" : std::string(reason);
    sentence_ = failure_;
    InsideMpi::will_say(sentence_);
  } catch (...) {
    return;
  }
  detail::mark_mpi_failed();
  if (comm_ == MPI_COMM_NULL) return;
  std::copy_n(failure_.data(), std::min(failure_.size(), kAbortBytes - 1), abort_message_.data());
  const auto end = Clock::now() + kForAbort;
  for (int peer = 0; peer < size_; ++peer) {
    if (peer == rank_ || watch_.dead(peer)) continue;
    MPI_Request request = MPI_REQUEST_NULL;
    if (MPI_Isend(abort_message_.data(), static_cast<int>(kAbortBytes), MPI_CHAR, peer, kAbortTag,
                  comm_, &request) != MPI_SUCCESS) {
      continue;
    }
    int sent = 0;
    while (MPI_Test(&request, &sent, MPI_STATUS_IGNORE) == MPI_SUCCESS && sent == 0 &&
           Clock::now() < end) {
      std::this_thread::yield();
    }
    if (sent == 0) MPI_Request_free(&request);
  }
}

}  // namespace zigzag::comm
