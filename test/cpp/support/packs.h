#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace zigzag::test {

using Lengths = std::vector<std::int64_t>;

/// A pack with a name for messages.
struct Pack {
  std::string name;
  Lengths lengths;
};

/// Every kind of pack that correctness.md lists, for a group of W ranks: empty documents, lengths
/// around 2W, around 128, primes, one long document, many short ones, mixes, real lengths, totals
/// that W does not divide, the pack [0] and the empty pack. At most `max_tokens` tokens each.
std::vector<Pack> all_packs(std::int64_t world_size, std::uint64_t seed, std::int64_t max_tokens);

/// Documents whose lengths follow the histogram test/data/document_lengths.csv, divided by
/// `shrink`, until `tokens` tokens are reached; the last is cut to fit.
Lengths real_pack(std::uint64_t seed, std::int64_t tokens, std::int64_t shrink);

/// "[3, 0, 128]"; long packs are cut.
std::string lengths_text(const Lengths& lengths);

std::int64_t total(const Lengths& lengths);

/// [0, L0, L0 + L1, ...].
std::vector<std::int64_t> cumulative(const Lengths& lengths);

}  // namespace zigzag::test
