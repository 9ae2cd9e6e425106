// The float64 reference itself: against a softmax written out by hand, and its gradients against
// finite differences in float64.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "support/attention_case.h"
#include "support/compare.h"
#include "support/plan_check.h"
#include "support/random.h"

namespace zigzag::test {
namespace {

using std::int64_t;

/// The problem in float64: q, k, v as values, nothing of the library but the mask's definition.
struct Small {
  AttentionCase problem;
  std::vector<double> q, k, v, dout;

  explicit Small(AttentionCase given) : problem(std::move(given)) {
    const Inputs in = whole_inputs(problem);
    q = values(in.q);
    k = values(in.k);
    v = values(in.v);
    dout = values(in.dout);
  }

  double at(const std::vector<double>& x, int64_t token, int64_t head, int64_t heads,
            int64_t c) const {
    return x[static_cast<std::size_t>((token * heads + head) * problem.head_dim + c)];
  }

  /// out [tokens, heads, head_dim] and lse [tokens, heads].
  void forward(std::vector<double>& out, std::vector<double>& lse) const {
    const AttentionOptions& options = problem.options;
    const double scale =
        options.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(problem.head_dim)));
    out.clear();
    lse.clear();
    int64_t start = 0;
    for (const int64_t length : problem.lengths) {
      for (int64_t i = 0; i < length; ++i) {
        for (int64_t h = 0; h < problem.heads; ++h) {
          const int64_t kv = h * problem.kv_heads / problem.heads;
          std::vector<double> weights(static_cast<std::size_t>(length), 0);
          double sum = 0;
          for (int64_t j = 0; j < length; ++j) {
            if (!sees(options.mask, i, j)) continue;
            double s = 0;
            for (int64_t c = 0; c < problem.head_dim; ++c) {
              s +=
                  at(q, start + i, h, problem.heads, c) * at(k, start + j, kv, problem.kv_heads, c);
            }
            s *= scale;
            if (options.softcap > 0) s = options.softcap * std::tanh(s / options.softcap);
            weights[static_cast<std::size_t>(j)] = std::exp(s);
            sum += std::exp(s);
          }
          lse.push_back(std::log(sum));
          for (int64_t c = 0; c < problem.head_dim; ++c) {
            double x = 0;
            for (int64_t j = 0; j < length; ++j) {
              x += weights[static_cast<std::size_t>(j)] / sum *
                   at(v, start + j, kv, problem.kv_heads, c);
            }
            out.push_back(x);
          }
        }
      }
      start += length;
    }
  }

  /// sum(out * dout).
  double loss() const {
    std::vector<double> out;
    std::vector<double> lse;
    forward(out, lse);
    double result = 0;
    for (std::size_t i = 0; i < out.size(); ++i) result += out[i] * dout[i];
    return result;
  }

  /// Central differences of the loss in each element of x.
  std::vector<double> gradient(std::vector<double>& x) const {
    constexpr double kStep = 1e-5;
    std::vector<double> result;
    for (double& value : x) {
      const double before = value;
      value = before + kStep;
      const double above = loss();
      value = before - kStep;
      const double below = loss();
      value = before;
      result.push_back((above - below) / (2 * kStep));
    }
    return result;
  }
};

std::vector<AttentionCase> small_cases() {
  std::vector<AttentionCase> cases;
  const std::vector<Mask> masks{{true, -1, -1}, {false, -1, -1}, {true, 2, -1}, {false, 1, 2}};
  for (const Mask& mask : masks) {
    for (const double softcap : {0.0, 2.0}) {
      AttentionCase problem;
      problem.lengths = {5, 0, 1, 7};
      problem.heads = 4;
      problem.kv_heads = 2;
      problem.head_dim = 3;
      problem.options.mask = mask;
      problem.options.softcap = softcap;
      if (softcap > 0) problem.options.softmax_scale = 0.9;
      problem.seed = mix(base_seed(), cases.size());
      cases.push_back(problem);
    }
  }
  return cases;
}

TEST(Reference, ForwardEqualsASoftmaxWrittenOut) {
  for (const AttentionCase& problem : small_cases()) {
    const Small small(problem);
    std::vector<double> out;
    std::vector<double> lse;
    small.forward(out, lse);
    const ReferenceResult reference = run_reference(problem);
    const auto tokens = total(problem.lengths);
    EXPECT_TRUE(
        close("out", reference.out, out, std::vector<int64_t>{tokens, 4, 3}, {1e-13, 1e-13}));
    EXPECT_TRUE(close("lse", reference.lse, lse, std::vector<int64_t>{tokens, 4}, {1e-13, 1e-13}));
  }
}

