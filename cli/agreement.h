#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "group.h"

namespace zigzag::cli {

/// A 64-bit fingerprint of bytes that ranks compare; not against forgery.
class Fingerprint {
 public:
  void add(std::span<const std::byte> bytes);
  std::uint64_t value() const;

 private:
  std::uint64_t state_ = 0x9e3779b97f4a7c15U;
};

/// One thing that all ranks of a command must share: what a sentence calls it and its value.
struct Shared {
  std::string name;
  std::string value;
};

/// Compares what the processes of an MPI job were told; every process names the same things in the
/// same order. Nothing to do for threads, which share one command line. A collective call: when a
/// value differs, every process throws CommunicationError with the ranks and the first such thing.
void agree_on(const Group& group, const std::vector<Shared>& things);

}  // namespace zigzag::cli
