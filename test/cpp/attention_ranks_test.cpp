// Attention over ranks against the float64 reference: every kind of pack at every number of ranks,
// and every option.
#include <array>
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "support/attention_case.h"
#include "support/compare.h"
#include "support/packs.h"
#include "support/random.h"

namespace zigzag::test {
namespace {

using std::int64_t;

constexpr std::array<int, 6> kWorldSizes{1, 2, 3, 4, 5, 8};
constexpr std::array<DType, 3> kTypes{DType::kFloat32, DType::kBFloat16, DType::kFloat16};

std::uint64_t next_seed() {
  static std::uint64_t count = 0;
  return mix(base_seed(), ++count);
}

class EveryPack : public testing::TestWithParam<int> {};

TEST_P(EveryPack, MatchesTheReference) {
  const int world = GetParam();
  std::size_t turn = static_cast<std::size_t>(world);
  for (const Pack& pack : all_packs(world, base_seed(), 400)) {
    SCOPED_TRACE(pack.name);
    for (const bool causal : {true, false}) {
      AttentionCase problem;
      problem.lengths = pack.lengths;
      problem.heads = 4;
      problem.kv_heads = 2;
      problem.head_dim = 32;
      problem.dtype = kTypes[turn++ % kTypes.size()];
      problem.options.mask.causal = causal;
      problem.seed = next_seed();
      check_over_ranks(problem, std::array{world});
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, EveryPack, testing::ValuesIn(kWorldSizes), [](const auto& world) {
  return std::string("W").append(std::to_string(world.param));
});

TEST(AttentionOptions, EveryMask) {
  const std::array<Mask, 9> masks{{{true, -1, -1},
                                   {false, -1, -1},
                                   {true, 0, -1},
                                   {true, 7, -1},
                                   {true, 127, 0},
                                   {false, 16, 0},
                                   {false, 0, 16},
                                   {false, 40, 9},
                                   {false, -1, 130}}};
  std::size_t turn = 0;
  for (const Mask& mask : masks) {
    for (const DType dtype : {DType::kFloat32, kTypes[1 + turn++ % 2]}) {
      AttentionCase problem;
      problem.lengths = {150, 3, 0, 129, 64, 1};
      problem.dtype = dtype;
      problem.options.mask = mask;
      problem.seed = next_seed();
      check_over_ranks(problem, std::array{2, 3, 8});
    }
  }
}

TEST(AttentionOptions, SoftcapAndScale) {
  for (const double softcap : {0.0, 1.5, 30.0}) {
    for (const std::optional<double> scale :
         {std::optional<double>(), std::optional(0.5), std::optional(-0.1), std::optional(0.0)}) {
      AttentionCase problem;
      problem.lengths = {100, 41, 2};
      problem.dtype = kTypes[static_cast<std::size_t>(softcap) % 2];
      problem.options.softcap = softcap;
      problem.options.softmax_scale = scale;
      problem.options.mask.causal = softcap < 30;
      problem.seed = next_seed();
      check_over_ranks(problem, std::array{3, 4});
    }
  }
}

TEST(AttentionOptions, EveryDivisorOfTheKvHeadsAsStage) {
  for (const int64_t kv_heads : {1, 3, 8, 12}) {
    AttentionCase problem;
    problem.lengths = {90, 0, 45, 20};
    problem.heads = 2 * kv_heads;
    problem.kv_heads = kv_heads;
    problem.head_dim = 16;
    problem.seed = next_seed();
    const ReferenceResult reference = run_reference(problem);
    const AttentionResult one_rank = run_case(problem, 1);
    for (int64_t stage = 0; stage <= kv_heads; ++stage) {
      if (stage > 0 && kv_heads % stage != 0) continue;
      problem.options.kv_heads_per_stage = stage;
      const AttentionResult result = run_case(problem, 4);
      expect_exact_attention(problem, result, reference, one_rank);
      expect_same_bits(result, one_rank, false);
    }
  }
}

TEST(AttentionOptions, InputsThatAreNotContiguous) {
  for (const Storage storage : {Storage::kHeadSlice, Storage::kKvPacked, Storage::kQkvPacked}) {
    for (const DType dtype : kTypes) {
      AttentionCase problem;
      problem.lengths = {77, 5, 130};
      problem.heads = 6;
      problem.kv_heads = 3;
      problem.head_dim = 40;
      problem.dtype = dtype;
      problem.seed = next_seed();
      problem.options.kv_heads_per_stage = dtype == DType::kFloat32 ? 1 : 0;
      const AttentionResult contiguous = run_case(problem, 3);
      problem.storage = storage;
      check_over_ranks(problem, std::array{1, 3});
      // Where the bytes lie changes nothing.
      expect_same_bits(run_case(problem, 3), contiguous, true);
    }
  }
}

TEST(AttentionOptions, ThePlainTwinKernels) {
  for (const DType dtype : kTypes) {
    AttentionCase problem;
    problem.lengths = {40, 1, 0, 66};
    problem.dtype = dtype;
    problem.options.kernels = Kernels::kReference;
    problem.seed = next_seed();
    check_over_ranks(problem, std::array{1, 3, 4});
  }
}

TEST(AttentionOptions, ForwardAlone) {
  AttentionCase problem;
  problem.lengths = {64, 100};
  problem.backward = false;
  problem.seed = next_seed();
  check_over_ranks(problem, kWorldSizes);
}

TEST(AttentionOptions, LargeScoresStayFinite) {
  // Scores of several hundred: a softmax without its maximum would overflow. Rounding such a score
  // to float32 alone moves its weight by 500 * 2^-24 = 3e-5, so the bounds are this test's own.
  AttentionCase problem;
  problem.lengths = {70, 200};
  problem.options.softmax_scale = 20.0;
  problem.backward = false;
  problem.seed = next_seed();
  const ReferenceResult reference = run_reference(problem);
  for (const int world : {1, 4}) {
    const AttentionResult result = run_case(problem, world);
    EXPECT_TRUE(
        close("out", values(result.out), reference.out, result.out.view().shape, {3e-5, 3e-4}));
    EXPECT_TRUE(
        close("lse", values(result.lse), reference.lse, result.lse.view().shape, {2e-6, 2e-5}));
  }
}

}  // namespace
}  // namespace zigzag::test
