#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "support/packs.h"
#include "support/tensor.h"
#include "zigzag/attention.h"

namespace zigzag::test {

/// How the inputs and gradients of a rank lie in memory.
enum class Storage : std::uint8_t {
  kContiguous,
  kHeadSlice,  // inner heads of a wider tensor
  kKvPacked,   // k and v (dk and dv) in one [tokens, 2, kv_heads, head_dim]
  kQkvPacked,  // q, k and v (dq, dk, dv) in one [tokens, heads + 2 kv_heads, head_dim]
};

/// Names of the tensors in a seed's streams.
enum class Input : std::uint8_t { kQ, kK, kV, kDout };

/// One problem. Each rank draws its rows from the seed by global token.
struct AttentionCase {
  Lengths lengths;
  std::int64_t heads = 4;
  std::int64_t kv_heads = 2;
  std::int64_t head_dim = 32;
  DType dtype = DType::kFloat32;
  AttentionOptions options;
  Storage storage = Storage::kContiguous;
  std::uint64_t seed = 0;
  bool backward = true;
  /// Changes a drawn input: (which, global token, head, element of the head, drawn value).
  std::function<double(Input, std::int64_t, std::int64_t, std::int64_t, double)> edit = nullptr;

  std::string text() const;
};

/// Outputs in global order, contiguous. Gradients are empty without a backward.
struct AttentionResult {
  Tensor out, lse, dq, dk, dv;
};

/// The same from the float64 reference.
struct ReferenceResult {
  std::vector<double> out, lse, dq, dk, dv;
};

/// One rank's call into fenced and poisoned outputs; its rows go to their global places in
/// `result`. Adds gtest failures for unwritten elements and writes outside of the outputs.
void run_rank(const AttentionCase& problem, const Plan& plan, const Communicator& communicator,
              const AttentionResult& result);

/// Results of the right shapes, poisoned.
AttentionResult make_result(const AttentionCase& problem);

/// All ranks as threads; one rank runs without any group.
AttentionResult run_case(const AttentionCase& problem, int world_size);

/// The whole pack in global order.
struct Inputs {
  Tensor q, k, v, dout;
};
Inputs whole_inputs(const AttentionCase& problem);

ReferenceResult run_reference(const AttentionCase& problem);

/// float32: the bounds of docs/testing.md. 16 bits: the error may be 1.05 (out, lse, dq) or 1.1
/// (dk, dv) times that of `one_rank`, the same engine's result on one rank.
void expect_exact_attention(const AttentionCase& problem, const AttentionResult& result,
                            const ReferenceResult& reference, const AttentionResult& one_rank);

/// One problem at several numbers of ranks, all against one reference; stops at the first failure.
void check_over_ranks(const AttentionCase& problem, std::span<const int> worlds);

/// out, lse, dq (and, with `all`, dk and dv) have the same bits.
void expect_same_bits(const AttentionResult& actual, const AttentionResult& expected, bool all);

}  // namespace zigzag::test
