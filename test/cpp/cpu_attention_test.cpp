// The CPU kernels on every target of this machine: against the float64 reference and the plain
// twin, with forced targets, threads, special values and rows that see nothing.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "backend.h"
#include "cpu/kernel.h"
#include "cpu/target.h"
#include "support/attention_case.h"
#include "support/compare.h"
#include "support/random.h"
#include "zigzag/error.h"
#include "zigzag/system.h"

namespace zigzag::test {
namespace {

using std::int64_t;

// Sets an environment variable for a scope.
class Environment {
 public:
  Environment(const char* name, std::string_view value) : name_(name) {
    setenv(name, std::string(value).c_str(), 1);
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;
  ~Environment() { unsetenv(name_); }

 private:
  const char* name_;
};

struct Shape {
  int64_t heads, kv_heads, head_dim;
};

class CpuTarget : public testing::TestWithParam<cpu::Target> {
 protected:
  Environment target_{"ZIGZAG_CPU_TARGET", cpu::target_name(GetParam())};
};

AttentionCase make_case(const Shape& shape, DType dtype, Lengths lengths) {
  AttentionCase problem;
  problem.lengths = std::move(lengths);
  problem.heads = shape.heads;
  problem.kv_heads = shape.kv_heads;
  problem.head_dim = shape.head_dim;
  problem.dtype = dtype;
  problem.seed = mix(base_seed(), static_cast<std::uint64_t>(shape.head_dim * 64 + shape.heads));
  return problem;
}

const std::array kTypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

TEST_P(CpuTarget, MatchesTheFloat64Reference) {
  const std::array<Shape, 12> shapes = {{{1, 1, 1},
                                         {8, 8, 8},
                                         {8, 2, 32},
                                         {8, 1, 64},
                                         {5, 5, 33},
                                         {6, 3, 80},
                                         {2, 1, 96},
                                         {2, 2, 128},
                                         {3, 1, 120},
                                         {32, 8, 16},
                                         {2, 1, 256},
                                         {1, 1, 255}}};
  int number = 0;
  for (const Shape& shape : shapes) {
    for (const DType dtype : kTypes) {
      // Every shape in float32, every other one in each 16-bit type.
      if (number++ % 2 == 1 && dtype != DType::kFloat32) continue;
      AttentionCase problem = make_case(shape, dtype, {0, 1, 2, 129, 31, 64, 150});
      problem.storage = static_cast<Storage>(number % 4);
      problem.options.mask.causal = number % 3 != 0;
      const AttentionResult result = run_case(problem, 1);
      expect_exact_attention(problem, result, run_reference(problem), result);
    }
  }
}

TEST_P(CpuTarget, MasksCapsAndScales) {
  for (const DType dtype : kTypes) {
    for (const Mask& mask : {Mask{true, -1, -1}, Mask{false, -1, -1}, Mask{true, 40, -1},
                             Mask{false, 5, 60}, Mask{false, 0, 0}, Mask{false, -1, 3}}) {
      AttentionCase problem = make_case({4, 2, 48}, dtype, {300, 1, 17, 128});
      problem.options.mask = mask;
      const AttentionResult plain = run_case(problem, 1);
      expect_exact_attention(problem, plain, run_reference(problem), plain);
      problem.options.softcap = 3;
      problem.options.softmax_scale = mask.causal ? 0.3 : -0.4;
      const AttentionResult capped = run_case(problem, 1);
      expect_exact_attention(problem, capped, run_reference(problem), capped);
    }
    AttentionCase problem = make_case({2, 1, 16}, dtype, {150});
    problem.options.softmax_scale = 0;
    const AttentionResult flat = run_case(problem, 1);
    expect_exact_attention(problem, flat, run_reference(problem), flat);
  }
}

TEST_P(CpuTarget, BitsDoNotDependOnRanksOrThreads) {
  for (const DType dtype : kTypes) {
    for (const Mask& mask : {Mask{true, -1, -1}, Mask{false, 150, 20}}) {
      AttentionCase problem = make_case({4, 2, 40}, dtype, {523, 1, 64, 65});
      problem.options.mask = mask;
      const AttentionResult one = run_case(problem, 1);
      expect_same_bits(run_case(problem, 3), one, false);
      for (const char* threads : {"1", "2", "5"}) {
        const Environment slots("ZIGZAG_NUM_THREADS", threads);
        expect_same_bits(run_case(problem, 1), one, true);
      }
    }
  }
}

// Softmax of scores from -900 to 900: maxima that move far in every block. Forward only: an lse of
// 900 in float32 leaves the backward's weights no more than 4 digits.
TEST_P(CpuTarget, ScoresOfEverySize) {
  for (const DType dtype : kTypes) {
    AttentionCase problem = make_case({1, 1, 8}, dtype, {400});
    problem.options.softmax_scale = 1;
    problem.backward = false;
    problem.edit = [](Input which, int64_t token, int64_t, int64_t c, double value) {
      if (which == Input::kK) return c == 0 ? static_cast<double>(token % 7 * 20 - 60) : 0.0;
      if (which == Input::kQ) return c == 0 ? static_cast<double>(token % 16) : 0.0;
      return value;
    };
    const AttentionResult result = run_case(problem, 1);
    expect_exact_attention(problem, result, run_reference(problem), result);
  }
}

// What is not finite reaches exactly the rows that see it.
TEST_P(CpuTarget, SpecialValuesStayWhereTheyAreSeen) {
  constexpr int64_t kToken = 100;
  for (const DType dtype : kTypes) {
    AttentionCase problem = make_case({2, 1, 24}, dtype, {240});
    const AttentionResult clean = run_case(problem, 1);
    for (const Input which : {Input::kQ, Input::kK, Input::kV, Input::kDout}) {
      for (const double value :
           {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
        problem.edit = [=](Input input, int64_t token, int64_t, int64_t c, double drawn) {
          return input == which && token == kToken && c == 3 ? value : drawn;
        };
        const AttentionResult result = run_case(problem, 1);
        const auto rows = [&](const Tensor& x, const Tensor& y, int64_t begin, int64_t end) {
          return same_bits("rows", bytes(x.slice(0, begin, end - begin)),
                           bytes(y.slice(0, begin, end - begin)), item_size(dtype));
        };
        EXPECT_TRUE(rows(result.out, clean.out, 0, kToken));
        EXPECT_TRUE(rows(result.dq, clean.dq, 0, kToken));
        const bool from_query = which == Input::kQ || which == Input::kDout;
        if (from_query) {
          // Later rows do not see another query; later keys are not seen by it.
          EXPECT_TRUE(rows(result.out, clean.out, kToken + 1, 240));
          EXPECT_TRUE(rows(result.dq, clean.dq, kToken + 1, 240));
          EXPECT_TRUE(rows(result.dk, clean.dk, kToken + 1, 240));
          EXPECT_TRUE(rows(result.dv, clean.dv, kToken + 1, 240));
        }
        const auto finite = [&](const Tensor& x, int64_t row) {
          for (const double v : values(x.slice(0, row, 1))) {
            if (!std::isfinite(v)) return false;
          }
          return true;
        };
        const std::string what = std::string(dtype_name(dtype)) + ", input " +
                                 std::to_string(static_cast<int>(which)) + " " +
                                 std::to_string(value);
        EXPECT_FALSE(finite(result.dq, kToken)) << what;
        // An infinite key times a negative query has weight 0, so those rows may be finite.
        if (which == Input::kK && std::isinf(value)) continue;
        if (which != Input::kDout) {
          EXPECT_FALSE(finite(result.out, kToken)) << what;
        }
        EXPECT_EQ(finite(result.out, 239), from_query) << what;
      }
    }
  }
}

// Rows without keys: an item whose keys all lie outside of the mask.
TEST_P(CpuTarget, RowsThatSeeNothing) {
  for (const DType dtype : kTypes) {
    constexpr int64_t kRows = 70;
    const Lengths cu = {0, 400};
    const Plan plan(cu, 1);
    const WorkItem item{0, 0, kRows, 0, 100, 0, 300, 400};  // queries from 0, keys from 300
    Tensor q(dtype, {kRows, 2, 16}), dout(dtype, {kRows, 2, 16}), out(dtype, {kRows, 2, 16});
    Tensor dq(dtype, {kRows, 2, 16}), lse(DType::kFloat32, {kRows, 2});
    Tensor k(dtype, {100, 1, 16}), v(dtype, {100, 1, 16}), dk(dtype, {100, 1, 16});
    Tensor dv(dtype, {100, 1, 16});
    for (const Tensor& x : {q, dout, k, v}) {
      for (int64_t i = 0; i < x.view().num_elements(); ++i) store(x, i, std::sin(double(i)));
    }
    for (const Kernels kernels : {Kernels::kFused, Kernels::kReference}) {
      AttendBackwardArgs args;
      args.q = q;
      args.k = k;
      args.v = v;
      args.out = out;
      args.lse = lse;
      args.plan = &plan;
      args.items = {&item, 1};
      args.dout = dout;
      args.dq = dq;
      args.dk = dk;
      args.dv = dv;
      const auto backend = make_cpu_backend(kernels);
      backend->attend(args);
      backend->attend_backward(args);
      for (const double x : values(out)) EXPECT_EQ(x, 0);
      for (const double x : values(lse)) EXPECT_EQ(x, -std::numeric_limits<double>::infinity());
      for (const Tensor& x : {dq, dk, dv}) {
        for (const double value : values(x)) EXPECT_EQ(value, 0);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, CpuTarget, testing::ValuesIn(cpu::supported_targets()),
                         [](const auto& test) { return std::string(target_name(test.param)); });

TEST(CpuBackend, RoundsGradientsOnce) {
  // 16-bit gradients are the float32 sums, rounded.
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const AttentionCase problem = make_case({4, 2, 64}, dtype, {700, 3, 150});
    const Inputs inputs = whole_inputs(problem);
    const AttentionResult rounded = run_case(problem, 1);
    const Lengths cu = cumulative(problem.lengths);
    const Plan plan(cu, 1);
    const std::vector<WorkItem> items = plan.work_items(0);
    Tensor dq(dtype, inputs.q.view().shape);
    Tensor dk(DType::kFloat32, inputs.k.view().shape), dv(DType::kFloat32, inputs.k.view().shape);
    AttendBackwardArgs args;
    args.q = inputs.q;
    args.k = inputs.k;
    args.v = inputs.v;
    args.out = rounded.out;
    args.lse = rounded.lse;
    args.plan = &plan;
    args.items = items;
    args.scale = 1 / std::sqrt(64.0);
    args.dout = inputs.dout;
    args.dq = dq;
    args.dk = dk;
    args.dv = dv;
    make_cpu_backend(Kernels::kFused)->attend_backward(args);
    Tensor once(dtype, dk.view().shape);
    for (const auto& [sum, result] : {std::pair{dk, rounded.dk}, std::pair{dv, rounded.dv}}) {
      for (int64_t i = 0; i < sum.view().num_elements(); ++i) store(once, i, load(sum, i));
      EXPECT_TRUE(same_bits("gradient", bytes(result), bytes(once), 2));
    }
  }
}

TEST(CpuBackend, ScratchOfAThreadIsBounded) {
  for (const cpu::Target target : cpu::supported_targets()) {
    for (const DType dtype : kTypes) {
      const cpu::KernelSet& set = cpu::kernels_of(target, dtype);
      EXPECT_LE(set.forward_scratch(256, 16 * set.panel_lanes), std::size_t{4} << 20);
      EXPECT_LE(set.backward_scratch(256, set.backward_lanes), std::size_t{4} << 20);
    }
  }
}

std::string error_of(const char* name, const char* value) {
  const Environment environment(name, value);
  try {
    (void)num_threads();
    (void)cpu::selected_target();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

TEST(CpuBackend, RefusesWrongVariables) {
  for (const char* text : {"0", "-1", "x", "2x", "1e9", "5000"}) {
    EXPECT_NE(error_of("ZIGZAG_NUM_THREADS", text).find(text), std::string::npos) << text;
  }
  EXPECT_NE(error_of("ZIGZAG_CPU_TARGET", "avx3").find("'avx3', which is no target; allowed here"),
            std::string::npos);
  EXPECT_EQ(error_of("ZIGZAG_CPU_TARGET", "baseline"), "");
  EXPECT_EQ(error_of("ZIGZAG_NUM_THREADS", "7"), "");
}

}  // namespace
}  // namespace zigzag::test
