// Attention on GPUs against the float64 reference: one rank and several, cuDNN and own kernels.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/runtime.h"
#include "gpu_case.h"

namespace zigzag::gpu_test {
namespace {

using std::int64_t;

// Written so that NaN fails.
#define EXPECT_WITHIN(value, bound) \
  EXPECT_TRUE((value) <= (bound)) << #value " is " << (value) << ", allowed " << (bound)

Problem make_problem(std::vector<int64_t> lengths, int64_t heads, int64_t kv_heads,
                     int64_t head_dim, DType dtype, Mask mask = {}, double softcap = 0) {
  Problem problem;
  problem.lengths = std::move(lengths);
  problem.heads = heads;
  problem.kv_heads = kv_heads;
  problem.head_dim = head_dim;
  problem.dtype = dtype;
  problem.mask = mask;
  problem.softcap = softcap;
  return problem;
}

void check_float(const Problem& problem, const RunOptions& run) {
  SCOPED_TRACE(describe(problem) + ", W " + std::to_string(run.world_size) + " " + run.comm);
  const Errors errors = errors_of(problem, run);
  EXPECT_WITHIN(errors.out, 1e-5);
  EXPECT_WITHIN(errors.lse, 1e-5);
  EXPECT_WITHIN(errors.dq, 1e-5);
  EXPECT_WITHIN(errors.dk, 2e-5);
  EXPECT_WITHIN(errors.dv, 2e-5);
}

/// Half types: bounded by what one rank makes with the same engine, and absolutely, so that an
/// engine that is wrong on one rank too is caught.
void check_half(const Problem& problem, const RunOptions& run) {
  SCOPED_TRACE(describe(problem) + ", W " + std::to_string(run.world_size) + " " + run.comm);
  const double unit = problem.dtype == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
  const Errors errors = errors_of(problem, run);
  EXPECT_WITHIN(errors.out, 1.5 * unit);
  EXPECT_WITHIN(errors.lse, 1e-4);
  EXPECT_WITHIN(errors.dq, 2.5 * unit);
  EXPECT_WITHIN(errors.dk, 2.5 * unit);
  EXPECT_WITHIN(errors.dv, 2.5 * unit);
  if (run.world_size == 1) {
    std::printf("  W 1 %s: out %.2e lse %.1e dq %.2e dk %.2e dv %.2e\n", describe(problem).c_str(),
                errors.out, errors.lse, errors.dq, errors.dk, errors.dv);
    return;
  }
  RunOptions alone = run;
  alone.world_size = 1;
  alone.kv_heads_per_stage = 0;
  const Errors one = errors_of(problem, alone);
  std::printf("  W %d / W 1 %s: out %.3f dq %.3f dk %.3f dv %.3f\n",
              static_cast<int>(run.world_size), describe(problem).c_str(), errors.out / one.out,
              errors.dq / one.dq, errors.dk / one.dk, errors.dv / one.dv);
  // Small packs have few elements: leave their noise some room.
  EXPECT_WITHIN(errors.out, 1.05 * one.out + 0.02 * unit);
  EXPECT_WITHIN(errors.dq, 1.05 * one.dq + 0.02 * unit);
  EXPECT_WITHIN(errors.dk, 1.10 * one.dk + 0.02 * unit);
  EXPECT_WITHIN(errors.dv, 1.10 * one.dv + 0.02 * unit);
}

void check(const Problem& problem, const RunOptions& run) {
  if (problem.dtype == DType::kFloat32) {
    check_float(problem, run);
  } else {
    check_half(problem, run);
  }
}

RunOptions ranks(int64_t world_size, const std::string& comm = "peer") {
  RunOptions run;
  run.world_size = world_size;
  run.comm = comm;
  return run;
}

const std::vector<int64_t> kMixed{300, 1, 0, 127, 128, 129, 7, 64, 2, 401};

class GpuAttention : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "no GPU";
  }
};

TEST_F(GpuAttention, EnginesAreNamed) {
  std::printf("  %s\n", cuda::attention_engine({DeviceType::kCuda, 0}).c_str());
}

TEST_F(GpuAttention, OneRankFloat32HeadDims) {
  for (const int64_t head_dim : {8, 32, 64, 80, 96, 128, 256}) {
    check(make_problem(kMixed, 4, 2, head_dim, DType::kFloat32), ranks(1));
  }
}

TEST_F(GpuAttention, OneRankBfloat16HeadDims) {
  for (const int64_t head_dim : {8, 32, 64, 80, 96, 128, 256}) {
    check(make_problem(kMixed, 4, 2, head_dim, DType::kBFloat16), ranks(1));
  }
}

TEST_F(GpuAttention, OneRankFloat16) {
  for (const int64_t head_dim : {64, 128}) {
    check(make_problem(kMixed, 4, 2, head_dim, DType::kFloat16), ranks(1));
  }
}

