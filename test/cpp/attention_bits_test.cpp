// What stays bit for bit the same: out, lse and dq over the number of ranks; everything over calls,
// threads and stages.
#include <array>
#include <cstdint>
#include <cstdlib>
#include <string>

#include <gtest/gtest.h>

#include "support/attention_case.h"
#include "support/packs.h"
#include "support/random.h"
#include "support/ranks.h"

namespace zigzag::test {
namespace {

using std::int64_t;

AttentionCase mixed_case(DType dtype, bool causal) {
  AttentionCase problem;
  problem.lengths = {1, 300, 0, 129, 17, 40, 2, 511};
  problem.heads = 4;
  problem.kv_heads = 2;
  problem.head_dim = 64;
  problem.dtype = dtype;
  problem.options.mask.causal = causal;
  problem.seed = mix(base_seed(), static_cast<std::uint64_t>(dtype));
  return problem;
}

class Bits : public testing::TestWithParam<DType> {};

TEST_P(Bits, OutLseAndDqDoNotDependOnTheNumberOfRanks) {
  for (const Mask& mask : {Mask{}, Mask{false, -1, -1}, Mask{true, 100, -1}, Mask{false, 33, 70}}) {
    AttentionCase problem = mixed_case(GetParam(), true);
    problem.options.mask = mask;
    const AttentionResult one = run_case(problem, 1);
    for (const int world : {2, 3, 4, 5, 8}) {
      SCOPED_TRACE(std::to_string(world) + " ranks, " + problem.text());
      expect_same_bits(run_case(problem, world), one, false);
    }
  }
}

TEST_P(Bits, EveryPackKeepsItsBits) {
  for (const Pack& pack : all_packs(4, base_seed(), 600)) {
    AttentionCase problem = mixed_case(GetParam(), true);
    problem.lengths = pack.lengths;
    problem.head_dim = 24;
    const AttentionResult one = run_case(problem, 1);
    for (const int world : {2, 3, 4, 8}) {
      SCOPED_TRACE(std::to_string(world) + " ranks, " + problem.text());
      expect_same_bits(run_case(problem, world), one, false);
    }
  }
}

TEST_P(Bits, RepeatedCallsGiveTheSameBits) {
  const AttentionCase problem = mixed_case(GetParam(), true);
  for (const int world : {1, 4}) {
    const AttentionResult first = run_case(problem, world);
    for (int round = 0; round < 3; ++round) expect_same_bits(run_case(problem, world), first, true);
  }
}

// run_case compares ranks that lend with ranks that gather. Here a rank's rows are several tasks,
// so that sums of ranks are more than one addition to a key.
TEST_P(Bits, LongDocumentsOverRanksThatLendAndGather) {
  for (const Mask& mask : {Mask{}, Mask{false, -1, -1}, Mask{true, 100, -1}, Mask{true, 1500, -1},
                           Mask{false, 33, 70}}) {
    AttentionCase problem = mixed_case(GetParam(), true);
    problem.lengths = {5, 2900, 0, 700, 64};
    problem.heads = 4;
    problem.kv_heads = 1;
    problem.head_dim = 32;
    problem.options.mask = mask;
    const AttentionResult one = run_case(problem, 1);
    for (const int world : {2, 3, 5}) {
      SCOPED_TRACE(std::to_string(world) + " ranks, " + problem.text());
      expect_same_bits(run_case(problem, world), one, false);
    }
  }
}

TEST_P(Bits, StagesGiveTheSameBits) {
  AttentionCase problem = mixed_case(GetParam(), false);
  problem.options.kv_heads_per_stage = 2;
  const AttentionResult whole = run_case(problem, 3);
  problem.options.kv_heads_per_stage = 1;
  expect_same_bits(run_case(problem, 3), whole, true);
}

INSTANTIATE_TEST_SUITE_P(Types, Bits,
                         testing::Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16),
                         [](const auto& type) { return std::string(dtype_name(type.param)); });

TEST(Bits, TheNumberOfThreadsChangesNothing) {
  const AttentionCase problem = mixed_case(DType::kFloat32, true);
  const AttentionResult usual = run_case(problem, 2);
  for (const char* threads : {"1", "3"}) {
    ASSERT_EQ(setenv("ZIGZAG_NUM_THREADS", threads, 1), 0);
    expect_same_bits(run_case(problem, 2), usual, true);
    expect_same_bits(run_case(problem, 1), run_case(problem, 1), true);
  }
  unsetenv("ZIGZAG_NUM_THREADS");
}

TEST(Bits, GradientsDoNotDependOnUnrelatedDocuments) {
  // The same document alone, and behind another one whose values are huge.
  AttentionCase alone = mixed_case(DType::kFloat32, true);
  alone.lengths = {96};
  AttentionCase behind = alone;
  behind.lengths = {32, 96};
  behind.edit = [&](Input which, int64_t token, int64_t head, int64_t c, double value) {
    if (token < 32) return 1e6 * value;
    // What token - 32 draws in the other pack.
    Stream stream(mix(mix(alone.seed, static_cast<std::uint64_t>(which)),
                      static_cast<std::uint64_t>((token - 32) * 1024 + head)));
    double drawn = 0;
    for (int64_t i = 0; i <= c; ++i) drawn = stream.normal();
    return drawn;
  };
  const AttentionResult a = run_case(alone, 1);
  const AttentionResult b = run_case(behind, 1);
  const auto cut = [](const Tensor& x) { return x.slice(0, 32, 96); };
  const AttentionResult b_cut{cut(b.out), cut(b.lse), cut(b.dq), cut(b.dk), cut(b.dv)};
  expect_same_bits(b_cut, a, true);
}

}  // namespace
}  // namespace zigzag::test
