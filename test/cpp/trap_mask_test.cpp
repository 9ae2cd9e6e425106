// Traps of masks and of the softmax: alignment, the full mask, windows, empty states, masked rows
// that are not finite.
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "support/attention_case.h"
#include "support/compare.h"
#include "support/packs.h"
#include "support/plan_check.h"
#include "support/random.h"

namespace zigzag::test {
namespace {

using std::int64_t;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// A problem whose out counts the visible keys and names the last: all scores are equal, v is the
/// key's position.
AttentionCase counting_case(const Lengths& lengths, const Mask& mask) {
  AttentionCase problem;
  problem.lengths = lengths;
  problem.heads = 1;
  problem.kv_heads = 1;
  problem.head_dim = 8;
  problem.options.mask = mask;
  problem.backward = false;
  const std::vector<int64_t> cu_seqlens = cumulative(lengths);
  problem.edit = [cu_seqlens](Input which, int64_t token, int64_t, int64_t c, double) {
    if (which != Input::kV) return 0.0;
    std::size_t document = 0;
    while (cu_seqlens[document + 1] <= token) ++document;
    return c == 0 ? static_cast<double>(token - cu_seqlens[document]) : 1.0;
  };
  return problem;
}

/// lse = log(number of keys) and out = mean of their positions, by counting.
void expect_counts(const AttentionCase& problem, const AttentionResult& result) {
  int64_t token = 0;
  for (const int64_t length : problem.lengths) {
    for (int64_t i = 0; i < length; ++i, ++token) {
      double keys = 0;
      double sum = 0;
      for (int64_t j = 0; j < length; ++j) {
        if (!sees(problem.options.mask, i, j)) continue;
        keys += 1;
        sum += static_cast<double>(j);
      }
      ASSERT_NEAR(load(result.lse, token), std::log(keys), 1e-5)
          << problem.text() << " token " << token;
      ASSERT_NEAR(load(result.out, token * 8), sum / keys, 1e-5 * (1 + sum / keys))
          << "token " << token;
      ASSERT_NEAR(load(result.out, token * 8 + 1), 1.0, 1e-5) << "token " << token;
    }
  }
}

TEST(Trap02, CausalKeysEndExactlyWhereTheChunkEnds) {
  // Lengths that 2W does not divide: every query sees exactly itself and what is before it.
  for (const int world : {2, 3, 4, 5, 8}) {
    for (const int64_t length : {int64_t{2} * world + 1, int64_t{4} * world - 1, int64_t{131}}) {
      const AttentionCase problem = counting_case({length, 3, length + 1}, Mask{});
      expect_counts(problem, run_case(problem, world));
      const Plan plan = Plan::from_lengths(problem.lengths, world);
      for (int64_t r = 0; r < world; ++r) {
        for (const WorkItem& item : plan.work_items(r)) {
          EXPECT_EQ(item.k_position, 0);
          EXPECT_EQ(item.k_count, item.q_position + item.q_count);
        }
      }
    }
  }
}

TEST(Trap03, WithoutCausalEveryRowSeesItsWholeDocument) {
  const Mask full{false, -1, -1};
  for (const int world : {1, 2, 3, 4, 8}) {
    const AttentionCase problem = counting_case({40, 1, 0, 77}, full);
    expect_counts(problem, run_case(problem, world));
    const Plan plan = Plan::from_lengths(problem.lengths, world);
    for (int64_t r = 0; r < world; ++r) {
      for (const WorkItem& item : plan.work_items(r, full)) {
        EXPECT_EQ(item.k_count, item.document_length);
      }
    }
  }
}

TEST(Trap04, WindowsKeepTheirPlace) {
  for (const int world : {1, 2, 3, 4, 8}) {
    for (const Mask& mask : all_masks()) {
      const AttentionCase problem = counting_case({90, 5, 0, 133}, mask);
      expect_counts(problem, run_case(problem, world));
    }
  }
}

TEST(Trap04, WindowsGatherOnlyTheirHalo) {
  const Plan plan = Plan::from_lengths(Lengths{16384}, 8);
  const Mask window{true, 255, -1};
  for (int64_t r = 0; r < 8; ++r) {
    // Two chunks of 1024 and at most 255 keys before each.
    EXPECT_LE(plan.gathered_tokens(r, window), 2 * (1024 + 255));
  }
}

TEST(Trap07, EmptyStatesMergeToAnEmptyOne) {
  // The first 300 keys score -inf: whole blocks of keys are empty, for all rows or for some.
  AttentionCase problem;
  problem.lengths = {450, 310, 20};
  problem.heads = 2;
  problem.kv_heads = 1;
  problem.head_dim = 16;
  problem.seed = base_seed();
  problem.edit = [](Input which, int64_t token, int64_t, int64_t c, double value) {
    const bool hidden = token < 300 || (token >= 450 && token < 750) || token >= 760;
    if (which == Input::kK && c == 0 && hidden) return -kInfinity;
    if (which == Input::kQ && c == 0) return 1.0 + std::abs(value);
    return value;
  };
  const ReferenceResult reference = run_reference(problem);
  // Rows that see no score but -inf are empty: out 0, lse -inf.
  EXPECT_EQ(reference.lse[0], -kInfinity);
  EXPECT_EQ(reference.out[0], 0);
  EXPECT_TRUE(std::isfinite(reference.lse[2 * 449]));
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    problem.dtype = dtype;
    const ReferenceResult expected = run_reference(problem);
    const AttentionResult one = run_case(problem, 1);
    for (const int world : {1, 2, 4, 8}) {
      expect_exact_attention(problem, run_case(problem, world), expected, one);
    }
  }
}

TEST(Trap11, MaskedRowsThatAreNotFiniteDoNotReachOthers) {
  // A later token and another document hold inf and NaN: earlier rows do not see them. The memory
  // around all tensors is NaN as well.
  for (const double poison : {kNan, kInfinity, -kInfinity}) {
    AttentionCase problem;
    problem.lengths = {200, 60};
    problem.heads = 2;
    problem.kv_heads = 2;
    problem.head_dim = 24;
    problem.backward = false;
    problem.seed = base_seed();
    problem.edit = [poison](Input which, int64_t token, int64_t, int64_t c, double value) {
      const bool last = token == 150 || token >= 255;
      return which == Input::kV && c % 3 == 0 && last ? poison : value;
    };
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      problem.dtype = dtype;
      const ReferenceResult reference = run_reference(problem);
      EXPECT_TRUE(std::isfinite(reference.out[149 * 48]));
      EXPECT_FALSE(std::isfinite(reference.out[150 * 48]));
      const AttentionResult one = run_case(problem, 1);
      for (const int world : {1, 3, 4}) {
        expect_exact_attention(problem, run_case(problem, world), reference, one);
      }
    }
  }
}

