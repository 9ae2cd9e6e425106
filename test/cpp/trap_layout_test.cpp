// Traps of packed documents and of their layout: offsets, short documents, huge offsets, positions.
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include <gtest/gtest.h>
#include <sys/mman.h>

#include "support/attention_case.h"
#include "support/compare.h"
#include "support/packs.h"
#include "support/plan_check.h"
#include "support/random.h"
#include "support/ranks.h"
#include "support/tensor.h"
#include "zigzag/error.h"
#include "zigzag/layout.h"

namespace zigzag::test {
namespace {

using std::int64_t;

/// [tokens, 1] int64 that holds each row's own number.
Tensor numbered(int64_t tokens) {
  Tensor x(DType::kInt64, {tokens, 1});
  for (int64_t i = 0; i < tokens; ++i) store(x, i, static_cast<double>(i));
  return x;
}

std::vector<int64_t> rows_of(const TensorView& x) {
  std::vector<int64_t> result;
  for (const double value : values(x)) result.push_back(static_cast<int64_t>(value));
  return result;
}

TEST(Trap01, ADocumentStartsAtItsLocalOffset) {
  // Two documents over two ranks. The second starts at row 4 of each rank, not at row 8.
  const Plan plan = Plan::from_lengths(Lengths{8, 16}, 2);
  EXPECT_EQ(plan.chunk(1, 0).local_row, 4);
  EXPECT_EQ(plan.chunk(1, 3).local_row, 8);
  const std::vector<int64_t> gathered_tokens{0, 1, 6, 7, 8,  9,  10, 11, 20, 21, 22, 23,
                                             2, 3, 4, 5, 12, 13, 14, 15, 16, 17, 18, 19};
  const Tensor gathered(DType::kInt64, {24, 1});
  for (int64_t i = 0; i < 24; ++i) {
    store(gathered, i, static_cast<double>(gathered_tokens[static_cast<std::size_t>(i)]));
  }
  for (const Kernels twin : {Kernels::kFused, Kernels::kReference}) {
    const OperationOptions options{twin, nullptr};
    // The prefix of two chunks of each document: tokens 0-3 and 8-15.
    const std::vector<int64_t> prefixes{2, 2};
    const Tensor prefix(DType::kInt64, {12, 1});
    extract(gathered, plan, prefixes, prefix, options);
    EXPECT_EQ(rows_of(prefix), (std::vector<int64_t>{0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15}));
    // The scatter writes every document, not the first alone.
    const Tensor mine(DType::kInt64, {12, 1});
    scatter(numbered(24), plan, 1, mine, options);
    EXPECT_EQ(rows_of(mine), (std::vector<int64_t>{2, 3, 4, 5, 12, 13, 14, 15, 16, 17, 18, 19}));
  }
}

TEST(Trap01, AttentionOfLaterDocumentsReadsTheirOwnRows) {
  AttentionCase problem;
  problem.lengths = {8, 16, 40, 8};
  problem.head_dim = 8;
  problem.seed = base_seed();
  const ReferenceResult reference = run_reference(problem);
  const AttentionResult one = run_case(problem, 1);
  for (const int world : {2, 4}) {
    expect_exact_attention(problem, run_case(problem, world), reference, one);
  }
}

TEST(Trap05, CuSeqlensAreThoseOfTheWholePack) {
  // A plan of LOCAL lengths does not fit tensors of a rank, and is refused rather than guessed.
  const Plan global = Plan::from_lengths(Lengths{8, 16}, 2);
  const std::vector<int64_t> local = global.local_cu_seqlens(0);
  const Plan wrong(std::span<const int64_t>(local), 2);
  const Tensor q(DType::kFloat32, {global.local_tokens(0), 2, 8});
  const Tensor lse(DType::kFloat32, {global.local_tokens(0), 2});
  const auto errors = collect_ranks(2, [&](const Communicator& communicator) {
    forward(q, q, q, wrong, communicator, {}, Tensor(DType::kFloat32, q.view().shape), lse);
  });
  for (const std::string& error : errors) {
    EXPECT_NE(error.find("cu_seqlens are those of the whole pack"), std::string::npos) << error;
  }
  EXPECT_THROW(shard(q, wrong, 0, q), InvalidArgument);
  EXPECT_THROW(scatter(q, global, 0, q), InvalidArgument);
}

TEST(Trap09, DocumentsShorterThanTheirChunks) {
  for (const int world : {2, 3, 4, 5, 8}) {
    for (const Lengths& lengths : std::vector<Lengths>{
             {0}, {}, {1}, {0, 0, 1, 0}, {1, 1, 1}, {2 * world - 1}, {3, 1, 2, 0, 2, 1, 1}}) {
      const Plan plan = Plan::from_lengths(lengths, world);
      EXPECT_EQ(check_layout(plan, lengths), "");
      for (const Mask& mask : all_masks()) EXPECT_EQ(check_work(plan, lengths, mask), "");
      EXPECT_EQ(check_pieces(plan, lengths), "");
      AttentionCase problem;
      problem.lengths = lengths;
      problem.head_dim = 16;
      problem.seed = base_seed();
      SCOPED_TRACE(problem.text());
      const AttentionResult one = run_case(problem, 1);
      const AttentionResult result = run_case(problem, world);
      expect_exact_attention(problem, result, run_reference(problem), one);
      expect_same_bits(result, one, false);
    }
  }
}

/// Address space of which only touched pages take memory.
class SparseMemory {
 public:
  explicit SparseMemory(int64_t bytes)
      : bytes_(static_cast<std::size_t>(bytes)),
        data_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~SparseMemory() {
    if (valid()) munmap(data_, bytes_);
  }
  SparseMemory(const SparseMemory&) = delete;
  SparseMemory& operator=(const SparseMemory&) = delete;
  bool valid() const { return data_ != MAP_FAILED; }
  void* data() const { return data_; }

