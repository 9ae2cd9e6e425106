#pragma once

#include <cstdint>
#include <string>

#include "comm/transport.h"
#include "zigzag/options.h"
#include "zigzag/plan.h"
#include "zigzag/tensor.h"

namespace zigzag::comm {

/// Which operation a rank is about to start; kConnect: to exchange through GPUs it has not used
/// yet.
enum class Direction : std::uint8_t { kForward, kBackward, kConnect };

/// What every rank of a collective call must pass alike. A rank whose own arguments are invalid
/// sets `error` and takes part all the same, so that its peers get a sentence and not a hang; the
/// other fields then do not matter.
struct Agreement {
  Direction direction = Direction::kForward;
  std::uint64_t fingerprint = 0;   // Plan::fingerprint()
  std::int64_t total_tokens = 0;   // of the whole pack; told in the message about another pack
  std::int64_t num_documents = 0;  // likewise
  std::int64_t world_size = 0;     // the plan's
  DType dtype = DType::kFloat32;
  DeviceType device = DeviceType::kCpu;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  Mask mask = {};
  double scale = 0;
  double softcap = 0;
  std::int64_t kv_heads_per_stage = 0;  // as resolved, never 0
  Kernels kernels = Kernels::kFused;
  bool deterministic = false;
  std::string error = {};  // why this rank's arguments are invalid; empty when they are valid
};

/// Fills the fields that a plan gives.
void set_plan(Agreement& agreement, const Plan& plan);

/// Compares the agreement of all ranks: one small all_gather, none with one rank. Returns when all
/// are valid and equal; otherwise every rank throws. A rank with an `error` of its own throws it as
/// InvalidArgument, also when its peers fail or never come; all others throw a CommunicationError
/// whose one sentence, the same on each, names the ranks and the difference. No abort is needed
/// after either, since every rank throws.
void agree(Transport& transport, const Agreement& mine);

}  // namespace zigzag::comm
