#pragma once

#include <stdexcept>
#include <string>

namespace zigzag {

/// The caller's mistake: a malformed pack, shape, option or file. The message is one sentence that
/// says what is wrong, which value was given and what is allowed. Thrown before any work starts.
class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// Something outside the caller's arguments failed: a missing library, a dead peer, a full disk.
class EnvironmentError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A rank died, broke the protocol or disagrees with its peers. The message names rank, peer and
/// step.
class CommunicationError : public EnvironmentError {
 public:
  using EnvironmentError::EnvironmentError;
};

/// A rank waited for a peer longer than the deadline (`ZIGZAG_TIMEOUT_S`). The message names rank,
/// peer, step and the seconds waited.
class Timeout : public EnvironmentError {
 public:
  using EnvironmentError::EnvironmentError;
};

/// A device or one of its libraries failed or is absent; the message decodes its error code.
class DeviceError : public EnvironmentError {
 public:
  using EnvironmentError::EnvironmentError;
};

}  // namespace zigzag
