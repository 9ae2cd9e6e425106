// The plan against the seed's formula, at scale, and its cost model.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <set>

#include <gtest/gtest.h>

#include "support/packs.h"
#include "support/plan_check.h"
#include "support/random.h"
#include "zigzag/plan.h"

namespace zigzag::test {
namespace {

using std::int64_t;

TEST(PlanValues, DivisibleLengthsEqualTheSeedsFormula) {
  // Chunk r and chunk 2W-1-r of each document, end to end, as extract_local takes them.
  for (const int64_t world : {1, 2, 3, 4, 5, 8, 16}) {
    const Lengths lengths{2 * world * 3, 2 * world * 7, 0, 2 * world};
    const Plan plan = Plan::from_lengths(lengths, world);
    for (int64_t r = 0; r < world; ++r) {
      std::vector<int64_t> expected;
      int64_t start = 0;
      for (const int64_t length : lengths) {
        const int64_t chunk = length / (2 * world);
        for (const int64_t index : {r, 2 * world - 1 - r}) {
          for (int64_t i = 0; i < chunk; ++i) expected.push_back(start + index * chunk + i);
        }
        start += length;
      }
      EXPECT_EQ(plan.token_indices(r), expected);
    }
    const auto pairs = plan.visible_pairs_all();
    EXPECT_EQ(std::set<double>(pairs.begin(), pairs.end()).size(), 1U)
        << "divisible lengths give every rank the same work";
    EXPECT_EQ(plan.balance(), 1.0);
  }
}

TEST(PlanValues, TheSeedsExample) {
  const Plan plan = Plan::from_lengths(Lengths{8, 16}, 2);
  EXPECT_EQ(plan.token_indices(0),
            (std::vector<int64_t>{0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23}));
  EXPECT_EQ(plan.token_indices(1),
            (std::vector<int64_t>{2, 3, 4, 5, 12, 13, 14, 15, 16, 17, 18, 19}));
  EXPECT_EQ(plan.local_cu_seqlens(1), (std::vector<int64_t>{0, 4, 12}));
}

TEST(PlanValues, Int32AndInt64CuSeqlensGiveTheSamePlan) {
  const std::vector<std::int32_t> narrow{0, 5, 5, 77};
  const std::vector<int64_t> wide{0, 5, 5, 77};
  const Plan a(std::span<const std::int32_t>(narrow), 3);
  const Plan b(std::span<const int64_t>(wide), 3);
  EXPECT_EQ(a.fingerprint(), b.fingerprint());
  for (int64_t r = 0; r < 3; ++r) EXPECT_EQ(a.token_indices(r), b.token_indices(r));
}

TEST(PlanValues, FingerprintTellsPacksAndGroupsApart) {
  std::set<std::uint64_t> prints;
  int64_t packs = 0;
  for (int64_t world = 1; world <= 8; ++world) {
    for (int64_t a = 0; a < 20; ++a) {
      for (int64_t b = 0; b < 20; ++b) {
        prints.insert(Plan::from_lengths(Lengths{a, b}, world).fingerprint());
        ++packs;
      }
    }
  }
  EXPECT_EQ(std::ssize(prints), packs);
  EXPECT_NE(Plan::from_lengths(Lengths{}, 2).fingerprint(),
            Plan::from_lengths(Lengths{0}, 2).fingerprint());
}

TEST(PlanValues, CopiesShareAndOutliveTheOriginal) {
  Plan copy = Plan::from_lengths(Lengths{4}, 2);
  {
    const Plan plan = Plan::from_lengths(Lengths{8, 16}, 2);
    copy = plan;
    EXPECT_EQ(copy.cu_seqlens().data(), plan.cu_seqlens().data());
  }
  EXPECT_EQ(copy.total_tokens(), 24);
}

TEST(PlanValues, MaskBoundsNeverOverflow) {
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  const Mask mask{false, kHuge, kHuge};
  EXPECT_EQ(mask.first_key(5), 0);
  EXPECT_EQ(mask.end_key(5, 10), 10);
  const Plan plan = Plan::from_lengths(Lengths{100, 33}, 3);
  for (int64_t r = 0; r < 3; ++r) {
    EXPECT_EQ(plan.visible_pairs(r, mask), plan.visible_pairs(r, Mask{false, -1, -1}));
  }
}

TEST(PlanBalance, RealPacksAreEvenOverEightRanks) {
  constexpr int64_t kRanks = 8;
  for (const int64_t tokens : {int64_t{1} << 16, int64_t{1} << 17}) {
    for (std::uint64_t seed = 0; seed < 200; ++seed) {
      const Plan plan = Plan::from_lengths(real_pack(seed, tokens, 1), kRanks);
      const std::vector<double> pairs = plan.visible_pairs_all();
      const double mean = std::accumulate(pairs.begin(), pairs.end(), 0.0) / kRanks;
      EXPECT_LE(*std::max_element(pairs.begin(), pairs.end()), 1.03 * mean)
          << "seed " << seed << ", " << tokens << " tokens";
    }
  }
}

TEST(PlanScale, TwoToTheFortyTokensDoNotOverflow) {
  constexpr int64_t kTokens = int64_t{1} << 40;
  for (const int64_t length : {kTokens, kTokens + 12345, (int64_t{1} << 56)}) {
    for (const int64_t world : {1, 3, 1024}) {
      const Plan plan = Plan::from_lengths(Lengths{length}, world);
      int64_t rows = 0;
      for (int64_t r = 0; r < world; ++r) rows += plan.local_tokens(r);
      EXPECT_EQ(rows, length);
      const long double exact = static_cast<long double>(length) * (length + 1.0L) / 2;
      long double pairs = 0;
      for (const double value : plan.visible_pairs_all()) {
        EXPECT_GT(value, 0);
        pairs += value;
      }
      EXPECT_NEAR(static_cast<double>(pairs / exact), 1.0, 1e-12);
      EXPECT_GT(plan.balance(), 0.999999);
      EXPECT_GT(plan.flops(0, 128, 128), 0);
      EXPECT_GE(plan.gathered_bytes(0, 8, 128, 2), 0);
      const int64_t last = plan.local_tokens(world - 1) - 1;
      const int64_t token = plan.global_token(world - 1, last);
      EXPECT_EQ(plan.local_row(token), (LocalRow{world - 1, last}));
      const auto items = plan.work_items(0);
      EXPECT_EQ(items.front().k_count, length);
    }
  }
}

TEST(PlanScale, ThousandRanksAndAMillionDocuments) {
  constexpr int64_t kDocuments = 1000000;
  constexpr int64_t kRanks = 1024;
  Lengths lengths(kDocuments);
  Stream stream(mix(base_seed(), 3));
  for (int64_t& length : lengths) {
    length = static_cast<int64_t>(std::exp(stream.uniform() * 11.0));
  }
  const auto start = std::chrono::steady_clock::now();
  const Plan plan = Plan::from_lengths(lengths, kRanks);
  const auto pairs = plan.visible_pairs_all();
  const auto bytes = plan.gathered_bytes_all(8, 128, 2);
  const PredictedTime time = predict(plan, {400, 50}, 32, 8, 128, 2);
  const auto local = plan.local_cu_seqlens(kRanks - 1);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  RecordProperty("seconds", std::to_string(seconds.count()));
  std::cout << "planned in " << seconds.count() << " s\n";
  // Far above what it takes (under a second), so that a loaded machine does not fail it.
  EXPECT_LT(seconds.count(), 30);
  EXPECT_EQ(std::ssize(pairs), kRanks);
  EXPECT_EQ(local.back(), plan.local_tokens(kRanks - 1));
  EXPECT_GT(time.forward, 0);
  for (const int64_t r : {int64_t{0}, int64_t{511}, kRanks - 1}) {
    EXPECT_EQ(pairs[static_cast<std::size_t>(r)], plan.visible_pairs(r));
    EXPECT_EQ(bytes[static_cast<std::size_t>(r)], plan.gathered_bytes(r, 8, 128, 2));
  }
  EXPECT_EQ(check_balance(plan, lengths), "");
}

TEST(PlanCost, FlopsOfOneDocumentByHand) {
  // 4 tokens, causal: 1 + 2 + 3 + 4 pairs; 4 FLOPs a pair, head and element.
  const Plan plan = Plan::from_lengths(Lengths{4}, 1);
  EXPECT_EQ(plan.visible_pairs(0), 10);
  EXPECT_EQ(plan.flops(0, 2, 8), 4.0 * 2 * 8 * 10);
  EXPECT_EQ(plan.visible_pairs(0, Mask{false, -1, -1}), 16);
  EXPECT_EQ(plan.visible_pairs(0, Mask{true, 1, -1}), 1 + 2 + 2 + 2);
  EXPECT_EQ(plan.visible_pairs(0, Mask{false, 1, 1}), 2 + 3 + 3 + 2);
}

TEST(PlanCost, GatheredBytesByHand) {
  // 8 tokens over 2 ranks: chunks of 2. Rank 0 holds 0-1 and 6-7 and receives 2-5; rank 1 holds
  // 2-5, receives 0-1 and never needs 6-7.
  const Plan plan = Plan::from_lengths(Lengths{8}, 2);
  EXPECT_EQ(plan.gathered_bytes(0, 1, 1, 1), 2 * 4);
  EXPECT_EQ(plan.gathered_bytes(1, 1, 1, 1), 2 * 2);
  EXPECT_EQ(plan.gathered_bytes(1, 3, 64, 2), 2.0 * 2 * 3 * 64 * 2);
  EXPECT_EQ(plan.gathered_bytes(1, 1, 1, 1, Mask{false, -1, -1}), 2 * 4);
  EXPECT_EQ(Plan::from_lengths(Lengths{8}, 1).gathered_bytes(0, 8, 128, 2), 0);
}

TEST(PlanCost, PredictedTimeFollowsItsFormulas) {
  const Plan plan = Plan::from_lengths(Lengths{1000, 24, 3}, 4);
  const CostModel model{2.0, 0.5};
  const PredictedTime time = predict(plan, model, 8, 2, 64, 2);
  double compute = 0;
  double gather = 0;
  double backward = 0;
  for (int64_t r = 0; r < 4; ++r) {
    const double c = plan.flops(r, 8, 64) / 2e12;
    const double g = plan.gathered_bytes(r, 2, 64, 2) / 0.5e9;
    compute = std::max(compute, c);
    gather = std::max(gather, g);
    // The backward gathers again and returns float32 partials of as many rows.
    backward = std::max(backward, std::max(2.5 * c, 3 * g));
  }
  EXPECT_DOUBLE_EQ(time.forward_compute, compute);
  EXPECT_DOUBLE_EQ(time.forward_exchange, gather);
  EXPECT_DOUBLE_EQ(time.backward_compute, 2.5 * compute);
  EXPECT_DOUBLE_EQ(time.backward_exchange, 3 * gather);
  EXPECT_DOUBLE_EQ(time.backward, backward);
  EXPECT_GE(time.forward, std::max(compute, 0.0));
  EXPECT_LE(time.forward, compute + gather);
}

TEST(PlanCost, EmptyPacksAreBalanced) {
  EXPECT_EQ(Plan::from_lengths(Lengths{}, 4).balance(), 1.0);
  EXPECT_EQ(Plan::from_lengths(Lengths{0, 0}, 4).balance(), 1.0);
}

}  // namespace
}  // namespace zigzag::test
