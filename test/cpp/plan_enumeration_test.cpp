// Every pack of up to three documents with lengths 0..4W+1, for W up to 4, and random packs.
#include <algorithm>
#include <cstdint>
#include <iostream>

#include <gtest/gtest.h>

#include "support/compare.h"
#include "support/plan_check.h"
#include "support/random.h"

namespace zigzag::test {
namespace {

using std::int64_t;

/// Calls check(lengths, world_size) for each pack; stops at the first problem.
template <typename Check>
void for_each_small_pack(const Check& check) {
  int64_t packs = 0;
  for (int64_t world = 1; world <= 4; ++world) {
    const int64_t longest = 4 * world + 1;
    for (int64_t documents = 0; documents <= 3; ++documents) {
      Lengths lengths(static_cast<std::size_t>(documents), 0);
      for (bool more = true; more;) {
        const std::string problem = check(lengths, Plan::from_lengths(lengths, world));
        ASSERT_EQ(problem, "");
        ++packs;
        more = false;
        for (int64_t& length : lengths) {
          if (length < longest) {
            ++length;
            more = true;
            break;
          }
          length = 0;
        }
      }
    }
  }
  // 1 + n + n^2 + n^3 packs with n = 4W + 2 lengths.
  EXPECT_EQ(packs, 259 + 1111 + 2955 + 6175);
}

TEST(PlanEnumeration, LayoutIsABijection) {
  for_each_small_pack(
      [](const Lengths& lengths, const Plan& plan) { return check_layout(plan, lengths); });
}

TEST(PlanEnumeration, ItemsCoverWhatEachMaskShows) {
  for_each_small_pack([](const Lengths& lengths, const Plan& plan) {
    for (const Mask& mask : all_masks()) {
      std::string problem = check_work(plan, lengths, mask);
      if (!problem.empty()) return problem;
    }
    return std::string();
  });
}

TEST(PlanEnumeration, PiecesAddUpToTheItems) {
  for_each_small_pack(
      [](const Lengths& lengths, const Plan& plan) { return check_pieces(plan, lengths); });
}

TEST(PlanEnumeration, WorkOfRanksDiffersByTheStatedBound) {
  for_each_small_pack(
      [](const Lengths& lengths, const Plan& plan) { return check_balance(plan, lengths); });
}

TEST(PlanEnumeration, WorkOfOneDocumentDiffersByTheStatedBound) {
  // Whatever the documents before it left of the extras: what the last document adds.
  for (int64_t world = 2; world <= 12; ++world) {
    for (int64_t before = 0; before < 2 * world; ++before) {
      for (int64_t length = 1; length <= 5 * world; ++length) {
        for (const int64_t empty : {0, 1}) {
          Lengths lengths(static_cast<std::size_t>(1 + empty), 0);
          lengths[0] = before;
          const auto base = Plan::from_lengths(lengths, world).visible_pairs_all();
          lengths.push_back(length);
          const auto pairs = Plan::from_lengths(lengths, world).visible_pairs_all();
          double least = pairs[0] - base[0];
          double most = least;
          for (std::size_t r = 1; r < pairs.size(); ++r) {
            least = std::min(least, pairs[r] - base[r]);
            most = std::max(most, pairs[r] - base[r]);
          }
          const double bound = length % (2 * world) == 0 ? 0 : 2.0 * static_cast<double>(length);
          ASSERT_LE(most - least, bound) << world << " ranks, lengths " << lengths_text(lengths);
        }
      }
    }
  }
}

TEST(PlanRandom, HundredThousandPacks) {
  constexpr int kPacks = 100000;
  std::cout << "seed " << base_seed() << "\n";
  Stream stream(mix(base_seed(), 1));
  for (int i = 0; i < kPacks; ++i) {
    const int64_t world = stream.integer(1, 9);
    const int64_t kind = stream.integer(0, 9);
    const int64_t longest = kind == 0 ? 200 : kind < 4 ? 40 : 2 * world + 2;
    Lengths lengths(static_cast<std::size_t>(stream.integer(0, kind == 9 ? 12 : 5)));
    for (int64_t& length : lengths) length = stream.integer(0, longest);
    const Plan plan = Plan::from_lengths(lengths, world);
    Mask mask;
    mask.causal = stream.integer(0, 1) == 0;
    if (stream.integer(0, 1) == 0) mask.window_left = stream.integer(-1, 30);
    if (stream.integer(0, 1) == 0) mask.window_right = stream.integer(-1, 30);
    ASSERT_EQ(check_layout(plan, lengths), "") << repeat_command();
    ASSERT_EQ(check_work(plan, lengths, mask), "") << repeat_command();
    ASSERT_EQ(check_pieces(plan, lengths), "") << repeat_command();
    ASSERT_EQ(check_balance(plan, lengths), "") << repeat_command();
  }
}

TEST(PlanRandom, ManyRanks) {
  Stream stream(mix(base_seed(), 2));
  for (int i = 0; i < 2000; ++i) {
    const int64_t world = stream.integer(1, 300);
    Lengths lengths(static_cast<std::size_t>(stream.integer(1, 6)));
    for (int64_t& length : lengths) length = stream.integer(0, 3 * world);
    const Plan plan = Plan::from_lengths(lengths, world);
    ASSERT_EQ(check_layout(plan, lengths), "") << repeat_command();
    ASSERT_EQ(check_balance(plan, lengths), "") << repeat_command();
    const Mask mask{stream.integer(0, 1) == 0, stream.integer(-1, 500), stream.integer(-1, 500)};
    const auto pairs = plan.visible_pairs_all(mask);
    const auto gathered = plan.gathered_tokens_all(mask);
    for (int64_t r = 0; r < world; ++r) {
      const auto rank = static_cast<std::size_t>(r);
      ASSERT_EQ(pairs[rank], plan.visible_pairs(r, mask)) << repeat_command();
      ASSERT_EQ(gathered[rank], plan.gathered_tokens(r, mask)) << repeat_command();
    }
  }
}

}  // namespace
}  // namespace zigzag::test
