#pragma once

#include <functional>

#include "zigzag/communicator.h"

namespace zigzag::comm {

/// The same ranks, whose short messages go through memory that they share where all of them are
/// processes of one machine: microseconds where a group of processes takes many times that. Found
/// out at the first message; otherwise, and for rows and long messages, `base` serves. A wait for
/// a message ends when a peer fails, when its process dies, or after `timeout` seconds. `idle` is
/// called every 50 ms of waiting and may throw.
Communicator share_messages(const Communicator& base, double timeout, std::function<void()> idle);

}  // namespace zigzag::comm
