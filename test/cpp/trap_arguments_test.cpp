// Traps of arguments: every option is honoured or refused, and every malformed input gets one
// sentence before any exchange. The sentences are the table docs/bad-inputs-cpp.md.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "support/attention_case.h"
#include "support/packs.h"
#include "support/random.h"
#include "support/ranks.h"
#include "support/tensor.h"
#include "zigzag/zigzag.h"

namespace zigzag::test {
namespace {

using std::int64_t;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

AttentionCase small_case() {
  AttentionCase problem;
  problem.lengths = {40, 23};
  problem.heads = 4;
  problem.kv_heads = 2;
  problem.head_dim = 16;
  problem.seed = base_seed();
  return problem;
}

TEST(Trap15, EveryOptionChangesTheResultOrIsStatedNotTo) {
  const AttentionCase plain = small_case();
  const AttentionResult usual = run_case(plain, 2);
  const auto differs = [&](const std::function<void(AttentionOptions&)>& change) {
    AttentionCase problem = plain;
    change(problem.options);
    const AttentionResult result = run_case(problem, 2);
    // Whatever it computes is what the reference computes with the same options.
    expect_exact_attention(problem, result, run_reference(problem), run_case(problem, 1));
    return bytes(result.out) != bytes(usual.out);
  };
  EXPECT_TRUE(differs([](AttentionOptions& o) { o.mask.causal = false; }));
  EXPECT_TRUE(differs([](AttentionOptions& o) { o.mask.window_left = 3; }));
  EXPECT_TRUE(differs([](AttentionOptions& o) { o.mask = {false, -1, 2}; }));
  EXPECT_TRUE(differs([](AttentionOptions& o) { o.softmax_scale = 0.7; }));
  EXPECT_TRUE(differs([](AttentionOptions& o) { o.softcap = 1.0; }));
  // A causal mask makes window_right 0; the CPU is always repeatable; stages bound memory only.
  EXPECT_FALSE(differs([](AttentionOptions& o) { o.mask.window_right = 9; }));
  EXPECT_FALSE(differs([](AttentionOptions& o) { o.deterministic = true; }));
  EXPECT_FALSE(differs([](AttentionOptions& o) { o.kv_heads_per_stage = 1; }));
}

/// A call that must be refused.
struct BadInput {
  std::string what;
  std::function<void()> call;
};

/// A call of forward and backward on one rank, to be spoilt in one place.
struct Call {
  Tensor q, k, v, out, lse, dout, dq, dk, dv;
  AttentionOptions options;
  std::vector<int64_t> cu_seqlens{0, 5, 12};
  bool odd_q = false;    // q's address
  bool one_row = false;  // out's stride

