#pragma once

#include <string>
#include <string_view>

#include "comm/transport.h"

namespace zigzag::comm {

/// What the ranks' GPUs exchange through, and why.
struct ExchangeChoice {
  std::string name;  // "peer", "nccl", or "self" for one rank
  std::string reason;
};

/// "peer" when the GPUs of all ranks reach each other's memory, else "nccl"; `wanted` forces one of
/// them, and "auto" leaves it to `ZIGZAG_GPU_COMM` and then to what is there. GPU `device` is this
/// rank's. A collective call over `bootstrap`: every rank returns the same choice, or every rank
/// throws: InvalidArgument or DeviceError with a reason that names ranks and GPUs.
ExchangeChoice choose_exchange(Transport& bootstrap, int device, std::string_view wanted);

}  // namespace zigzag::comm
