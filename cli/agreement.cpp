#include "agreement.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <string_view>

#include <fmt/format.h>

#include "comm/transport.h"
#include "comm/wait.h"
#include "zigzag/error.h"

namespace zigzag::cli {
namespace {

// What travels of a value that differs; longer ones are cut.
constexpr std::size_t kTextBytes = 128;
using Text = std::array<char, kTextBytes>;

Text shown(const std::string& value) {
  Text text{};
  std::copy_n(value.data(), std::min(value.size(), kTextBytes - 1), text.data());
  if (value.size() >= kTextBytes) std::copy_n("...", 3, text.end() - 4);
  return text;
}

template <typename T>
std::vector<T> gather_all(const Communicator& communicator, std::span<const T> mine) {
  const std::vector<std::byte> bytes = communicator.all_gather(std::as_bytes(mine));
  std::vector<T> all(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(all.data(), bytes.data(), bytes.size());
  return all;
}

// "rank 1 has --seed 7, rank 0 has --seed 0; ..."
std::string difference(const std::string& name, std::span<const Text> texts) {
  const std::string_view first = texts[0].data();
  std::map<std::string_view, std::vector<int>> others;
  for (std::size_t r = 1; r < texts.size(); ++r) {
    const std::string_view text = texts[r].data();
    if (text != first) others[text].push_back(static_cast<int>(r));
  }
  // Long values may differ behind what is shown of them.
  if (others.empty())
    return fmt::format("the ranks differ in {}; all must be given the same", name);
  std::string sentence;
  for (const auto& [text, ranks] : others) {
    sentence += fmt::format("{} {} {} {}, ", comm::ranks_text(ranks),
                            ranks.size() > 1 ? "have" : "has", name, text);
  }
  return sentence + fmt::format("rank 0 has {} {}; all ranks must be given the same", name, first);
}

}  // namespace

void Fingerprint::add(std::span<const std::byte> bytes) {
  const auto mix = [this](std::uint64_t word) {
    state_ = (state_ ^ word) * 0xff51afd7ed558ccdU;
    state_ ^= state_ >> 32U;
  };
  mix(bytes.size());
  while (!bytes.empty()) {
    std::uint64_t word = 0;
    const std::size_t count = std::min(bytes.size(), sizeof(word));
    std::memcpy(&word, bytes.data(), count);
    mix(word);
    bytes = bytes.subspan(count);
  }
}

std::uint64_t Fingerprint::value() const { return state_; }

void agree_on(const Group& group, const std::vector<Shared>& things) {
  if (!group.is_mpi() || group.size() == 1) return;
  const Communicator communicator = Communicator::mpi();
  std::vector<std::uint64_t> mine;
  for (const Shared& thing : things) {
    Fingerprint fingerprint;
    fingerprint.add(std::as_bytes(std::span(thing.value)));
    mine.push_back(fingerprint.value());
  }
  const std::vector<std::uint64_t> all =
      gather_all(communicator, std::span<const std::uint64_t>(mine));
  for (std::size_t i = 0; i < things.size(); ++i) {
    bool equal = true;
    for (std::size_t at = i; at < all.size(); at += things.size()) equal &= all[at] == all[i];
    if (equal) continue;
    const Text text = shown(things[i].value);
    const std::vector<Text> texts = gather_all(communicator, std::span<const Text>(&text, 1));
    communicator.transport().settle();
    throw CommunicationError(difference(things[i].name, texts));
  }
}

}  // namespace zigzag::cli
