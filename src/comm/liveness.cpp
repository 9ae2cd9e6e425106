#include "comm/liveness.h"

#include <cerrno>
#include <csignal>
#include <fstream>
#include <functional>
#include <string>
#include <utility>

#include <fmt/format.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

namespace zigzag::comm {
namespace {

int open_process(std::int64_t pid) {
#ifdef SYS_pidfd_open
  return static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0));
#else
  errno = ENOSYS;
  return pid > 0 ? -1 : -1;
#endif
}

}  // namespace

ProcessIdentity this_process() {
  ProcessIdentity identity;
  identity.pid = static_cast<std::int64_t>(getpid());
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string boot;
  struct stat status {};
  // Without both, a pid of another container could be taken for a peer's.
  if (!std::getline(file, boot) || stat("/proc/self/ns/pid", &status) != 0) return identity;
  identity.machine = std::hash<std::string>{}(fmt::format("{} {}", boot, status.st_ino));
  return identity;
}

PeerWatch::PeerWatch(std::span<const ProcessIdentity> ranks, int self) : peers_(ranks.size()) {
  const ProcessIdentity mine = ranks[static_cast<std::size_t>(self)];
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    const bool here = mine.machine != 0 && ranks[r].machine == mine.machine;
    if (!here || static_cast<int>(r) == self || ranks[r].pid == mine.pid) continue;
    peers_[r].pid = ranks[r].pid;
    peers_[r].descriptor = open_process(ranks[r].pid);
  }
}

PeerWatch::~PeerWatch() {
  for (const Peer& peer : peers_) {
    if (peer.descriptor >= 0) close(peer.descriptor);
  }
}

PeerWatch::PeerWatch(PeerWatch&& other) noexcept : peers_(std::exchange(other.peers_, {})) {}

PeerWatch& PeerWatch::operator=(PeerWatch&& other) noexcept {
  std::swap(peers_, other.peers_);
  return *this;
}

bool PeerWatch::dead(int rank) const {
  const auto r = static_cast<std::size_t>(rank);
  if (r >= peers_.size() || peers_[r].pid == 0) return false;
  const Peer& peer = peers_[r];
  if (peer.descriptor < 0) return kill(static_cast<pid_t>(peer.pid), 0) != 0 && errno == ESRCH;
  pollfd descriptor{.fd = peer.descriptor, .events = POLLIN, .revents = 0};
  return poll(&descriptor, 1, 0) > 0 && (descriptor.revents & POLLIN) != 0;
}

std::string PeerWatch::describe(int rank) const {
  const auto r = static_cast<std::size_t>(rank);
  if (r >= peers_.size() || peers_[r].pid == 0) return fmt::format("rank {}", rank);
  return fmt::format("rank {} (process {} of this machine)", rank, peers_[r].pid);
}

}  // namespace zigzag::comm