  Call() {
    const std::vector<int64_t> q_shape{12, 4, 16};
    const std::vector<int64_t> k_shape{12, 2, 16};
    for (Tensor* x : {&q, &out, &dout, &dq}) *x = Tensor(DType::kFloat32, q_shape);
    for (Tensor* x : {&k, &v, &dk, &dv}) *x = Tensor(DType::kFloat32, k_shape);
    lse = Tensor(DType::kFloat32, {12, 4});
  }
  Plan plan() const { return {std::span<const int64_t>(cu_seqlens), 1}; }
  void run() const {
    TensorView q_view = q;
    TensorView out_view = out;
    if (odd_q) q_view.data = static_cast<std::byte*>(q_view.data) + 1;
    if (one_row) out_view.strides[0] = 0;
    forward(q_view, k, v, plan(), forbidden(), options, out_view, lse);
  }
  void run_backward() const {
    backward(dout, q, k, v, out, lse, plan(), forbidden(), options, dq, dk, dv);
  }
};

std::function<void()> call(const std::function<void(Call&)>& spoil) {
  return [spoil] {
    Call c;
    spoil(c);
    c.run();
  };
}

std::function<void()> call_backward(const std::function<void(Call&)>& spoil) {
  return [spoil] {
    Call c;
    spoil(c);
    c.run_backward();
  };
}

Tensor f32(std::vector<int64_t> shape) { return {DType::kFloat32, std::move(shape)}; }

std::vector<BadInput> bad_packs() {
  const auto pack = [](std::vector<int64_t> cu_seqlens, int64_t world) {
    return [=] { const Plan plan(std::span<const int64_t>(cu_seqlens), world); };
  };
  return {
      {"`cu_seqlens` without entries", pack({}, 2)},
      {"`cu_seqlens` that does not start at 0", pack({1, 5}, 2)},
      {"`cu_seqlens` that decreases", pack({0, 5, 3, 9}, 2)},
      {"`cu_seqlens` with a negative entry", pack({0, -4}, 2)},
      {"a pack of more than 2^56 tokens", pack({0, (int64_t{1} << 56) + 1}, 2)},
      {"a negative length",
       [] {
         Plan::from_lengths(Lengths{4, -1}, 2);
       }},
      {"lengths that add up to more than 2^56",
       [] {
         Plan::from_lengths(Lengths{int64_t{1} << 56, 1}, 2);
       }},
      {"no rank", pack({0, 5}, 0)},
      {"a negative number of ranks", pack({0, 5}, -3)},
      {"more than 2^20 ranks", pack({0, 5}, (int64_t{1} << 20) + 1)},
      {"a rank beyond the group", [] { (void)Plan::from_lengths(Lengths{5}, 2).local_tokens(2); }},
      {"a negative rank", [] { (void)Plan::from_lengths(Lengths{5}, 2).position_ids(-1); }},
      {"a row beyond the shard",
       [] { (void)Plan::from_lengths(Lengths{5}, 2).global_token(0, 3); }},
      {"a token beyond the pack", [] { (void)Plan::from_lengths(Lengths{5}, 2).local_row(5); }},
      {"a document beyond the pack", [] { (void)Plan::from_lengths(Lengths{5}, 2).chunk(1, 0); }},
      {"a chunk beyond 2W", [] { (void)Plan::from_lengths(Lengths{5}, 2).chunk(0, 4); }},
      {"a window of -2",
       [] {
         (void)Plan::from_lengths(Lengths{5}, 2).work_items(0, {true, -2, -1});
       }},
      {"bytes of rows without heads",
       [] { (void)Plan::from_lengths(Lengths{5}, 2).gathered_bytes(0, 0, 8, 4); }},
      {"a cost model without a rate",
       [] {
         predict(Plan::from_lengths(Lengths{5}, 2), {0, 1}, 1, 1, 8, 4);
       }},
      {"a cost model with a NaN rate",
       [] {
         predict(Plan::from_lengths(Lengths{5}, 2), {1, kNan}, 1, 1, 8, 4);
       }},
  };
}

std::vector<BadInput> bad_attention() {
  return {
      {"`q` in float64", call([](Call& c) {
         c.q = Tensor(DType::kFloat64, {12, 4, 16});
       })},
      {"`q` in int32", call([](Call& c) {
         c.q = Tensor(DType::kInt32, {12, 4, 16});
       })},
      {"`k` in another type than `q`", call([](Call& c) {
         c.k = Tensor(DType::kFloat16, {12, 2, 16});
       })},
      {"`q` with two dimensions", call([](Call& c) {
         c.q = f32({12, 64});
       })},
      {"head_dim above 256", call([](Call& c) {
         c.q = f32({12, 4, 264});
         c.k = c.v = f32({12, 2, 264});
         c.out = f32({12, 4, 264});
       })},
      {"head_dim 0", call([](Call& c) {
         c.q = c.out = f32({12, 4, 0});
         c.k = c.v = f32({12, 2, 0});
       })},
      {"another head_dim in `k`", call([](Call& c) {
         c.k = c.v = f32({12, 2, 8});
       })},
      {"heads that KV heads do not divide", call([](Call& c) {
         c.k = c.v = f32({12, 3, 16});
       })},
      {"no KV heads", call([](Call& c) {
         c.k = c.v = f32({12, 0, 16});
       })},
      {"`v` of another shape than `k`", call([](Call& c) {
         c.v = f32({12, 1, 16});
       })},
      {"rows that are not the plan's", call([](Call& c) {
         c.cu_seqlens = {0, 5, 13};
       })},
      {"`k` with fewer rows", call([](Call& c) {
         c.k = c.v = f32({11, 2, 16});
       })},
      {"a last stride that is not 1", call([](Call& c) {
         c.q = f32({12, 4, 16, 2}).select(3, 0);
       })},
      {"`q` at an odd address", call([](Call& c) { c.odd_q = true; })},
      {"rows of `out` that are one row", call([](Call& c) { c.one_row = true; })},
      {"`out` in another type", call([](Call& c) {
         c.out = Tensor(DType::kBFloat16, {12, 4, 16});
       })},
      {"`out` of another shape", call([](Call& c) {
         c.out = f32({12, 2, 16});
       })},
      {"`lse` in float64", call([](Call& c) {
         c.lse = Tensor(DType::kFloat64, {12, 4});
       })},
      {"`lse` with heads first", call([](Call& c) {
         c.lse = f32({4, 12});
       })},
      {"a NaN scale", call([](Call& c) { c.options.softmax_scale = kNan; })},
      {"an infinite scale",
       call([](Call& c) { c.options.softmax_scale = std::numeric_limits<double>::infinity(); })},
      {"a negative softcap", call([](Call& c) { c.options.softcap = -3; })},
      {"a NaN softcap", call([](Call& c) { c.options.softcap = kNan; })},
      {"window_left of -2", call([](Call& c) { c.options.mask.window_left = -2; })},
      {"window_right of -7", call([](Call& c) {
         c.options.mask = {false, -1, -7};
       })},
      {"a stage that does not divide the KV heads",
       call([](Call& c) { c.options.kv_heads_per_stage = 3; })},
      {"a negative stage", call([](Call& c) { c.options.kv_heads_per_stage = -1; })},
      {"a plan for another number of ranks",
       [] {
         const Call c;
         const Plan plan(std::span<const int64_t>(c.cu_seqlens), 2);
         forward(c.q, c.k, c.v, plan, forbidden(), {}, c.out, c.lse);
       }},
      {"`k` on another device than `q`",
       [] {
         const Call c;
         TensorView k = c.k;
         k.device = {DeviceType::kCuda, 1};
         forward(c.q, k, c.v, c.plan(), forbidden(), {}, c.out, c.lse);
       }},
      {"`q` without data",
       [] {
         const Call c;
         TensorView q = c.q;
         q.data = nullptr;
         forward(q, c.k, c.v, c.plan(), forbidden(), {}, c.out, c.lse);
       }},
      {"`dout` of another shape", call_backward([](Call& c) {
         c.dout = f32({12, 2, 16});
       })},
      {"`dq` in another type", call_backward([](Call& c) {
         c.dq = Tensor(DType::kFloat16, {12, 4, 16});
       })},
      {"`dk` with the heads of `q`", call_backward([](Call& c) {
         c.dk = f32({12, 4, 16});
       })},
      {"`dv` with fewer rows", call_backward([](Call& c) {
         c.dv = f32({11, 2, 16});
       })},
  };
}

std::vector<BadInput> bad_layout() {
  const auto plan = [] { return Plan::from_lengths(Lengths{8, 4}, 2); };
  return {
      {"shard: `x` with other rows than the pack",
       [=] {
         shard(f32({11, 2}), plan(), 0, f32({6, 2}));
       }},
      {"shard: `out` with other rows than the rank",
       [=] {
         shard(f32({12, 2}), plan(), 0, f32({7, 2}));
       }},
      {"shard: `out` with other columns",
       [=] {
         shard(f32({12, 2}), plan(), 0, f32({6, 3}));
       }},
      {"shard: `out` in another type",
       [=] {
         shard(f32({12, 2}), plan(), 0, Tensor(DType::kFloat16, {6, 2}));
       }},
      {"shard: a scalar", [=] { shard(f32({}), plan(), 0, f32({6})); }},
      {"shard: rank 2 of 2",
       [=] {
         shard(f32({12, 2}), plan(), 2, f32({6, 2}));
       }},
      {"unshard: one part for two ranks",
       [=] {
         const std::vector<TensorView> parts{f32({6, 2})};
         unshard(parts, plan(), f32({12, 2}));
       }},
      {"unshard_rank: `part` with other rows",
       [=] {
         unshard_rank(f32({5, 2}), plan(), 0, f32({12, 2}));
       }},
      {"extract: one prefix for two documents",
       [=] {
         extract(f32({12, 2}), plan(), std::vector<int64_t>{4}, f32({8, 2}));
       }},
      {"extract: a prefix of 5 of 4 chunks",
       [=] {
         extract(f32({12, 2}), plan(), std::vector<int64_t>{5, 0}, f32({8, 2}));
       }},
      {"extract: a negative prefix",
       [=] {
         extract(f32({12, 2}), plan(), std::vector<int64_t>{-1, 0}, f32({0, 2}));
       }},
      {"extract: `out` with other rows than the prefixes",
       [=] {
         extract(f32({12, 2}), plan(), std::vector<int64_t>{4, 0}, f32({9, 2}));
       }},
      {"scatter: `grad` with other rows",
       [=] {
         scatter(f32({6, 2}), plan(), 0, f32({6, 2}));
       }},
      {"slice: beyond the end",
       [] {
         (void)f32({4, 2}).slice(0, 3, 2);
       }},
      {"a type that does not exist", [] { parse_dtype("float8"); }},
      {"a twin that does not exist", [] { parse_kernels("triton"); }},
      {"a group of no ranks", [] { Communicator::threads(0); }},
  };
}

/// The sentence that a call is refused with; empty when it is not refused as it should be.
std::string sentence(const BadInput& input) {
  try {
    input.call();
  } catch (const InvalidArgument& error) {
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << input.what << " threw something else: " << error.what();
  }
  return {};
}

TEST(Trap16, MalformedInputsGetTheirSentences) {
  const std::vector<std::pair<std::string, std::vector<BadInput>>> tables{
      {"Packs and plans", bad_packs()},
      {"Attention", bad_attention()},
      {"Layout operations, types and groups", bad_layout()}};
  std::string text =
      "# Bad input to the C++ library\n\n"
      "Every call below throws `zigzag::InvalidArgument` before any work or exchange, with the\n"
      "sentence beside it. The test `Trap16.MalformedInputsGetTheirSentences` makes the calls and\n"
      "compares this page with what they said; `ZIGZAG_UPDATE_DOCS=1` writes it anew.\n";
  for (const auto& [title, inputs] : tables) {
    text += "\n## " + title + "\n\n| input | sentence |\n|---|---|\n";
    for (const BadInput& input : inputs) {
      const std::string refusal = sentence(input);
      EXPECT_NE(refusal, "") << input.what << " was not refused";
      EXPECT_EQ(refusal.find('\n'), std::string::npos) << refusal;
      text += "| " + input.what + " | " + refusal + " |\n";
    }
  }
  const std::string path = std::string(ZIGZAG_DOCS) + "/bad-inputs-cpp.md";
  const char* update = std::getenv("ZIGZAG_UPDATE_DOCS");
  if (update != nullptr && *update == '1') {
    std::ofstream(path) << text;
    return;
  }
  std::ifstream file(path);
  const std::string page{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  EXPECT_EQ(page, text) << path << " is out of date; ZIGZAG_UPDATE_DOCS=1 writes it anew";
}

TEST(Trap16, RefusedCallsWriteNothing) {
  Call c;
  c.options.softcap = -1;
  EXPECT_THROW(c.run(), InvalidArgument);
  EXPECT_THROW(c.run_backward(), InvalidArgument);
  for (const Tensor* x : {&c.out, &c.lse, &c.dq, &c.dk, &c.dv}) {
    EXPECT_EQ(count_poison(*x), x->view().num_elements());
  }
}

TEST(Trap16, TheReferenceRefusesThemToo) {
  const Call c;
  const Tensor out(DType::kFloat64, {12, 4, 16});
  const Tensor lse(DType::kFloat64, {12, 4});
  const auto run = [&](const std::vector<int64_t>& cu_seqlens, const AttentionOptions& options) {
    reference::forward(c.q, c.k, c.v, cu_seqlens, options, out, lse);
  };
  EXPECT_THROW(run({0, 13}, {}), InvalidArgument);
  EXPECT_THROW(run({0, 13, 12}, {}), InvalidArgument);
  AttentionOptions options;
  options.softmax_scale = kNan;
  EXPECT_THROW(run({0, 12}, options), InvalidArgument);
  EXPECT_THROW(reference::forward(c.q, c.k, c.v, c.cu_seqlens, {}, c.out, lse), InvalidArgument);
}

}  // namespace
}  // namespace zigzag::test
