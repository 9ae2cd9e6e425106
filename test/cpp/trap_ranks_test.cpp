// Traps of ranks: sums of gradients, reused buffers, disagreement, one rank, several groups, peers
// that die or never come.
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "support/attention_case.h"
#include "support/compare.h"
#include "support/packs.h"
#include "support/random.h"
#include "support/ranks.h"
#include "zigzag/error.h"

namespace zigzag::test {
namespace {

using std::int64_t;

AttentionCase plain_case(const Lengths& lengths) {
  AttentionCase problem;
  problem.lengths = lengths;
  problem.head_dim = 16;
  problem.seed = base_seed();
  return problem;
}

TEST(Trap06, GradientSumsAreRoundedOnce) {
  // Every rank adds to dv of the first keys. Sums kept in 16 bits grow wrong with W.
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    AttentionCase problem = plain_case({1024, 200});
    problem.heads = 4;
    problem.kv_heads = 1;
    problem.dtype = dtype;
    problem.edit = [](Input which, int64_t, int64_t, int64_t, double value) {
      return which == Input::kDout ? 1.0 + 0.1 * value : value;
    };
    const ReferenceResult reference = run_reference(problem);
    const AttentionResult one = run_case(problem, 1);
    const double alone = compare(values(one.dv), reference.dv).relative_l2;
    for (const int world : {2, 4, 8, 16}) {
      const AttentionResult result = run_case(problem, world);
      expect_exact_attention(problem, result, reference, one);
      const double error = compare(values(result.dv), reference.dv).relative_l2;
      EXPECT_LE(error, 1.1 * alone) << world << " ranks, " << repeat_command();
    }
  }
}

TEST(Trap08, LateRanksSeeWhatTheyShould) {
  // Ranks come late to every exchange by different times, with as many stages as there are KV
  // heads, forward and backward, call after call.
  AttentionCase problem = plain_case({70, 33, 0, 128});
  problem.heads = 4;
  problem.kv_heads = 4;
  for (const int world : {2, 4}) {
    // All KV heads at once need no buffer twice.
    problem.options.kv_heads_per_stage = 4;
    const AttentionResult expected = run_case(problem, world);
    problem.options.kv_heads_per_stage = 1;
    const Plan plan = Plan::from_lengths(problem.lengths, world);
    std::vector<AttentionResult> rounds;
    for (int round = 0; round < 4; ++round) rounds.push_back(make_result(problem));
    run_ranks(world, [&](const Communicator& communicator) {
      const Communicator late = delayed(communicator, base_seed());
      for (const AttentionResult& result : rounds) run_rank(problem, plan, late, result);
    });
    for (const AttentionResult& result : rounds) expect_same_bits(result, expected, true);
  }
}

TEST(Trap08, InputsMayChangeAsSoonAsTheCallReturns) {
  const AttentionCase problem = plain_case({50, 90});
  const AttentionResult expected = run_case(problem, 3);
  const Plan plan = Plan::from_lengths(problem.lengths, 3);
  const AttentionResult result = make_result(problem);
  const AttentionResult noise = make_result(problem);
  run_ranks(3, [&](const Communicator& communicator) {
    const Communicator late = delayed(communicator, base_seed() + 1);
    // Another layer's inputs follow at once, in memory that was just freed.
    AttentionCase other = problem;
    other.seed = problem.seed + 1;
    run_rank(other, plan, late, noise);
    run_rank(problem, plan, late, result);
    run_rank(other, plan, late, noise);
  });
  expect_same_bits(result, expected, true);
}

/// What ranks throw when rank 1 makes another call than the others.
template <typename Change>
std::vector<std::string> disagree(const Change& change) {
  return collect_ranks(3, [&](const Communicator& communicator) {
    AttentionCase problem = plain_case({24, 12});
    problem.heads = 4;
    problem.kv_heads = 2;
    problem.backward = false;
    if (communicator.rank() == 1) change(problem);
    run_rank(problem, Plan::from_lengths(problem.lengths, 3), communicator, make_result(problem));
  });
}

void expect_named(const std::vector<std::string>& errors, const std::string& difference) {
  for (const std::string& error : errors) {
    EXPECT_TRUE(error.starts_with("CommunicationError: ")) << error;
    EXPECT_NE(error.find("rank 1 "), std::string::npos) << error;
    EXPECT_NE(error.find(difference), std::string::npos) << error;
  }
}

TEST(Trap13, RanksThatDifferAreToldBeforeTheFirstExchange) {
  // The same number of local rows, other documents.
  expect_named(disagree([](AttentionCase& p) { p.lengths = {12, 24}; }), "fingerprint");
  expect_named(disagree([](AttentionCase& p) { p.lengths = {36}; }), "in 1 documents");
  expect_named(disagree([](AttentionCase& p) { p.dtype = DType::kBFloat16; }), "bfloat16");
  expect_named(disagree([](AttentionCase& p) { p.heads = 2; }), "2 heads");
  expect_named(disagree([](AttentionCase& p) { p.head_dim = 8; }), "head_dim 8");
  expect_named(disagree([](AttentionCase& p) { p.options.mask.causal = false; }), "causal false");
  expect_named(disagree([](AttentionCase& p) { p.options.mask.window_left = 5; }), "window 5");
  expect_named(disagree([](AttentionCase& p) { p.options.softmax_scale = 2.5; }), "2.5");
  expect_named(disagree([](AttentionCase& p) { p.options.softcap = 7; }), "softcap 7");
  expect_named(disagree([](AttentionCase& p) { p.options.kv_heads_per_stage = 1; }),
               "kv_heads_per_stage 1");
  expect_named(disagree([](AttentionCase& p) { p.options.deterministic = true; }),
               "deterministic true");
  expect_named(disagree([](AttentionCase& p) { p.options.kernels = Kernels::kReference; }),
               "reference");
}

TEST(Trap13, ABadArgumentOnOneRankStopsAllOfThem) {
  const auto errors = disagree([](AttentionCase& p) { p.options.softcap = -1; });
  EXPECT_TRUE(errors[1].starts_with("InvalidArgument: softcap")) << errors[1];
  for (const std::size_t r : {0U, 2U}) {
    EXPECT_TRUE(errors[r].starts_with("CommunicationError: rank 1")) << errors[r];
    EXPECT_NE(errors[r].find("softcap"), std::string::npos) << errors[r];
  }
}

TEST(Trap13, ForwardAgainstBackward) {
  const Plan plan = Plan::from_lengths(Lengths{12}, 2);
  const auto errors = collect_ranks(2, [&](const Communicator& communicator) {
    const Tensor x(DType::kFloat32, {6, 1, 8});
    const Tensor lse(DType::kFloat32, {6, 1});
    fill_bits(x, 1);
    if (communicator.rank() == 0) {
      forward(x, x, x, plan, communicator, {}, Tensor(DType::kFloat32, {6, 1, 8}), lse);
    } else {
      backward(x, x, x, x, x, lse, plan, communicator, {}, Tensor(DType::kFloat32, {6, 1, 8}),
               Tensor(DType::kFloat32, {6, 1, 8}), Tensor(DType::kFloat32, {6, 1, 8}));
    }
  });
  for (const std::string& error : errors) {
    EXPECT_NE(error.find("backward"), std::string::npos) << error;
  }
}

TEST(Trap14, OneRankMakesNoExchange) {
  const AttentionCase problem = plain_case({40, 0, 17});
  const AttentionResult result = make_result(problem);
  run_rank(problem, Plan::from_lengths(problem.lengths, 1), forbidden(), result);
  expect_same_bits(result, run_case(problem, 1), true);
  expect_exact_attention(problem, result, run_reference(problem), result);
}

TEST(Trap14, SeveralGroupsOfOneProcess) {
  // Two groups smaller than all ranks together, at work at the same time on different packs.
  const AttentionCase first = plain_case({64, 9});
  AttentionCase second = plain_case({100});
  second.options.mask.causal = false;
  AttentionResult of_first;
  AttentionResult of_second;
  std::thread other([&] { of_second = run_case(second, 3); });
  of_first = run_case(first, 2);
  other.join();
  expect_exact_attention(first, of_first, run_reference(first), run_case(first, 1));
  expect_exact_attention(second, of_second, run_reference(second), run_case(second, 1));
}

TEST(Trap14, APlanForAnotherGroupIsRefused) {
  const auto errors = collect_ranks(2, [&](const Communicator& communicator) {
    const AttentionCase problem = plain_case({30});
    run_rank(problem, Plan::from_lengths(problem.lengths, 3), communicator, make_result(problem));
  });
  for (const std::string& error : errors) {
    EXPECT_NE(error.find("the plan is for 3 ranks and the group has 2"), std::string::npos)
        << error;
  }
}

class Trap17 : public testing::Test {
 protected:
  Trap17() { setenv("ZIGZAG_TIMEOUT_S", "0.5", 1); }
  ~Trap17() override { unsetenv("ZIGZAG_TIMEOUT_S"); }