TEST_F(GpuAttention, OneRankHeadGroups) {
  const int64_t groups[][2] = {{1, 1}, {8, 8}, {8, 2},  {8, 1}, {5, 5},
                               {6, 3}, {7, 1}, {10, 2}, {34, 1}};
  for (const auto& group : groups) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      check(make_problem({200, 130, 33}, group[0], group[1], 64, dtype), ranks(1));
    }
  }
}

/// Packs in which query heads share tiles on a GPU of 132 multiprocessors
/// (HopperWork.HeadsOfATileOnAGpu), backward and forward.
TEST_F(GpuAttention, HeadsShareTiles) {
  const std::vector<int64_t> short_ones(140, 33);
  const std::vector<int64_t> longer_ones(40, 70);
  for (const int64_t world_size : {1, 2, 4}) {
    check(make_problem(short_ones, 16, 1, 64, DType::kBFloat16), ranks(world_size));
    check(make_problem(longer_ones, 32, 2, 128, DType::kBFloat16), ranks(world_size));
  }
  check(make_problem(short_ones, 8, 2, 128, DType::kFloat16), ranks(1));
  check(make_problem(short_ones, 12, 2, 128, DType::kBFloat16), ranks(2));
  check(make_problem(short_ones, 16, 1, 64, DType::kBFloat16, {false, 5, 9}), ranks(2));
  check(make_problem(short_ones, 16, 1, 128, DType::kBFloat16, {}, 2.0), ranks(2));
}

/// Small enough for the sanitizers.
TEST_F(GpuAttention, HeadsShareTilesOneRank) {
  const std::vector<int64_t> short_ones(140, 33);
  check(make_problem(short_ones, 7, 1, 128, DType::kBFloat16), ranks(1));
  check(make_problem(short_ones, 16, 1, 128, DType::kBFloat16, {true, 20, -1}), ranks(1));
}

TEST_F(GpuAttention, OneRankMasks) {
  const Mask masks[] = {{false, -1, -1}, {true, 50, -1}, {false, 40, 30}, {false, -1, 10}};
  for (const Mask& mask : masks) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      check(make_problem({300, 130, 33, 5}, 4, 2, 64, dtype, mask), ranks(1));
      check(make_problem({300, 130, 33, 5}, 4, 2, 64, dtype, mask), ranks(3));
    }
  }
}

TEST_F(GpuAttention, Softcap) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    check(make_problem({300, 130, 33}, 4, 2, 64, dtype, {}, 2.0), ranks(1));
    check(make_problem({300, 130, 33}, 4, 2, 64, dtype, {}, 2.0), ranks(4));
  }
}

TEST_F(GpuAttention, PackedInputs) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    RunOptions run = ranks(1);
    run.packed = true;
    check(make_problem(kMixed, 4, 2, 64, dtype), run);
    run.world_size = 3;
    check(make_problem(kMixed, 4, 2, 64, dtype), run);
  }
}

TEST_F(GpuAttention, PeerRanksFloat32) {
  for (const int64_t world_size : {2, 3, 4, 5, 8}) {
    check(make_problem(kMixed, 4, 2, 64, DType::kFloat32), ranks(world_size));
  }
}

TEST_F(GpuAttention, PeerRanksBfloat16) {
  for (const int64_t world_size : {2, 3, 4, 5, 8}) {
    check(make_problem({700, 1, 0, 300, 129, 7}, 8, 2, 128, DType::kBFloat16), ranks(world_size));
  }
}

TEST_F(GpuAttention, PeerRanksAsManyKvHeads) {
  for (const int64_t world_size : {2, 4, 8}) {
    check(make_problem({700, 1, 0, 300, 129, 7}, 4, 4, 128, DType::kBFloat16), ranks(world_size));
  }
}

TEST_F(GpuAttention, MasksOfWholeTiles) {
  // Lengths and windows on both sides of the kernels' tiles of 64 queries and 128 keys.
  const Mask masks[] = {{true, 127, -1}, {true, 200, -1}, {false, 64, 128}, {false, 300, 0}};
  for (const Mask& mask : masks) {
    for (const int64_t head_dim : {64, 128}) {
      const Problem problem =
          make_problem({640, 127, 385, 3}, 4, 2, head_dim, DType::kBFloat16, mask);
      check(problem, ranks(1));
      check(problem, ranks(2));
    }
    check(make_problem({640, 127, 385, 3}, 4, 2, 128, DType::kBFloat16, mask, 5.0), ranks(2));
  }
}

TEST_F(GpuAttention, PeerRanksOneDocument) {
  for (const int64_t world_size : {2, 4, 8}) {
    check(make_problem({1536}, 4, 1, 128, DType::kBFloat16), ranks(world_size));
    check(make_problem({1537}, 2, 1, 64, DType::kFloat16), ranks(world_size));
  }
}

TEST_F(GpuAttention, PeerRanksManyDocuments) {
  std::vector<int64_t> lengths{600};
  for (int64_t i = 0; i < 60; ++i) lengths.push_back(1 + i % 23);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int64_t world_size : {1, 4}) {
      check(make_problem(lengths, 4, 2, 64, dtype), ranks(world_size));
    }
  }
}

