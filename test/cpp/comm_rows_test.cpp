#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "comm/rounds.h"
#include "comm/rows.h"
#include "comm/sum.h"
#include "comm/wait.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

TEST(CommRows, StridesBecomeRuns) {
  std::vector<float> memory(1000);
  TensorView view = TensorView::contiguous(memory.data(), DType::kFloat32, {10, 4, 8});
  EXPECT_TRUE(RowView(view).dense());
  EXPECT_EQ(RowView(view).row_bytes, 128);

  const TensorView slice = view.slice(1, 1, 2);
  const RowView sliced(slice);
  EXPECT_FALSE(sliced.dense());
  EXPECT_EQ(sliced.runs, 1);
  EXPECT_EQ(sliced.row_bytes, 64);
  EXPECT_EQ(sliced.row_stride, 128);

  view.strides = {8, 80, 1};
  const RowView transposed(view);
  EXPECT_EQ(transposed.runs, 4);
  EXPECT_EQ(transposed.run_bytes, 32);
  EXPECT_EQ(transposed.run_stride, 320);

  view.strides = {32, 8, 2};
  EXPECT_THROW(RowView{view}, InvalidArgument);
  view.shape = {};
  view.strides = {};
  EXPECT_THROW(RowView{view}, InvalidArgument);
}

TEST(CommRows, PartsAreCutAtTheRange) {
  const std::vector<Segment> segments = {{0, 2, 10, 3}, {0, 7, 20, 4}, {0, 11, 40, 1}};
  const auto parts = [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::vector<std::int64_t>> result;
    for_each_part(segments, begin, end,
                  [&](std::int64_t source, std::int64_t destination, std::int64_t rows) {
                    result.push_back({source, destination, rows});
                  });
    return result;
  };
  using Parts = std::vector<std::vector<std::int64_t>>;
  EXPECT_EQ(parts(0, 100), (Parts{{2, 10, 3}, {7, 20, 4}, {11, 40, 1}}));
  EXPECT_EQ(parts(3, 9), (Parts{{3, 11, 2}, {7, 20, 2}}));
  EXPECT_EQ(parts(5, 7), Parts{});
  EXPECT_EQ(parts(10, 12), (Parts{{10, 23, 1}, {11, 40, 1}}));
  EXPECT_EQ(count_rows(segments, 3, 9), 4);
}

TEST(CommRows, RoundsStayWithinTheScratch) {
  for (const std::int64_t tokens : {0, 1, 7, 1000, 1000000}) {
    for (const std::int64_t bytes : {0, 1, 512, 1 << 20, 1 << 26}) {
      ExchangeTable table;
      table.max_local_tokens = tokens;
      const Rounds rounds = make_rounds(table, bytes, 16);
      EXPECT_GE(rounds.rows, 1);
      EXPECT_GE(rounds.count * rounds.rows, tokens);
      EXPECT_LT((rounds.count - 1) * rounds.rows, std::max<std::int64_t>(tokens, 1));
      EXPECT_TRUE(rounds.rows == 1 || rounds.rows * bytes * 16 <= kScratchBytes);
    }
  }
}

std::uint32_t bits(float x) { return std::bit_cast<std::uint32_t>(x); }

TEST(CommSum, AddsInOrderFromZero) {
  // In another order, or with wider sums, the result differs.
  const float values[] = {1e8f, 1.0f, -1e8f, 0.25f};
  const std::vector<Segment> segment = {{0, 0, 0, 1}};
  std::vector<Contribution> contributions;
  float expected = 0;
  for (const float& value : values) {
    contributions.push_back({segment, &value});
    expected += value;
  }
  float out = std::nanf("");
  sum_rows(TensorView::contiguous(&out, DType::kFloat32, {1, 1}), 0, 1, contributions);
  EXPECT_EQ(bits(out), bits(expected));
}

TEST(CommSum, RowsThatNobodyHoldsAreZero) {
  std::vector<float> out(6, std::nanf(""));
  const std::vector<float> part = {1, 2};
  const std::vector<Segment> segment = {{0, 1, 0, 1}};
  const Contribution contribution{segment, part.data()};
  sum_rows(TensorView::contiguous(out.data(), DType::kFloat32, {3, 2}), 0, 3, {&contribution, 1});
  EXPECT_EQ(out, (std::vector<float>{0, 0, 1, 2, 0, 0}));
}

TEST(CommSum, RoundsToNearestEvenAndKeepsSpecialValues) {
  struct Case {
    float value;
    std::uint16_t bfloat16;
    std::uint16_t float16;
  };
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<Case> cases = {
      {1.0f, 0x3f80, 0x3c00},
      {1.00390625f, 0x3f80, 0x3c04},  // half a bfloat16 step: to the even neighbour
      {1.01171875f, 0x3f82, 0x3c0c},  // one and a half: up to the even one
      {1.00048828125f, 0x3f80, 0x3c00},
      {1.00146484375f, 0x3f80, 0x3c02},
      {65504.0f, 0x4780, 0x7bff},
      {65520.0f, 0x4780, 0x7c00},
      {5.9604645e-8f, 0x3380, 0x0001},
      {2.9802322e-8f, 0x3300, 0x0000},  // half of float16's smallest: to zero
      {inf, 0x7f80, 0x7c00},
      {-inf, 0xff80, 0xfc00},
      {3.4e38f, 0x7f80, 0x7c00},
      {0.0f, 0x0000, 0x0000},
  };
  const std::vector<Segment> segment = {{0, 0, 0, 1}};
  for (const Case& c : cases) {
    const Contribution contribution{segment, &c.value};
    std::uint16_t out = 0xffff;
    sum_rows(TensorView::contiguous(&out, DType::kBFloat16, {1, 1}), 0, 1, {&contribution, 1});
    EXPECT_EQ(out, c.bfloat16) << c.value;
    sum_rows(TensorView::contiguous(&out, DType::kFloat16, {1, 1}), 0, 1, {&contribution, 1});
    EXPECT_EQ(out, c.float16) << c.value;
  }
  const float nan = std::bit_cast<float>(0x7f800001u);  // rounding must not make it infinite
  const Contribution contribution{segment, &nan};
  std::uint16_t out = 0;
  sum_rows(TensorView::contiguous(&out, DType::kBFloat16, {1, 1}), 0, 1, {&contribution, 1});
  EXPECT_GT(out & 0x7fff, 0x7f80);
  sum_rows(TensorView::contiguous(&out, DType::kFloat16, {1, 1}), 0, 1, {&contribution, 1});
  EXPECT_GT(out & 0x7fff, 0x7c00);
}

TEST(CommWait, Sentences) {
  const int one[] = {3};
  const int two[] = {3, 5};
  const int many[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  EXPECT_EQ(ranks_text(one), "rank 3");
  EXPECT_EQ(ranks_text(two), "ranks 3 and 5");
  EXPECT_EQ(ranks_text(many), "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more");
  EXPECT_EQ(step_text({"gather", 1, 4}), "gather, stage 2 of 4");
  EXPECT_EQ(step_text({"barrier", 0, 1}), "barrier");
  EXPECT_EQ(seconds_text(0.5), "0.5 s");
}

}  // namespace
}  // namespace zigzag::comm
