#include "support/random.h"

#include <cstdlib>
#include <random>

namespace zigzag::test {

std::uint64_t base_seed() {
  static const std::uint64_t seed = [] {
    const char* text = std::getenv("ZIGZAG_TEST_SEED");
    if (text != nullptr && *text != '\0') return std::strtoull(text, nullptr, 10);
    return static_cast<unsigned long long>(std::random_device{}());
  }();
  return seed;
}

std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  std::uint64_t x = a + 0x9e3779b97f4a7c15U * (b + 1);
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31U);
}

std::uint64_t Stream::word() {
  state_ += 0x9e3779b97f4a7c15U;
  return mix(state_, 0);
}

double Stream::uniform() { return static_cast<double>(word() >> 11U) * 0x1p-53; }

std::int64_t Stream::integer(std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(word() % static_cast<std::uint64_t>(high - low + 1));
}

double Stream::normal() {
  const std::uint64_t bits = word();
  std::uint64_t sum = 0;
  for (unsigned i = 0; i < 4; ++i) sum += (bits >> (16U * i)) & 0xffffU;
  constexpr double kSqrt3 = 1.7320508075688772;
  return (static_cast<double>(sum) * 0x1p-16 - 2.0 + 0x1p-15) * kSqrt3;
}

}  // namespace zigzag::test