TEST_F(GpuAttention, PeerRanksEdges) {
  for (const std::vector<int64_t>& lengths :
       {std::vector<int64_t>{}, std::vector<int64_t>{0}, std::vector<int64_t>{1},
        std::vector<int64_t>{2, 3}, std::vector<int64_t>{7, 8, 9}}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const int64_t world_size : {1, 4}) {
        const Problem problem = make_problem(lengths, 2, 1, 64, dtype);
        const Errors errors = errors_of(problem, ranks(world_size));
        SCOPED_TRACE(describe(problem));
        EXPECT_WITHIN(errors.out, 0.01);
        EXPECT_WITHIN(errors.dq, 0.02);
        EXPECT_WITHIN(errors.dk, 0.02);
        EXPECT_WITHIN(errors.dv, 0.02);
      }
    }
  }
}

TEST_F(GpuAttention, Stages) {
  for (const int64_t stage : {1, 2, 4}) {
    RunOptions run = ranks(3);
    run.kv_heads_per_stage = stage;
    check(make_problem({500, 77, 128}, 8, 4, 64, DType::kFloat32), run);
    check(make_problem({500, 77, 128}, 8, 4, 64, DType::kBFloat16), run);
  }
}

TEST_F(GpuAttention, OwnKernelsServeHalfTypes) {
  RunOptions run = ranks(2);
  run.kernels = Kernels::kReference;
  check(make_problem(kMixed, 4, 2, 128, DType::kBFloat16), run);
  check(make_problem(kMixed, 4, 2, 128, DType::kFloat16), run);
}

TEST_F(GpuAttention, RepeatsBitwise) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Problem problem = make_problem({700, 129, 300}, 8, 2, 128, dtype);
    RunOptions run = ranks(3);
    run.deterministic = true;
    bool held = false;
    const Results first = run_on_gpus(problem, run, held);
    for (int i = 0; i < 3; ++i) {
      const Results again = run_on_gpus(problem, run, held);
      EXPECT_EQ(first.out, again.out);
      EXPECT_EQ(first.lse, again.lse);
      EXPECT_EQ(first.dq, again.dq);
      EXPECT_EQ(first.dk, again.dk);
      EXPECT_EQ(first.dv, again.dv);
    }
  }
}

TEST_F(GpuAttention, NcclRanks) {
  if (cuda::device_count() < 2) GTEST_SKIP() << "one GPU a rank, and there is one";
  const int64_t world_size = cuda::device_count();
  check(make_problem(kMixed, 4, 2, 64, DType::kFloat32), ranks(world_size, "nccl"));
  check(make_problem({700, 1, 0, 300, 129, 7}, 8, 2, 128, DType::kBFloat16),
        ranks(world_size, "nccl"));
  RunOptions staged = ranks(world_size, "nccl");
  staged.kv_heads_per_stage = 1;
  check(make_problem({500, 77, 128}, 8, 4, 64, DType::kBFloat16), staged);
}

/// Too long for the reference: held against the library's plain kernels, which the cases above
/// check.
void check_large(const Problem& problem) {
  bool held = false;
  RunOptions own = ranks(1);
  own.kernels = Kernels::kReference;
  const Results want = run_on_gpus(problem, own, held);
  for (const int64_t world_size : {1, 2, 4, 8}) {
    const Results got = run_on_gpus(problem, ranks(world_size), held);
    EXPECT_TRUE(held);
    std::printf("  W %d: out %.2e dq %.2e dk %.2e dv %.2e\n", static_cast<int>(world_size),
                distance(got.out, want.out), distance(got.dq, want.dq), distance(got.dk, want.dk),
                distance(got.dv, want.dv));
    EXPECT_WITHIN(distance(got.out, want.out), 5e-3);
    EXPECT_WITHIN(distance(got.lse, want.lse), 1e-5);
    EXPECT_WITHIN(distance(got.dq, want.dq), 1e-2);
    EXPECT_WITHIN(distance(got.dk, want.dk), 1e-2);
    EXPECT_WITHIN(distance(got.dv, want.dv), 1e-2);
  }
}

TEST_F(GpuAttention, LargePackAgreesWithOwnKernels) {
  check_large(make_problem({6000, 1000, 900, 292}, 8, 2, 128, DType::kBFloat16));
}

/// Partial gradients long enough to be fetched while attention goes on, at W = 2 and 4.
TEST_F(GpuAttention, LongDocumentAgreesWithOwnKernels) {
  check_large(make_problem({16384}, 8, 4, 128, DType::kBFloat16));
  // Heads share tiles.
  std::vector<int64_t> mixed(300, 37);
  mixed.push_back(4096);
  check_large(make_problem(mixed, 32, 2, 128, DType::kBFloat16));
}

}  // namespace
}  // namespace zigzag::gpu_test
