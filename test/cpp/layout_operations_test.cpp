// shard, unshard, unshard_rank, extract and scatter: the fast twin, the plain twin and rows moved
// one by one from the plan's answers, bit for bit.
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "support/compare.h"
#include "support/packs.h"
#include "support/random.h"
#include "support/tensor.h"
#include "zigzag/error.h"
#include "zigzag/layout.h"

namespace zigzag::test {
namespace {

using std::int64_t;

constexpr std::array<DType, 10> kTypes{
    DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64, DType::kInt64,
    DType::kInt32,   DType::kInt16,   DType::kInt8,     DType::kUInt8,   DType::kBool};
constexpr std::array<Kernels, 2> kTwins{Kernels::kFused, Kernels::kReference};

/// How a tensor [rows, 4, 6] lies in memory.
enum class Strides : std::uint8_t { kContiguous, kHeadSlice, kKvPacked, kColumnSlice, kTransposed };
constexpr std::array<Strides, 5> kStrides{Strides::kContiguous, Strides::kHeadSlice,
                                          Strides::kKvPacked, Strides::kColumnSlice,
                                          Strides::kTransposed};

Tensor make(DType dtype, int64_t rows, Strides strides) {
  switch (strides) {
    case Strides::kContiguous:
      return {dtype, {rows, 4, 6}};
    case Strides::kHeadSlice:
      return Tensor(dtype, {rows, 9, 6}).slice(1, 2, 4);
    case Strides::kKvPacked:
      return Tensor(dtype, {rows, 2, 4, 6}).select(1, 1);
    case Strides::kColumnSlice:
      return Tensor(dtype, {rows, 4, 11}).slice(2, 3, 6);
    default:
      // Heads outermost: rows are far apart and not one run of bytes.
      break;
  }
  const Tensor heads_first(dtype, {4 * rows * 6});
  return heads_first;
}

/// [4, rows, 6] in memory seen as [rows, 4, 6].
TensorView transposed(const Tensor& memory, int64_t rows) {
  TensorView view = memory.view();
  view.shape = {rows, 4, 6};
  view.strides = {6, rows * 6, 1};
  return view;
}

struct Operand {
  Operand(DType dtype, int64_t rows, Strides strides) : memory(make(dtype, rows, strides)) {
    view = strides == Strides::kTransposed ? transposed(memory, rows) : memory.view();
  }
  Tensor memory;
  TensorView view;
};

std::vector<std::byte> row_bytes(const TensorView& x, int64_t row) {
  return bytes(x.slice(0, row, 1));
}

/// Rows of `x` in the order of `rows`.
std::vector<std::byte> pick(const TensorView& x, const std::vector<int64_t>& rows) {
  std::vector<std::byte> result;
  for (const int64_t row : rows) {
    const std::vector<std::byte> one = row_bytes(x, row);
    result.insert(result.end(), one.begin(), one.end());
  }
  return result;
}

void expect_output(const char* name, const Operand& out, const std::vector<std::byte>& expected) {
  EXPECT_TRUE(same_bits(name, bytes(out.view), expected, item_size(out.view.dtype)));
  EXPECT_EQ(out.memory.touched_outside({&out.view, 1}), "") << name;
}

/// All operations on one pack with one type and memory layout.
void check_operations(const Plan& plan, DType dtype, Strides strides) {
  const int64_t world = plan.world_size();
  const int64_t tokens = plan.total_tokens();
  const Operand x(dtype, tokens, strides);
  fill_bits(x.view, base_seed());
  const std::vector<std::byte> whole = bytes(x.view);
  for (const Kernels twin : kTwins) {
    SCOPED_TRACE(kernels_name(twin));
    const OperationOptions options{twin, nullptr};
    std::vector<Operand> parts;
    std::vector<TensorView> views;
    for (int64_t r = 0; r < world; ++r) {
      parts.emplace_back(dtype, plan.local_tokens(r), strides);
      shard(x.view, plan, r, parts.back().view, options);
      const auto expected = pick(x.view, plan.token_indices(r));
      expect_output("shard", parts.back(), expected);
      views.push_back(parts.back().view);
      const Operand scattered(dtype, plan.local_tokens(r), strides);
      scatter(x.view, plan, r, scattered.view, options);
      expect_output("scatter", scattered, expected);
    }
    const Operand back(dtype, tokens, strides);
    unshard(views, plan, back.view, options);
    expect_output("unshard", back, whole);

    const Operand built(dtype, tokens, strides);
    for (int64_t r = world; r-- > 0;) {
      unshard_rank(parts[static_cast<std::size_t>(r)].view, plan, r, built.view, options);
    }
    expect_output("unshard_rank", built, whole);

    // What a plain all-gather leaves: the shards of all ranks end to end.
    const Operand gathered(dtype, tokens, strides);
    int64_t row = 0;
    for (int64_t r = 0; r < world; ++r) {
      const int64_t rows = plan.local_tokens(r);
      shard(x.view, plan, r, gathered.view.slice(0, row, rows), options);
      row += rows;
    }
    Stream stream(mix(base_seed(), static_cast<std::uint64_t>(tokens)));
    for (int round = 0; round < 3; ++round) {
      std::vector<int64_t> prefixes(static_cast<std::size_t>(plan.num_documents()));
      std::vector<int64_t> rows;
      for (std::size_t d = 0; d < prefixes.size(); ++d) {
        prefixes[d] = round == 0 ? plan.num_chunks() : stream.integer(0, plan.num_chunks());
        const auto document = static_cast<int64_t>(d);
        const int64_t end = prefixes[d] == 0 ? 0 : plan.chunk(document, prefixes[d] - 1).end;
        for (int64_t p = 0; p < end; ++p) rows.push_back(plan.cu_seqlens()[d] + p);
      }
      ASSERT_EQ(extracted_tokens(plan, prefixes), std::ssize(rows));
      const Operand prefix(dtype, std::ssize(rows), strides);
      extract(gathered.view, plan, prefixes, prefix.view, options);
      expect_output("extract", prefix, pick(x.view, rows));
    }
  }
}

TEST(LayoutOperations, EveryTypeAndMemoryLayout) {
  for (const DType dtype : kTypes) {
    for (const Strides strides : kStrides) {
      SCOPED_TRACE(dtype_name(dtype));
      SCOPED_TRACE(static_cast<int>(strides));
      check_operations(Plan::from_lengths(Lengths{17, 0, 3, 24, 1}, 3), dtype, strides);
    }
  }
}

TEST(LayoutOperations, EveryPackAndGroup) {
  for (const int64_t world : {1, 2, 3, 4, 5, 8}) {
    for (const Pack& pack : all_packs(world, base_seed(), 300)) {
      SCOPED_TRACE(pack.name);
      check_operations(Plan::from_lengths(pack.lengths, world), DType::kBFloat16,
                       Strides::kContiguous);
    }
  }
}

TEST(LayoutOperations, InputsAndOutputsOfDifferentStrides) {
  const Plan plan = Plan::from_lengths(Lengths{40, 7, 90}, 4);
  for (const Strides from : kStrides) {
    for (const Strides to : kStrides) {
      const Operand x(DType::kFloat16, plan.total_tokens(), from);
      fill_bits(x.view, 3);
      const Operand out(DType::kFloat16, plan.local_tokens(2), to);
      shard(x.view, plan, 2, out.view);
      expect_output("shard", out, pick(x.view, plan.token_indices(2)));
    }
  }
}

TEST(LayoutOperations, OneAndManyDimensions) {
  const Plan plan = Plan::from_lengths(Lengths{33, 8}, 2);
  for (const std::vector<int64_t>& row : {std::vector<int64_t>{}, {5}, {1, 1}, {2, 3, 2, 2}, {0}}) {
    std::vector<int64_t> shape{plan.total_tokens()};
    shape.insert(shape.end(), row.begin(), row.end());
    const Tensor x(DType::kInt64, shape);
    fill_bits(x, 4);
    shape[0] = plan.local_tokens(1);
    const Tensor out(DType::kInt64, shape);
    shard(x, plan, 1, out);
    EXPECT_EQ(bytes(out), pick(x, plan.token_indices(1)));
    EXPECT_EQ(out.touched_outside(), "");
  }
}

TEST(LayoutOperations, LargeTensorsThatAreCopiedInParallel) {
  // 48 MB: above every threshold for threads and streaming stores.
  const Plan plan = Plan::from_lengths(Lengths{1000, 20001, 0, 3575}, 4);
  const Tensor x(DType::kBFloat16, {plan.total_tokens(), 8, 128});
  auto* words = x.view().as<std::uint16_t>();
  for (int64_t i = 0; i < x.view().num_elements(); ++i) {
    words[i] = static_cast<std::uint16_t>(mix(9, static_cast<std::uint64_t>(i)));
  }
  const auto row_size = static_cast<std::size_t>(x.view().row_elements() * 2);
  std::vector<Tensor> parts;
  std::vector<TensorView> views;
  for (int64_t r = 0; r < 4; ++r) {
    parts.emplace_back(DType::kBFloat16, std::vector<int64_t>{plan.local_tokens(r), 8, 128});
    shard(x, plan, r, parts.back());
    views.push_back(parts.back());
    const std::vector<int64_t> tokens = plan.token_indices(r);
    for (std::size_t row = 0; row < tokens.size(); ++row) {
      ASSERT_EQ(
          std::memcmp(parts.back().view().as<std::byte>() + row * row_size,
                      x.view().as<std::byte>() + static_cast<std::size_t>(tokens[row]) * row_size,
                      row_size),
          0)
          << "row " << row;
    }
  }
  const Tensor back(DType::kBFloat16, x.view().shape);
  unshard(views, plan, back);
  EXPECT_EQ(std::memcmp(back.view().data, x.view().data,
                        row_size * static_cast<std::size_t>(plan.total_tokens())),
            0);
}

TEST(LayoutOperations, ManyThreadsAtOnce) {
  const Plan plan = Plan::from_lengths(Lengths{400, 77, 3000}, 8);
  const Tensor x(DType::kFloat32, {plan.total_tokens(), 2, 16});
  fill_bits(x, 8);
  const Tensor built(DType::kFloat32, x.view().shape);
  std::vector<std::thread> threads;
  for (int64_t r = 0; r < 8; ++r) {
    threads.emplace_back([&, r] {
      for (int round = 0; round < 20; ++round) {
        const Tensor part(DType::kFloat32, {plan.local_tokens(r), 2, 16});
        shard(x, plan, r, part);
        unshard_rank(part, plan, r, built);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(bytes(built), bytes(x));
}

TEST(LayoutOperations, TheDefaultTwinCanBeChosenForTheProcess) {
  EXPECT_EQ(default_kernels(), Kernels::kFused);
  set_default_kernels(Kernels::kReference);
  EXPECT_EQ(default_kernels(), Kernels::kReference);
  set_default_kernels(std::nullopt);
  EXPECT_EQ(default_kernels(), Kernels::kFused);
  EXPECT_EQ(parse_kernels("reference"), Kernels::kReference);
  EXPECT_THROW(parse_kernels("slow"), InvalidArgument);
}

}  // namespace
}  // namespace zigzag::test