 private:
  std::size_t bytes_;
  void* data_;
};

/// Rows 2^27 elements apart: offsets pass 2^31 elements at row 16 and 2^32 at row 32.
TensorView far_apart(const SparseMemory& memory, DType dtype, int64_t rows, int64_t heads,
                     int64_t head_dim) {
  return {memory.data(), dtype, {}, {rows, heads, head_dim}, {int64_t{1} << 27, head_dim, 1}};
}

/// Empty when both hold the same bytes.
std::string unlike(const TensorView& a, const TensorView& b) {
  const auto result = same_bits("rows", bytes(a), bytes(b), item_size(a.dtype));
  return result ? std::string() : result.message();
}

TEST(Trap10, ElementOffsetsBeyond32Bits) {
  constexpr int64_t kRows = 40;
  constexpr int64_t kHeads = 2;
  constexpr int64_t kDim = 16;
  const int64_t bytes = (int64_t{1} << 27) * kRows * 2;
  const SparseMemory far_q(bytes);
  const SparseMemory far_out(bytes);
  if (!far_q.valid() || !far_out.valid()) GTEST_SKIP() << "no address space for 20 GB of holes";
  const Plan plan = Plan::from_lengths(Lengths{25, 15}, 1);
  const Tensor near(DType::kBFloat16, {kRows, kHeads, kDim});
  Stream stream(base_seed());
  for (int64_t i = 0; i < near.view().num_elements(); ++i) store(near, i, stream.normal());

  // Layout: strided from and to.
  const TensorView q = far_apart(far_q, DType::kBFloat16, kRows, kHeads, kDim);
  const TensorView out = far_apart(far_out, DType::kBFloat16, kRows, kHeads, kDim);
  for (const Kernels twin : {Kernels::kFused, Kernels::kReference}) {
    shard(near, plan, 0, q, {twin, nullptr});
    EXPECT_EQ(unlike(q, near), "");
    shard(q, plan, 0, out, {twin, nullptr});
    EXPECT_EQ(unlike(out, near), "");
  }

  // Attention: the same bits as from dense tensors.
  const Tensor expected(DType::kBFloat16, {kRows, kHeads, kDim});
  const Tensor lse(DType::kFloat32, {kRows, kHeads});
  forward(near, near, near, plan, Communicator::self(), {}, expected, lse);
  forward(q, q, q, plan, Communicator::self(), {}, out, lse);
  EXPECT_EQ(unlike(out, expected), "");
  const Tensor dq(DType::kBFloat16, {kRows, kHeads, kDim});
  const Tensor dk(DType::kBFloat16, {kRows, kHeads, kDim});
  const Tensor dv(DType::kBFloat16, {kRows, kHeads, kDim});
  backward(near, near, near, near, expected, lse, plan, Communicator::self(), {}, dq, dk, dv);
  const Tensor other_dk(DType::kBFloat16, {kRows, kHeads, kDim});
  const Tensor other_dv(DType::kBFloat16, {kRows, kHeads, kDim});
  backward(q, q, q, q, out, lse, plan, Communicator::self(), {}, out, other_dk, other_dv);
  EXPECT_EQ(unlike(out, dq), "");
  EXPECT_EQ(unlike(other_dk, dk), "");
  EXPECT_EQ(unlike(other_dv, dv), "");
}

TEST(Trap12, PositionsRestartAtEachDocumentAndJumpAtTheLateChunk) {
  const Plan plan = Plan::from_lengths(Lengths{8, 12}, 2);
  EXPECT_EQ(plan.position_ids(0), (std::vector<int64_t>{0, 1, 6, 7, 0, 1, 2, 9, 10, 11}));
  EXPECT_EQ(plan.position_ids(1), (std::vector<int64_t>{2, 3, 4, 5, 3, 4, 5, 6, 7, 8}));
}

TEST(Trap12, LabelsAreShiftedBeforeSharding) {
  const Lengths lengths{13, 1, 0, 22};
  const int64_t tokens = total(lengths);
  const Tensor ids = numbered(tokens);
  constexpr int64_t kIgnored = -100;
  // The next token of the same document; the last token of a document has none.
  const Tensor labels(DType::kInt64, {tokens, 1});
  int64_t row = 0;
  for (const int64_t length : lengths) {
    for (int64_t i = 0; i < length; ++i, ++row) {
      store(labels, row, static_cast<double>(i + 1 < length ? row + 1 : kIgnored));
    }
  }
  const Plan plan = Plan::from_lengths(lengths, 4);
  bool wrong_after_sharding = false;
  int64_t counted = 0;
  for (int64_t r = 0; r < 4; ++r) {
    const Tensor my_ids(DType::kInt64, {plan.local_tokens(r), 1});
    const Tensor my_labels(DType::kInt64, {plan.local_tokens(r), 1});
    shard(ids, plan, r, my_ids);
    shard(labels, plan, r, my_labels);
    const auto id = rows_of(my_ids);
    const auto label = rows_of(my_labels);
    for (std::size_t i = 0; i < id.size(); ++i) {
      const bool last = plan.local_row(id[i]).rank == r && label[i] == kIgnored;
      EXPECT_TRUE(last || label[i] == id[i] + 1);
      counted += label[i] != kIgnored;
      // Shifting the shard instead pairs the end of the early chunk with the start of the late one.
      if (i + 1 < id.size() && label[i] != kIgnored) {
        wrong_after_sharding = wrong_after_sharding || id[i + 1] != label[i];
      }
    }
  }
  EXPECT_EQ(counted, 12 + 21);
  EXPECT_TRUE(wrong_after_sharding);
}

}  // namespace
}  // namespace zigzag::test
