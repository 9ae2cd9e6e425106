#include "comm/choose.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <unistd.h>

#include "comm/agree.h"
#include "comm/factories.h"
#include "cuda/runtime.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

constexpr std::size_t kTextBytes = 256;

/// How a rank introduces itself. Plain bytes.
struct Introduction {
  char host[64] = {};
  char bus[32] = {};
  char wanted[8] = {};
  char no_nccl[kTextBytes] = {};  // why it has no NCCL; empty when it has
};

/// Why a rank's GPU does not reach that of another.
struct Verdict {
  std::int32_t peer = -1;  // -1: it reaches all
  char reason[kTextBytes] = {};
};

template <std::size_t size>
void store(char (&field)[size], std::string_view text) {
  std::memcpy(field, text.data(), std::min(text.size(), size - 1));
}

/// What the caller or the environment asks for: "auto", "peer" or "nccl".
std::string resolve(std::string_view wanted) {
  const auto known = [](std::string_view word) {
    return word == "auto" || word == "peer" || word == "nccl";
  };
  if (!known(wanted)) {
    throw InvalidArgument(
        fmt::format("the exchange of GPUs is '{}'; it must be auto, peer or nccl", wanted));
  }
  const char* variable = std::getenv("ZIGZAG_GPU_COMM");
  if (wanted != "auto" || variable == nullptr || *variable == '\0') return std::string(wanted);
  if (!known(variable)) {
    throw InvalidArgument(
        fmt::format("ZIGZAG_GPU_COMM is '{}'; it must be auto, peer or nccl", variable));
  }
  return variable;
}

Introduction introduce(int device, std::string_view wanted) {
  Introduction mine;
  (void)gethostname(mine.host, sizeof(mine.host) - 1);
  store(mine.wanted, resolve(wanted));
  store(mine.bus, cuda::bus_id({DeviceType::kCuda, device}));
  store(mine.no_nccl, why_no_nccl());
  return mine;
}

Verdict judge(int device, int rank, const std::vector<Introduction>& all) {
  Verdict verdict;
  const Introduction& mine = all[static_cast<std::size_t>(rank)];
  for (std::size_t r = 0; r < all.size() && verdict.peer < 0; ++r) {
    std::string why;
    if (std::strcmp(all[r].host, mine.host) != 0) {
      why = fmt::format("they are on hosts {} and {}", mine.host, all[r].host);
    } else if (std::strcmp(all[r].bus, mine.bus) != 0) {
      why = cuda::why_unreachable({DeviceType::kCuda, device}, all[r].bus);
    }
    if (why.empty()) continue;
    verdict.peer = static_cast<std::int32_t>(r);
    store(verdict.reason, why);
  }
  return verdict;
}

/// Why not all ranks reach each other; empty when they do.
std::string why_no_peer(const std::vector<Introduction>& all,
                        const std::vector<Verdict>& verdicts) {
  for (std::size_t r = 0; r < verdicts.size(); ++r) {
    if (verdicts[r].peer < 0) continue;
    const auto other = static_cast<std::size_t>(verdicts[r].peer);
    return fmt::format("the GPU of rank {} ({}) does not reach that of rank {} ({}): {}", r,
                       all[r].bus, other, all[other].bus, verdicts[r].reason);
  }
  return "";
}

/// Why NCCL cannot serve these ranks; empty when it can.
std::string why_not_nccl(const std::vector<Introduction>& all) {
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (all[r].no_nccl[0] != '\0') return fmt::format("rank {}: {}", r, all[r].no_nccl);
    for (std::size_t s = 0; s < r; ++s) {
      if (std::strcmp(all[r].host, all[s].host) == 0 && std::strcmp(all[r].bus, all[s].bus) == 0) {
        return fmt::format("ranks {} and {} share the GPU {}, and NCCL needs a GPU a rank", s, r,
                           all[r].bus);
      }
    }
  }
  return "";
}

}  // namespace

ExchangeChoice choose_exchange(Transport& bootstrap, int device, std::string_view wanted) {
  if (bootstrap.size() == 1) return {"self", "one rank exchanges nothing"};
  Agreement agreement;
  agreement.direction = Direction::kConnect;
  agreement.device = DeviceType::kCuda;
  Introduction mine;
  std::string device_error;
  try {
    mine = introduce(device, wanted);
  } catch (const InvalidArgument& error) {
    agreement.error = error.what();
  } catch (const DeviceError& error) {
    agreement.error = device_error = error.what();
  }
  try {
    agree(bootstrap, agreement);
  } catch (const InvalidArgument&) {
    if (!device_error.empty()) throw DeviceError(device_error);
    throw;
  }
  const std::vector<Introduction> all = all_gather(bootstrap, mine);
  const std::vector<Verdict> verdicts = all_gather(bootstrap, judge(device, bootstrap.rank(), all));
  const std::string asked = mine.wanted;
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (std::strcmp(all[r].wanted, all[0].wanted) == 0) continue;
    throw CommunicationError(
        fmt::format("rank 0 asks for the exchange '{}' and rank {} for '{}'; "
                    "all ranks must ask for the same",
                    all[0].wanted, r, all[r].wanted));
  }
  const std::string no_peer = why_no_peer(all, verdicts);
  const std::string no_nccl = why_not_nccl(all);
  if (asked == "nccl") {
    if (!no_nccl.empty()) throw DeviceError("the exchange 'nccl' was asked for: " + no_nccl);
    return {"nccl", "it was asked for"};
  }
  if (no_peer.empty()) {
    return {"peer", asked == "peer" ? "it was asked for"
                                    : fmt::format("the GPUs of all {} ranks reach each other's "
                                                  "memory",
                                                  all.size())};
  }
  if (asked == "peer") throw DeviceError("the exchange 'peer' was asked for: " + no_peer);
  if (!no_nccl.empty()) {
    throw DeviceError(fmt::format("the ranks' GPUs cannot exchange: peer memory: {}; NCCL: {}",
                                  no_peer, no_nccl));
  }
  return {"nccl", no_peer};
}

}  // namespace zigzag::comm
