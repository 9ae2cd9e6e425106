#include "support/attention_case.h"

#include <array>
#include <cmath>
#include <cstring>

#include <fmt/format.h>

#include "support/compare.h"
#include "support/plan_check.h"
#include "support/random.h"
#include "support/ranks.h"

namespace zigzag::test {

namespace {

using std::int64_t;

/// q-like, k-like and v-like tensors of one rank, and what else their memory holds.
struct Rows {
  Tensor q, k, v;
};

Rows allocate(const AttentionCase& problem, int64_t rows) {
  const DType dtype = problem.dtype;
  const int64_t heads = problem.heads;
  const int64_t kv_heads = problem.kv_heads;
  const int64_t dim = problem.head_dim;
  Rows result;
  switch (problem.storage) {
    case Storage::kContiguous:
      result.q = Tensor(dtype, {rows, heads, dim});
      result.k = Tensor(dtype, {rows, kv_heads, dim});
      result.v = Tensor(dtype, {rows, kv_heads, dim});
      break;
    case Storage::kHeadSlice:
      result.q = Tensor(dtype, {rows, heads + 2, dim}).slice(1, 1, heads);
      result.k = Tensor(dtype, {rows, kv_heads + 3, dim}).slice(1, 1, kv_heads);
      result.v =
          Tensor(dtype, {rows, kv_heads + 1, dim + 8}).slice(1, 1, kv_heads).slice(2, 0, dim);
      break;
    case Storage::kKvPacked: {
      result.q = Tensor(dtype, {rows, heads, dim});
      const Tensor kv(dtype, {rows, 2, kv_heads, dim});
      result.k = kv.select(1, 0);
      result.v = kv.select(1, 1);
      break;
    }
    case Storage::kQkvPacked: {
      const Tensor qkv(dtype, {rows, heads + 2 * kv_heads, dim});
      result.q = qkv.slice(1, 0, heads);
      result.k = qkv.slice(1, heads, kv_heads);
      result.v = qkv.slice(1, heads + kv_heads, kv_heads);
      break;
    }
  }
  return result;
}

void draw(const AttentionCase& problem, Input which, const std::vector<int64_t>& tokens,
          const TensorView& x) {
  const int64_t heads = x.shape[1];
  const int64_t dim = x.shape[2];
  int64_t number = 0;
  for (const int64_t token : tokens) {
    for (int64_t h = 0; h < heads; ++h) {
      Stream stream(mix(mix(problem.seed, static_cast<std::uint64_t>(which)),
                        static_cast<std::uint64_t>(token * 1024 + h)));
      for (int64_t c = 0; c < dim; ++c) {
        double value = stream.normal();
        if (problem.edit) value = problem.edit(which, token, h, c, value);
        store(x, number++, value);
      }
    }
  }
}

/// Rows of a rank to their global places.
void put(const TensorView& local, const std::vector<int64_t>& tokens, const TensorView& global) {
  const auto row_bytes = static_cast<std::size_t>(global.row_elements() * item_size(global.dtype));
  const std::vector<std::byte> rows = bytes(local);
  for (std::size_t row = 0; row < tokens.size(); ++row) {
    std::memcpy(global.as<std::byte>() + tokens[row] * static_cast<int64_t>(row_bytes),
                rows.data() + row * row_bytes, row_bytes);
  }
}

void expect_written(const char* name, const TensorView& view, int rank) {
  EXPECT_EQ(count_poison(view), 0) << name << " of rank " << rank << " has unwritten elements";
}

std::vector<int64_t> all_tokens(const AttentionCase& problem) {
  std::vector<int64_t> tokens(static_cast<std::size_t>(total(problem.lengths)));
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int64_t>(i);
  return tokens;
}

std::string storage_text(Storage storage) {
  constexpr std::array<const char*, 4> kNames{"contiguous", "head slices", "kv packed",
                                              "qkv packed"};
  return kNames[static_cast<std::size_t>(storage)];
}

}  // namespace

std::string AttentionCase::text() const {
  return fmt::format(
      "lengths {}, heads {}/{}, head_dim {}, {}, {}, softcap {}, scale {}, stage {}, {}, seed {}",
      lengths_text(lengths), heads, kv_heads, head_dim, dtype_name(dtype), mask_text(options.mask),
      options.softcap, options.softmax_scale.value_or(0), options.kv_heads_per_stage,
      storage_text(storage), seed);
}

AttentionResult make_result(const AttentionCase& problem) {
  const int64_t tokens = total(problem.lengths);
  AttentionResult result;
  result.out = Tensor(problem.dtype, {tokens, problem.heads, problem.head_dim});
  result.lse = Tensor(DType::kFloat32, {tokens, problem.heads});
  if (!problem.backward) return result;
  result.dq = Tensor(problem.dtype, {tokens, problem.heads, problem.head_dim});
  result.dk = Tensor(problem.dtype, {tokens, problem.kv_heads, problem.head_dim});
  result.dv = Tensor(problem.dtype, {tokens, problem.kv_heads, problem.head_dim});
  return result;
}

void run_rank(const AttentionCase& problem, const Plan& plan, const Communicator& communicator,
              const AttentionResult& result) {
  const int rank = communicator.rank();
  const std::vector<int64_t> tokens = plan.token_indices(rank);
  const auto rows = static_cast<int64_t>(tokens.size());
  const Rows inputs = allocate(problem, rows);
  draw(problem, Input::kQ, tokens, inputs.q);
  draw(problem, Input::kK, tokens, inputs.k);
  draw(problem, Input::kV, tokens, inputs.v);
  const std::vector<std::byte> before = bytes(inputs.k);

  const bool sliced = problem.storage == Storage::kHeadSlice;
  const Tensor out = allocate(problem, rows).q;
  const Tensor lse =
      sliced ? Tensor(DType::kFloat32, {rows, problem.heads + 3}).slice(1, 2, problem.heads)
             : Tensor(DType::kFloat32, {rows, problem.heads});
  forward(inputs.q, inputs.k, inputs.v, plan, communicator, problem.options, out, lse);
  expect_written("out", out, rank);
  expect_written("lse", lse, rank);
  EXPECT_EQ(out.touched_outside(), "") << "out of rank " << rank;
  EXPECT_EQ(lse.touched_outside(), "") << "lse of rank " << rank;
  put(out, tokens, result.out);
  put(lse, tokens, result.lse);

  if (problem.backward) {
    const Tensor dout = allocate(problem, rows).q;
    draw(problem, Input::kDout, tokens, dout);
    const Rows gradients = allocate(problem, rows);
    backward(dout, inputs.q, inputs.k, inputs.v, out, lse, plan, communicator, problem.options,
             gradients.q, gradients.k, gradients.v);
    expect_written("dq", gradients.q, rank);
    expect_written("dk", gradients.k, rank);
    expect_written("dv", gradients.v, rank);
    const std::array<TensorView, 3> written{gradients.q, gradients.k, gradients.v};
    const bool shared = problem.storage == Storage::kQkvPacked;
    const bool kv_shared = shared || problem.storage == Storage::kKvPacked;
    if (shared) {
      EXPECT_EQ(gradients.q.touched_outside(written), "") << "dqkv of rank " << rank;
    } else {
      EXPECT_EQ(gradients.q.touched_outside(), "") << "dq of rank " << rank;
    }
    if (kv_shared && !shared) {
      EXPECT_EQ(gradients.k.touched_outside({written.data() + 1, 2}), "") << "dkv of rank " << rank;
    } else if (!kv_shared) {
      EXPECT_EQ(gradients.k.touched_outside(), "") << "dk of rank " << rank;
      EXPECT_EQ(gradients.v.touched_outside(), "") << "dv of rank " << rank;
    }
    put(gradients.q, tokens, result.dq);
    put(gradients.k, tokens, result.dk);
    put(gradients.v, tokens, result.dv);
  }
  EXPECT_EQ(bytes(inputs.k), before) << "k of rank " << rank << " was changed";
  // A rank that returns frees its inputs: nobody may read them any more.
}

AttentionResult run_case(const AttentionCase& problem, int world_size) {
  const Plan plan = Plan::from_lengths(problem.lengths, world_size);
  AttentionResult result = make_result(problem);
  if (world_size == 1) {
    run_rank(problem, plan, Communicator::self(), result);
  } else {
    run_ranks(world_size, [&](const Communicator& communicator) {
      run_rank(problem, plan, communicator, result);
    });
    // Ranks of one process lend their tensors: those that cannot must give the same bits.
    AttentionResult gathered = make_result(problem);
    run_ranks(world_size, [&](const Communicator& communicator) {
      run_rank(problem, plan, gathering(communicator), gathered);
    });
    expect_same_bits(gathered, result, true);
  }
  return result;
}

Inputs whole_inputs(const AttentionCase& problem) {
  const std::vector<int64_t> tokens = all_tokens(problem);
  const auto rows = static_cast<int64_t>(tokens.size());
  Inputs inputs;
  inputs.q = Tensor(problem.dtype, {rows, problem.heads, problem.head_dim});
  inputs.k = Tensor(problem.dtype, {rows, problem.kv_heads, problem.head_dim});
  inputs.v = Tensor(problem.dtype, {rows, problem.kv_heads, problem.head_dim});
  inputs.dout = Tensor(problem.dtype, {rows, problem.heads, problem.head_dim});
  draw(problem, Input::kQ, tokens, inputs.q);
  draw(problem, Input::kK, tokens, inputs.k);
  draw(problem, Input::kV, tokens, inputs.v);
  draw(problem, Input::kDout, tokens, inputs.dout);
  return inputs;
}

ReferenceResult run_reference(const AttentionCase& problem) {
  const Inputs in = whole_inputs(problem);
  const std::vector<int64_t> cu_seqlens = cumulative(problem.lengths);
  const std::vector<int64_t>& q_shape = in.q.view().shape;
  const std::vector<int64_t>& k_shape = in.k.view().shape;
  const Tensor out(DType::kFloat64, q_shape);
  const Tensor lse(DType::kFloat64, {q_shape[0], q_shape[1]});
  ReferenceResult result;
  reference::forward(in.q, in.k, in.v, cu_seqlens, problem.options, out, lse);
  result.out = values(out);
  result.lse = values(lse);
  if (!problem.backward) return result;
  const Tensor dq(DType::kFloat64, q_shape);
  const Tensor dk(DType::kFloat64, k_shape);
  const Tensor dv(DType::kFloat64, k_shape);
  reference::backward(in.dout, in.q, in.k, in.v, cu_seqlens, problem.options, dq, dk, dv);
  result.dq = values(dq);
  result.dk = values(dk);
  result.dv = values(dv);
  return result;
}

void expect_exact_attention(const AttentionCase& problem, const AttentionResult& result,
                            const ReferenceResult& reference, const AttentionResult& one_rank) {
  const bool narrow = problem.dtype != DType::kFloat32;
  const auto check = [&](const char* name, const Tensor& actual, const Tensor& alone,
                         const std::vector<double>& expected, Bound bound, double factor) {
    const std::vector<double> found = values(actual);
    if (narrow) {
      const Difference error = compare(values(alone), expected);
      bound = {factor * error.relative_l2,
               error.reference_max == 0 ? 0 : factor * error.max_abs / error.reference_max};
      // Sums in another order may round to the neighbour: half a unit in the last place more.
      if (factor > 1.05) bound.max_abs += problem.dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
      // What one rank may be off by at all: about the type's own rounding, more where gradients of
      // short documents cancel.
      const bool gradient = name[0] == 'd';
      const bool coarse = problem.dtype == DType::kBFloat16;
      const double most = (coarse ? 1e-2 : 1.5e-3) * (gradient ? 3 : 1);
      if (error.reference_max > 1e-12 && (!gradient || total(problem.lengths) >= 100)) {
        EXPECT_LE(error.relative_l2, most) << name << " on one rank";
      }
    }
    // Gradients that cancel to nothing (every document has one token) have no scale of their own.
    const Difference difference = compare(found, expected);
    if (difference.special_mismatches == 0 && difference.reference_max < 1e-12 &&
        difference.max_abs < (narrow ? 1e-4 : 1e-5)) {
      return;
    }
    EXPECT_TRUE(close(name, found, expected, actual.view().shape, bound)) << problem.text();
  };
  constexpr Bound kRows{2e-6, 2e-5};
  constexpr Bound kSums{3e-6, 2e-5};
  check("out", result.out, one_rank.out, reference.out, kRows, 1.05);
  check("lse", result.lse, one_rank.lse, reference.lse, kRows, 1.05);
  if (!problem.backward) return;
  check("dq", result.dq, one_rank.dq, reference.dq, kRows, 1.05);
  check("dk", result.dk, one_rank.dk, reference.dk, kSums, 1.1);
  check("dv", result.dv, one_rank.dv, reference.dv, kSums, 1.1);
}

void check_over_ranks(const AttentionCase& problem, std::span<const int> worlds) {
  SCOPED_TRACE(problem.text());
  const ReferenceResult reference = run_reference(problem);
  const AttentionResult one_rank = run_case(problem, 1);
  for (const int world : worlds) {
    SCOPED_TRACE(std::to_string(world) + " ranks");
    const AttentionResult result = run_case(problem, world);
    expect_exact_attention(problem, result, reference, one_rank);
    if (testing::Test::HasFailure()) return;
  }
}

void expect_same_bits(const AttentionResult& actual, const AttentionResult& expected, bool all) {
  const auto check = [](const char* name, const Tensor& a, const Tensor& b) {
    EXPECT_TRUE(same_bits(name, bytes(a), bytes(b), item_size(a.view().dtype)));
  };
  check("out", actual.out, expected.out);
  check("lse", actual.lse, expected.lse);
  if (actual.dq.view().shape.empty()) return;
  check("dq", actual.dq, expected.dq);
  if (!all) return;
  check("dk", actual.dk, expected.dk);
  check("dv", actual.dv, expected.dv);
}

}  // namespace zigzag::test
