#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/transport.h"
#include "zigzag/communicator.h"

namespace zigzag::test {

/// Runs `work` as `world_size` ranks, threads of this process. A rank that throws or returns leaves
/// the group, so that its peers stop waiting. When all have ended, the first exception in the order
/// of ranks that is not a peer's mere report of another rank's failure goes on.
void run_ranks(int world_size, const std::function<void(const Communicator&)>& work);

/// The same with what each rank threw, by rank: "InvalidArgument: ..." or empty.
std::vector<std::string> collect_ranks(int world_size,
                                       const std::function<void(const Communicator&)>& work);

/// Wraps a rank's transport so that it comes late: a different, seeded moment at every exchange.
Communicator delayed(const Communicator& communicator, std::uint64_t seed);

/// Wraps a rank's transport so that it gathers and reduces, as ranks of several processes do.
Communicator gathering(const Communicator& communicator);

/// A group of one rank whose every exchange throws: nothing may call it.
Communicator forbidden();

}  // namespace zigzag::test