  /// Runs and checks that it ends well before anything like the default deadline.
  std::vector<std::string> run(int world, const std::function<void(const Communicator&)>& work) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::string> errors = collect_ranks(world, work);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    EXPECT_LT(took.count(), 30.0);
    return errors;
  }
};

TEST_F(Trap17, ARankThatDiesEndsItsPeers) {
  const AttentionCase problem = plain_case({40});
  const Plan plan = Plan::from_lengths(problem.lengths, 4);
  const auto errors = run(4, [&](const Communicator& communicator) {
    if (communicator.rank() == 2) throw std::runtime_error("out of memory");
    run_rank(problem, plan, communicator, make_result(problem));
  });
  EXPECT_EQ(errors[2], "exception: out of memory");
  for (const std::size_t r : {0U, 1U, 3U}) {
    EXPECT_TRUE(errors[r].starts_with("CommunicationError: rank " + std::to_string(r)))
        << errors[r];
    EXPECT_NE(errors[r].find("rank 2"), std::string::npos) << errors[r];
  }
}

TEST_F(Trap17, ARankThatNeverComesIsATimeout) {
  const AttentionCase problem = plain_case({40});
  const Plan plan = Plan::from_lengths(problem.lengths, 3);
  const auto errors = run(3, [&](const Communicator& communicator) {
    if (communicator.rank() == 1) std::this_thread::sleep_for(std::chrono::seconds(2));
    run_rank(problem, plan, communicator, make_result(problem));
  });
  bool timeout = false;
  for (const std::string& error : errors) {
    EXPECT_FALSE(error.empty());
    if (!error.starts_with("Timeout: ")) continue;
    timeout = true;
    EXPECT_NE(error.find("rank 1"), std::string::npos) << error;
    EXPECT_NE(error.find("0.5 s"), std::string::npos) << error;
  }
  EXPECT_TRUE(timeout);
}

TEST_F(Trap17, ARankThatFailsBetweenExchangesTellsWhy) {
  const AttentionCase problem = plain_case({40});
  const Plan plan = Plan::from_lengths(problem.lengths, 2);
  const auto errors = run(2, [&](const Communicator& communicator) {
    if (communicator.rank() == 0) {
      communicator.abort("the disk is full");
      throw std::runtime_error("the disk is full");
    }
    run_rank(problem, plan, communicator, make_result(problem));
  });
  EXPECT_NE(errors[1].find("the disk is full"), std::string::npos) << errors[1];
  EXPECT_NE(errors[1].find("rank 0"), std::string::npos) << errors[1];
}

TEST_F(Trap17, TheDeadlineIsChecked) {
  for (const char* text : {"0", "-1", "soon", "inf", "nan"}) {
    setenv("ZIGZAG_TIMEOUT_S", text, 1);
    EXPECT_THROW(timeout_seconds(), InvalidArgument) << text;
  }
  unsetenv("ZIGZAG_TIMEOUT_S");
  EXPECT_EQ(timeout_seconds(), 300);
}

}  // namespace
}  // namespace zigzag::test
