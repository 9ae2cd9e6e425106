// Attention against the float64 reference for every combination of heads, head_dim and type.
#include <array>
#include <cstdint>
#include <string>

#include <gtest/gtest.h>

#include "support/attention_case.h"
#include "support/random.h"

namespace zigzag::test {
namespace {

using std::int64_t;

struct Heads {
  int64_t heads;
  int64_t kv_heads;
};
constexpr std::array<Heads, 7> kHeads{{{1, 1}, {8, 8}, {8, 2}, {8, 1}, {5, 5}, {6, 3}, {32, 8}}};
constexpr std::array<int64_t, 7> kHeadDims{8, 32, 64, 80, 96, 128, 256};

class EveryShape : public testing::TestWithParam<DType> {};

TEST_P(EveryShape, MatchesTheReference) {
  int turn = 0;
  for (const Heads& heads : kHeads) {
    for (const int64_t head_dim : kHeadDims) {
      AttentionCase problem;
      problem.lengths = {33, 1, 0, 70, 12};
      problem.heads = heads.heads;
      problem.kv_heads = heads.kv_heads;
      problem.head_dim = head_dim;
      problem.dtype = GetParam();
      problem.options.mask.causal = turn % 4 != 3;
      problem.seed = mix(base_seed(), static_cast<std::uint64_t>(turn));
      check_over_ranks(problem, std::array{turn % 2 == 0 ? 3 : 4});
      ++turn;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, EveryShape,
                         testing::Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16),
                         [](const auto& type) { return std::string(dtype_name(type.param)); });

}  // namespace
}  // namespace zigzag::test
