#include "comm/agree.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "comm/wait.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

// What travels. Every byte is set, so that equal agreements are equal bytes.
struct Record {
  std::uint64_t fingerprint;
  std::int64_t total_tokens;
  std::int64_t num_documents;
  std::int64_t world_size;
  std::int64_t heads;
  std::int64_t kv_heads;
  std::int64_t head_dim;
  std::int64_t window_left;
  std::int64_t window_right;
  std::int64_t kv_heads_per_stage;
  double scale;
  double softcap;
  std::uint8_t direction;
  std::uint8_t dtype;
  std::uint8_t device;
  std::uint8_t causal;
  std::uint8_t kernels;
  std::uint8_t deterministic;
  std::uint8_t has_error;
  std::uint8_t unused;
};
static_assert(std::is_trivially_copyable_v<Record> && sizeof(Record) == 12 * 8 + 8);

constexpr std::size_t kSentenceBytes = 512;
using Sentence = std::array<char, kSentenceBytes>;

Record make_record(const Agreement& a) {
  return {.fingerprint = a.fingerprint,
          .total_tokens = a.total_tokens,
          .num_documents = a.num_documents,
          .world_size = a.world_size,
          .heads = a.heads,
          .kv_heads = a.kv_heads,
          .head_dim = a.head_dim,
          .window_left = a.mask.window_left,
          .window_right = a.mask.window_right,
          .kv_heads_per_stage = a.kv_heads_per_stage,
          .scale = a.scale,
          .softcap = a.softcap,
          .direction = static_cast<std::uint8_t>(a.direction),
          .dtype = static_cast<std::uint8_t>(a.dtype),
          .device = static_cast<std::uint8_t>(a.device),
          .causal = static_cast<std::uint8_t>(a.mask.causal),
          .kernels = static_cast<std::uint8_t>(a.kernels),
          .deterministic = static_cast<std::uint8_t>(a.deterministic),
          .has_error = static_cast<std::uint8_t>(!a.error.empty()),
          .unused = 0};
}

// One thing that ranks must share, in words.
using Describe = std::string (*)(const Record&);

std::string describe_operation(const Record& r) {
  switch (static_cast<Direction>(r.direction)) {
    case Direction::kForward:
      return "started a forward";
    case Direction::kBackward:
      return "started a backward";
    case Direction::kConnect:
      return "came with a GPU that its group does not exchange through yet";
  }
  return "started something unknown";
}
std::string describe_pack(const Record& r) {
  return fmt::format("has a pack of {} tokens in {} documents over {} ranks (fingerprint {:016x})",
                     r.total_tokens, r.num_documents, r.world_size, r.fingerprint);
}
std::string describe_dtype(const Record& r) {
  return fmt::format("has dtype {}", dtype_name(static_cast<DType>(r.dtype)));
}
std::string describe_device(const Record& r) {
  const bool cpu = r.device == static_cast<std::uint8_t>(DeviceType::kCpu);
  return fmt::format("has tensors on {}", cpu ? "cpu" : "cuda");
}
std::string describe_heads(const Record& r) {
  return fmt::format("has {} heads, {} kv_heads and head_dim {}", r.heads, r.kv_heads, r.head_dim);
}
std::string describe_mask(const Record& r) {
  return fmt::format("has causal {} and window {},{}", r.causal != 0, r.window_left,
                     r.window_right);
}
std::string describe_scale(const Record& r) {
  return fmt::format("has softmax_scale {} and softcap {}", r.scale, r.softcap);
}
std::string describe_stage(const Record& r) {
  return fmt::format("has kv_heads_per_stage {}", r.kv_heads_per_stage);
}
std::string describe_kernels(const Record& r) {
  return fmt::format("has kernels {} and deterministic {}",
                     kernels_name(static_cast<Kernels>(r.kernels)), r.deterministic != 0);
}

constexpr Describe kDescriptions[] = {
    describe_operation, describe_dtype, describe_device, describe_heads,   describe_mask,
    describe_scale,     describe_pack,  describe_stage,  describe_kernels,
};

// The first thing in which some rank differs from rank 0, and every rank's word on it.
std::string difference(std::span<const Record> records) {
  for (const Describe describe : kDescriptions) {
    const std::string first = describe(records[0]);
    std::map<std::string, std::vector<int>> others;
    for (std::size_t r = 1; r < records.size(); ++r) {
      std::string text = describe(records[r]);
      if (text != first) others[std::move(text)].push_back(static_cast<int>(r));
    }
    if (others.empty()) continue;
    std::string sentence;
    for (const auto& [text, ranks] : others) {
      const std::string plural = "have" + text.substr(3);
      const bool many = ranks.size() > 1 && text.starts_with("has");
      sentence += fmt::format("{} {}, ", ranks_text(ranks), many ? plural : text);
    }
    return fmt::format("{}rank 0 {}; all ranks must pass the same", sentence, first);
  }
  return "the ranks' arguments differ; all ranks must pass the same";
}

[[noreturn]] void throw_invalid(Transport& transport, std::span<const Record> records,
                                const std::string& mine) {
  Sentence sentence{};
  std::copy_n(mine.data(), std::min(mine.size(), kSentenceBytes - 1), sentence.data());
  const std::vector<Sentence> sentences = all_gather(transport, sentence);
  transport.settle();
  if (!mine.empty()) throw InvalidArgument(mine);
  std::vector<int> invalid;
  for (std::size_t r = 0; r < records.size(); ++r) {
    if (records[r].has_error != 0) invalid.push_back(static_cast<int>(r));
  }
  throw CommunicationError(
      fmt::format("{} passed invalid arguments, so no rank ran: {}", ranks_text(invalid),
                  sentences[static_cast<std::size_t>(invalid.front())].data()));
}

void agree_with_others(Transport& transport, const Agreement& mine) {
  const std::vector<Record> records = all_gather(transport, make_record(mine));
  const auto invalid = [](const Record& r) { return r.has_error != 0; };
  if (std::any_of(records.begin(), records.end(), invalid)) {
    throw_invalid(transport, records, mine.error);
  }
  for (const Record& record : records) {
    // Bit for bit: a NaN that all pass is no difference, and there is no padding (asserted above).
    // NOLINTNEXTLINE(bugprone-suspicious-memory-comparison)
    if (std::memcmp(&record, &records[0], sizeof(Record)) != 0) {
      transport.settle();
      throw CommunicationError(difference(records));
    }
  }
}

}  // namespace

void set_plan(Agreement& agreement, const Plan& plan) {
  agreement.fingerprint = plan.fingerprint();
  agreement.total_tokens = plan.total_tokens();
  agreement.num_documents = plan.num_documents();
  agreement.world_size = plan.world_size();
}

void agree(Transport& transport, const Agreement& mine) {
  if (transport.size() == 1) {
    if (!mine.error.empty()) throw InvalidArgument(mine.error);
    return;
  }
  try {
    agree_with_others(transport, mine);
  } catch (const EnvironmentError& failure) {
    // The own mistake is what a caller can mend; an interrupt or a lack of memory goes on.
    if (mine.error.empty()) throw;
    throw InvalidArgument(
        fmt::format("{} (and the other ranks could not be told: {})", mine.error, failure.what()));
  }
}

}  // namespace zigzag::comm
