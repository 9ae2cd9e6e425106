#include "support/packs.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <stdexcept>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "support/random.h"

namespace zigzag::test {

namespace {

struct Bin {
  std::int64_t low;
  std::int64_t high;
  std::int64_t documents;
};

/// Lines such as `"[11, 50]",391188,2.91,3.13`.
const std::vector<Bin>& histogram() {
  static const std::vector<Bin> bins = [] {
    const std::string path = std::string(ZIGZAG_TEST_DATA) + "/document_lengths.csv";
    std::ifstream file(path);
    if (!file) throw std::runtime_error("cannot open " + path);
    std::vector<Bin> result;
    for (std::string line; std::getline(file, line);) {
      if (line.empty() || line[0] != '"') continue;
      const auto comma = line.find(',');
      const auto close = line.find(']');
      result.push_back({std::atoll(line.c_str() + 2), std::atoll(line.c_str() + comma + 1),
                        std::atoll(line.c_str() + close + 3)});
    }
    if (result.empty()) throw std::runtime_error(path + " has no bins");
    return result;
  }();
  return bins;
}

}  // namespace

Lengths real_pack(std::uint64_t seed, std::int64_t tokens, std::int64_t shrink) {
  const std::vector<Bin>& bins = histogram();
  std::int64_t documents = 0;
  for (const Bin& bin : bins) documents += bin.documents;
  Stream stream(mix(seed, 77));
  Lengths result;
  std::int64_t sum = 0;
  while (sum < tokens) {
    std::int64_t number = stream.integer(0, documents - 1);
    std::size_t b = 0;
    while (number >= bins[b].documents) number -= bins[b++].documents;
    const std::int64_t length = stream.integer(bins[b].low, bins[b].high) / shrink;
    result.push_back(std::min(length, tokens - sum));
    sum += result.back();
  }
  return result;
}

std::vector<Pack> all_packs(std::int64_t world_size, std::uint64_t seed, std::int64_t max_tokens) {
  const std::int64_t chunks = 2 * world_size;
  Stream stream(mix(seed, 5));
  Lengths many(200);
  for (auto& length : many) length = stream.integer(0, 2);
  std::vector<Pack> packs{
      {"empty pack", {}},
      {"one empty document", {0}},
      {"one token", {1}},
      {"two tokens", {2}},
      {"around 2W", {chunks - 1, chunks, chunks + 1}},
      {"fewer tokens than ranks", {1, 0, 0, 1}},
      {"around 128", {127, 128, 129}},
      {"primes", {2, 3, 5, 7, 11, 13, 17, 31, 61, 101}},
      {"one long document", {max_tokens}},
      {"one long document that 2W does not divide", {max_tokens - max_tokens % chunks - 1}},
      {"hundreds of short documents", many},
      {"a mix", {1, max_tokens / 2, 0, 2, 3, chunks, 1, 130, 0, 0, 17, 1}},
      {"divisible lengths", {4 * chunks, 8 * chunks, chunks}},
      {"real lengths", real_pack(seed, max_tokens, 16)},
  };
  // A total that W does not divide, whatever the others give.
  packs.push_back({"a total not divisible by W", {world_size * 9 + 1, 40 * world_size}});
  return packs;
}

std::string lengths_text(const Lengths& lengths) {
  constexpr std::size_t kShown = 24;
  if (lengths.size() <= kShown) return fmt::format("[{}]", fmt::join(lengths, ", "));
  return fmt::format("[{}, ... {} documents]",
                     fmt::join(lengths.begin(), lengths.begin() + kShown, ", "), lengths.size());
}

std::int64_t total(const Lengths& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
}

std::vector<std::int64_t> cumulative(const Lengths& lengths) {
  std::vector<std::int64_t> result{0};
  for (const std::int64_t length : lengths) result.push_back(result.back() + length);
  return result;
}

}  // namespace zigzag::test
