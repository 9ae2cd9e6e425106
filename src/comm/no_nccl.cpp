// What a build without NCCL's header offers instead of nccl.cpp.
#include <string>

#include "comm/factories.h"
#include "zigzag/communicator.h"
#include "zigzag/error.h"

namespace zigzag {
namespace {

constexpr const char* kHowToBuild =
    "this build of zigzag has no NCCL: build it with -DZIGZAG_CUDA=ON -DZIGZAG_NCCL=ON where "
    "nccl.h is (scripts/fetch_cuda_headers.sh fetches it)";

}  // namespace

Communicator Communicator::nccl(const Communicator&, int) { throw CommunicationError(kHowToBuild); }

namespace comm {

std::string why_no_nccl() noexcept { return kHowToBuild; }

}  // namespace comm

}  // namespace zigzag
