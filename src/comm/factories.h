#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/transport.h"
#include "zigzag/communicator.h"

namespace zigzag::comm {

std::shared_ptr<Transport> make_self_transport();

/// Element r is rank r's; `size` >= 1. Each waits at most `timeout` seconds for its peers.
std::vector<std::shared_ptr<Transport>> make_threads_transports(int size, double timeout);

/// mpi.cpp, or a stub that throws CommunicationError saying how to build it.
std::shared_ptr<Transport> make_mpi_transport(void* mpi_comm, double timeout);

std::shared_ptr<Transport> make_callback_transport(CallbackCollectives collectives);

/// Why ranks cannot exchange through NCCL here; empty when they can. Never throws.
std::string why_no_nccl() noexcept;

}  // namespace zigzag::comm
