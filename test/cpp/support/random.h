#pragma once

#include <cstdint>

namespace zigzag::test {

/// The seed of this process's inputs: `ZIGZAG_TEST_SEED`, else a fresh one. Failures print it.
std::uint64_t base_seed();

/// A mixed 64-bit word: equal arguments give equal words on every rank and machine.
std::uint64_t mix(std::uint64_t a, std::uint64_t b);

/// A stream of numbers that starts anew from its arguments, so that each rank draws any rows of a
/// tensor without drawing the others.
class Stream {
 public:
  explicit Stream(std::uint64_t seed) : state_(seed) {}

  std::uint64_t word();
  /// 0 <= x < 1.
  double uniform();
  /// low <= x <= high.
  std::int64_t integer(std::int64_t low, std::int64_t high);
  /// Mean 0, variance 1, bounded by 3.47: a sum of four uniform numbers.
  double normal();

 private:
  std::uint64_t state_;
};

}  // namespace zigzag::test
