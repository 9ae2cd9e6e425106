// What a build without NCCL's header offers instead of nccl.cpp.
#include "zigzag/communicator.h"
#include "zigzag/error.h"

namespace zigzag {

Communicator Communicator::nccl(const Communicator&, int) {
  throw CommunicationError(
      "this build of zigzag has no NCCL: build it with -DZIGZAG_CUDA=ON -DZIGZAG_NCCL=ON where "
      "nccl.h is (scripts/fetch_cuda_headers.sh fetches it)");
}

}  // namespace zigzag