TEST(Trap11, GradientsStayFiniteBesideWhatIsNot) {
  // dout of the last rows of a document is NaN: dk and dv become NaN there, other documents and the
  // dq of earlier rows do not.
  AttentionCase problem;
  problem.lengths = {130, 75};
  problem.heads = 1;
  problem.kv_heads = 1;
  problem.head_dim = 16;
  problem.seed = base_seed();
  problem.edit = [](Input which, int64_t token, int64_t, int64_t, double value) {
    return which == Input::kDout && token == 129 ? kNan : value;
  };
  for (const int world : {1, 2, 4}) {
    const AttentionResult result = run_case(problem, world);
    const auto finite = [](const Tensor& x, int64_t begin, int64_t count) {
      for (const double value : values(x.slice(0, begin, count))) {
        if (!std::isfinite(value)) return false;
      }
      return true;
    };
    EXPECT_TRUE(finite(result.dq, 0, 129)) << world;
    EXPECT_TRUE(finite(result.dq, 130, 75)) << world;
    EXPECT_TRUE(finite(result.dk, 130, 75)) << world;
    EXPECT_TRUE(finite(result.dv, 130, 75)) << world;
    EXPECT_FALSE(finite(result.dv, 0, 130)) << world;
  }
}

}  // namespace
}  // namespace zigzag::test
