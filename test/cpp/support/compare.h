#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

namespace zigzag::test {

/// How far a tensor may be from its reference.
struct Bound {
  double relative_l2;
  /// Largest difference of one element, as a part of the largest reference element.
  double max_abs;
};

/// What a comparison found. inf, -inf and nan count as special values and must stand at the same
/// places; errors are over the other elements.
struct Difference {
  std::int64_t special_mismatches = 0;
  std::int64_t first_special = -1;  // element number
  double relative_l2 = 0;
  double max_abs = 0;  // in units of the values
  double reference_max = 0;
  double reference_l2 = 0;
  std::int64_t worst = -1;  // element number
};

/// Compares element by element. The sizes must be equal.
Difference compare(std::span<const double> actual, std::span<const double> expected);

/// Success within the bound; otherwise where the worst element stands (in coordinates of `shape`),
/// how many are out, the seed and the command that repeats the test. A NaN never passes.
testing::AssertionResult close(std::string_view name, std::span<const double> actual,
                               std::span<const double> expected,
                               std::span<const std::int64_t> shape, const Bound& bound);

/// Success when all bytes are equal; otherwise the first different element.
testing::AssertionResult same_bits(std::string_view name, std::span<const std::byte> actual,
                                   std::span<const std::byte> expected, std::int64_t item_size);

/// "ZIGZAG_TEST_SEED=1 build/attention_test --gtest_filter=Suite.Case".
std::string repeat_command();

}  // namespace zigzag::test
