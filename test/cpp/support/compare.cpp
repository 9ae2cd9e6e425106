#include "support/compare.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "support/random.h"

namespace zigzag::test {

namespace {

/// 0 for a finite value, else which special value it is.
int special(double x) {
  if (std::isnan(x)) return 3;
  if (std::isinf(x)) return x > 0 ? 1 : 2;
  return 0;
}

std::string place(std::int64_t number, std::span<const std::int64_t> shape) {
  std::vector<std::int64_t> index(shape.size());
  for (std::size_t d = shape.size(); d-- > 0;) {
    const std::int64_t extent = std::max<std::int64_t>(1, shape[d]);
    index[d] = number % extent;
    number /= extent;
  }
  return fmt::format("[{}]", fmt::join(index, ", "));
}

}  // namespace

Difference compare(std::span<const double> actual, std::span<const double> expected) {
  Difference result;
  double error = 0;
  double norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const auto number = static_cast<std::int64_t>(i);
    if (special(actual[i]) != special(expected[i])) {
      if (result.special_mismatches++ == 0) result.first_special = number;
      continue;
    }
    if (special(expected[i]) != 0) continue;
    const double difference = std::abs(actual[i] - expected[i]);
    error += difference * difference;
    norm += expected[i] * expected[i];
    result.reference_max = std::max(result.reference_max, std::abs(expected[i]));
    if (result.worst < 0 || difference > result.max_abs) {
      result.max_abs = difference;
      result.worst = number;
    }
  }
  result.reference_l2 = std::sqrt(norm);
  result.relative_l2 = error == 0 ? 0 : std::sqrt(error / norm);
  return result;
}

std::string repeat_command() {
  const auto* info = testing::UnitTest::GetInstance()->current_test_info();
  std::error_code error;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  return fmt::format("repeat: ZIGZAG_TEST_SEED={} {} --gtest_filter={}.{}", base_seed(),
                     program.string(), info == nullptr ? "*" : info->test_suite_name(),
                     info == nullptr ? "*" : info->name());
}

testing::AssertionResult close(std::string_view name, std::span<const double> actual,
                               std::span<const double> expected,
                               std::span<const std::int64_t> shape, const Bound& bound) {
  if (actual.size() != expected.size()) {
    return testing::AssertionFailure()
           << name << " has " << actual.size() << " elements instead of " << expected.size();
  }
  const Difference found = compare(actual, expected);
  if (found.special_mismatches > 0) {
    const auto at = static_cast<std::size_t>(found.first_special);
    return testing::AssertionFailure() << fmt::format(
               "{}: inf, -inf or nan stand at different places in {} of {} elements, first at {}: "
               "{} instead of {}\n{}",
               name, found.special_mismatches, expected.size(), place(found.first_special, shape),
               actual[at], expected[at], repeat_command());
  }
  const double limit = bound.max_abs * found.reference_max;
  // Written so that a NaN fails.
  if (found.relative_l2 <= bound.relative_l2 && found.max_abs <= limit) {
    return testing::AssertionSuccess();
  }
  std::int64_t out = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    out += special(expected[i]) == 0 && !(std::abs(actual[i] - expected[i]) <= limit);
  }
  const auto at = static_cast<std::size_t>(found.worst);
  return testing::AssertionFailure() << fmt::format(
             "{}: relative L2 {:.3e} (bound {:.3e}), largest difference {:.3e} (bound {:.3e} = "
             "{:.1e} of {:.3e}), {} of {} elements out, worst at {}: {:.9g} instead of {:.9g}\n{}",
             name, found.relative_l2, bound.relative_l2, found.max_abs, limit, bound.max_abs,
             found.reference_max, out, expected.size(), place(found.worst, shape), actual[at],
             expected[at], repeat_command());
}

testing::AssertionResult same_bits(std::string_view name, std::span<const std::byte> actual,
                                   std::span<const std::byte> expected, std::int64_t item_size) {
  if (actual.size() != expected.size()) {
    return testing::AssertionFailure()
           << name << " has " << actual.size() << " bytes instead of " << expected.size();
  }
  const auto item = static_cast<std::size_t>(item_size);
  std::int64_t out = 0;
  std::size_t first = 0;
  for (std::size_t i = 0; i < actual.size(); i += item) {
    if (std::equal(actual.begin() + static_cast<std::ptrdiff_t>(i),
                   actual.begin() + static_cast<std::ptrdiff_t>(i + item),
                   expected.begin() + static_cast<std::ptrdiff_t>(i))) {
      continue;
    }
    if (out++ == 0) first = i / item;
  }
  if (out == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure()
         << fmt::format("{}: {} of {} elements have other bits, first element {}\n{}", name, out,
                        actual.size() / item, first, repeat_command());
}

}  // namespace zigzag::test