TEST(Reference, GradientsEqualFiniteDifferences) {
  for (const AttentionCase& problem : small_cases()) {
    SCOPED_TRACE(problem.text());
    Small small(problem);
    const ReferenceResult reference = run_reference(problem);
    const auto tokens = total(problem.lengths);
    const std::vector<int64_t> q_shape{tokens, 4, 3};
    const std::vector<int64_t> k_shape{tokens, 2, 3};
    constexpr Bound kBound{1e-8, 1e-8};
    EXPECT_TRUE(close("dq", reference.dq, small.gradient(small.q), q_shape, kBound));
    EXPECT_TRUE(close("dk", reference.dk, small.gradient(small.k), k_shape, kBound));
    EXPECT_TRUE(close("dv", reference.dv, small.gradient(small.v), k_shape, kBound));
  }
}

TEST(Reference, EnginesGradientsEqualFiniteDifferences) {
  // The engine over three ranks in float32 against float64 differences of the written-out loss.
  for (const AttentionCase& problem : small_cases()) {
    SCOPED_TRACE(problem.text());
    Small small(problem);
    const AttentionResult result = run_case(problem, 3);
    constexpr Bound kBound{3e-6, 2e-5};
    EXPECT_TRUE(
        close("dq", values(result.dq), small.gradient(small.q), result.dq.view().shape, kBound));
    EXPECT_TRUE(
        close("dk", values(result.dk), small.gradient(small.k), result.dk.view().shape, kBound));
    EXPECT_TRUE(
        close("dv", values(result.dv), small.gradient(small.v), result.dv.view().shape, kBound));
  }
}

TEST(Comparator, ANanNeverPasses) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const std::vector<int64_t> shape{3};
  const std::vector<double> good{1, 2, 3};
  constexpr Bound kLoose{1e9, 1e9};
  EXPECT_TRUE(close("x", good, good, shape, {0, 0}));
  EXPECT_FALSE(close("x", std::vector<double>{1, kNan, 3}, good, shape, kLoose));
  EXPECT_FALSE(close("x", good, std::vector<double>{1, kNan, 3}, shape, kLoose));
  EXPECT_FALSE(close("x", std::vector<double>{1, kInfinity, 3}, good, shape, kLoose));
  EXPECT_FALSE(close("x", std::vector<double>{1, -kInfinity, 3},
                     std::vector<double>{1, kInfinity, 3}, shape, kLoose));
  EXPECT_TRUE(close("x", std::vector<double>{1, kNan, -kInfinity},
                    std::vector<double>{1, kNan, -kInfinity}, shape, {0, 0}));
  EXPECT_FALSE(close("x", std::vector<double>{1, 2, 3.1}, good, shape, {1e-3, 1}));
  EXPECT_FALSE(close("x", std::vector<double>{1, 2, 3.1}, good, shape, {1, 1e-3}));
  EXPECT_FALSE(close("x", std::vector<double>{0, 0}, std::vector<double>{0, 0, 0}, shape, kLoose));
  // One wrong element among many cannot hide behind a global similarity.
  std::vector<double> many(1000000, 1.0);
  std::vector<double> wrong = many;
  wrong[4711] = 1.001;
  const auto result = close("x", wrong, many, std::vector<int64_t>{1000, 1000}, {2e-6, 2e-5});
  EXPECT_FALSE(result);
  EXPECT_NE(std::string(result.message()).find("[4, 711]"), std::string::npos) << result.message();
}

TEST(Comparator, FencesSeeWritesOutside) {
  const Tensor whole(DType::kFloat32, {4, 3, 2});
  const Tensor part = whole.slice(1, 1, 1);
  EXPECT_EQ(count_poison(part), 8);
  fill_bits(part, 1);
  EXPECT_EQ(part.touched_outside(), "");
  EXPECT_EQ(count_poison(part), 0);
  whole.view().as<float>()[0] = 0;
  EXPECT_NE(part.touched_outside(), "");
}

}  // namespace
}  // namespace zigzag::test
