// The six component tests of the code that this library replaces, by their names, at 1, 2, 4 and 8
// ranks: the fast twin against the plain one and against the sequence itself, exactly.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "support/packs.h"
#include "support/random.h"
#include "support/ranks.h"
#include "support/tensor.h"
#include "zigzag/layout.h"

namespace zigzag::test {
namespace {

using std::int64_t;

constexpr std::array<int, 4> kWorldSizes{1, 2, 4, 8};
const OperationOptions kFusedTwin{Kernels::kFused, nullptr};
const OperationOptions kReferenceTwin{Kernels::kReference, nullptr};

struct Shape {
  Lengths lengths;
  int64_t heads;
  int64_t head_dim;
  DType dtype;
};

/// Largest and mean difference of two tensors.
struct Differences {
  double most = 0;
  double mean = 0;
};

Differences differences(const TensorView& a, const TensorView& b) {
  Differences result;
  // Numbers drawn here are finite, so equal bits are equal numbers.
  const auto size = static_cast<std::size_t>(a.num_elements() * item_size(a.dtype));
  if (std::memcmp(a.data, b.data, size) == 0) return result;
  for (int64_t i = 0; i < a.num_elements(); ++i) {
    const double difference = std::abs(load(a, i) - load(b, i));
    // A NaN counts as a difference.
    result.most = difference <= result.most ? result.most : difference;
    result.mean += difference / static_cast<double>(a.num_elements());
  }
  return result;
}

/// Normal numbers that every rank draws alike, by token.
Tensor draw(const Shape& shape, std::uint64_t name) {
  const Tensor x(shape.dtype, {total(shape.lengths), shape.heads, shape.head_dim});
  Stream stream(mix(base_seed(), name));
  for (int64_t i = 0; i < x.view().num_elements(); ++i) store(x, i, stream.normal());
  return x;
}

/// Rank order: what a plain all-gather of the shards leaves.
Tensor in_rank_order(const Tensor& x, const Plan& plan) {
  const Tensor gathered(x.view().dtype, x.view().shape);
  int64_t row = 0;
  for (int64_t r = 0; r < plan.world_size(); ++r) {
    for (const int64_t token : plan.token_indices(r)) {
      for (int64_t i = 0; i < x.view().row_elements(); ++i) {
        store(gathered, row * x.view().row_elements() + i,
              load(x, token * x.view().row_elements() + i));
      }
      ++row;
    }
  }
  return gathered;
}

/// Differences between the twins of one tensor, and the rows that stand at the wrong place.
struct Outcome {
  Differences twins;
  Differences truth;
  bool exact() const { return twins.most == 0 && truth.most == 0; }
};

std::mutex& printing() {
  static std::mutex mutex;
  return mutex;
}

void print_outcome(int rank, int world_size, const char* test,
                   const std::vector<std::pair<char, Outcome>>& parts) {
  if (rank != 0) return;
  const std::lock_guard lock(printing());
  fmt::print("World size {}\n[Rank {}] Test: {}\n", world_size, rank, test);
  bool passed = true;
  for (const auto& [name, outcome] : parts) {
    const std::string label = name == 0 ? "" : fmt::format("{} ", name);
    const auto first = [&](const char* text) {
      return label.empty() ? std::string(1, static_cast<char>(text[0] - 'a' + 'A')) + (text + 1)
                           : label + text;
    };
    fmt::print("  {}: {:e}\n", first("max diff"), outcome.twins.most);
    fmt::print("  {}: {:e}\n", first("mean diff"), outcome.twins.mean);
    passed = passed && outcome.exact();
  }
  fmt::print("  {}\n", passed ? "✓ PASSED" : "✗ FAILED");
}

/// K and V of the prefix chunks 0..last_chunk of each document, by both twins.
void test_extract(const char* name, const Shape& shape, bool late) {
  const Tensor k = draw(shape, 1);
  const Tensor v = draw(shape, 2);
  for (const int world_size : kWorldSizes) {
    const Plan plan = Plan::from_lengths(shape.lengths, world_size);
    const Tensor k_gathered = in_rank_order(k, plan);
    const Tensor v_gathered = in_rank_order(v, plan);
    const std::vector<int64_t> prefixes(shape.lengths.size(), late ? 2 * world_size : world_size);
    const int64_t rows = extracted_tokens(plan, prefixes);
    run_ranks(world_size, [&](const Communicator& communicator) {
      const auto check = [&](const Tensor& gathered, const Tensor& sequence) {
        const std::vector<int64_t> out_shape{rows, shape.heads, shape.head_dim};
        const Tensor fused(shape.dtype, out_shape);
        const Tensor plain(shape.dtype, out_shape);
        extract(gathered, plan, prefixes, fused, kFusedTwin);
        extract(gathered, plan, prefixes, plain, kReferenceTwin);
        Outcome outcome{differences(fused, plain), {}};
        int64_t row = 0;
        for (int64_t d = 0; d < plan.num_documents(); ++d) {
          const int64_t count = shape.lengths[static_cast<std::size_t>(d)] / (late ? 1 : 2);
          const int64_t begin = plan.cu_seqlens()[static_cast<std::size_t>(d)];
          const auto part =
              differences(fused.slice(0, row, count), sequence.slice(0, begin, count));
          outcome.truth.most = part.most <= outcome.truth.most ? outcome.truth.most : part.most;
          row += count;
        }
        EXPECT_EQ(row, rows);
        EXPECT_EQ(fused.touched_outside(), "");
        return outcome;
      };
      const Outcome of_k = check(k_gathered, k);
      const Outcome of_v = check(v_gathered, v);
      print_outcome(communicator.rank(), world_size, name, {{'K', of_k}, {'V', of_v}});
      EXPECT_TRUE(of_k.exact()) << "rank " << communicator.rank() << " of " << world_size;
      EXPECT_TRUE(of_v.exact()) << "rank " << communicator.rank() << " of " << world_size;
    });
  }
}

void test_scatter(const char* name, const Shape& shape) {
  const Tensor grad = draw(shape, 3);
  for (const int world_size : kWorldSizes) {
    const Plan plan = Plan::from_lengths(shape.lengths, world_size);
    run_ranks(world_size, [&](const Communicator& communicator) {
      const int rank = communicator.rank();
      const std::vector<int64_t> out_shape{plan.local_tokens(rank), shape.heads, shape.head_dim};
      const Tensor fused(shape.dtype, out_shape);
      const Tensor plain(shape.dtype, out_shape);
      scatter(grad, plan, rank, fused, kFusedTwin);
      scatter(grad, plan, rank, plain, kReferenceTwin);
      Outcome outcome{differences(fused, plain), {}};
      // Chunks r and 2W-1-r of every document, each document from its own offset.
      int64_t row = 0;
      int64_t start = 0;
      for (const int64_t length : shape.lengths) {
        const int64_t chunk = length / (2 * world_size);
        for (const int64_t index : {rank, 2 * world_size - 1 - rank}) {
          const auto part =
              differences(fused.slice(0, row, chunk), grad.slice(0, start + index * chunk, chunk));
          outcome.truth.most = part.most <= outcome.truth.most ? outcome.truth.most : part.most;
          row += chunk;
        }
        start += length;
      }
      EXPECT_EQ(row, plan.local_tokens(rank));
      EXPECT_EQ(fused.touched_outside(), "");
      print_outcome(rank, world_size, name, {{0, outcome}});
      EXPECT_TRUE(outcome.exact()) << "rank " << rank << " of " << world_size;
    });
  }
}

/// Milliseconds of the fastest of `rounds` calls.
template <typename Call>
double best_ms(int rounds, const Call& call) {
  double best = 0;
  for (int round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    call();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    best = round == 0 ? took.count() : std::min(best, took.count());
  }
  return best;
}

TEST(ZigzagComponents, test_extract_zigzag_kv_slices_single_sequence) {
  test_extract("extract_zigzag_kv_slices_single_sequence", {{1024}, 8, 128, DType::kBFloat16},
               false);
}

TEST(ZigzagComponents, test_extract_zigzag_kv_slices_multiple_sequences) {
  test_extract("extract_zigzag_kv_slices_multiple_sequences",
               {{512, 1024, 768}, 4, 64, DType::kFloat16}, false);
}

TEST(ZigzagComponents, test_extract_zigzag_kv_slices_late_chunks) {
  test_extract("extract_zigzag_kv_slices_late_chunks", {{2048}, 8, 128, DType::kBFloat16}, true);
}

TEST(ZigzagComponents, test_scatter_grad_to_zigzag_single_sequence) {
  test_scatter("scatter_grad_to_zigzag_single_sequence", {{1024}, 8, 128, DType::kBFloat16});
}

TEST(ZigzagComponents, test_scatter_grad_to_zigzag_multiple_sequences) {
  test_scatter("scatter_grad_to_zigzag_multiple_sequences",
               {{512, 1024, 768}, 4, 64, DType::kFloat16});
}

TEST(ZigzagComponents, test_triton_kernel_performance) {
  const Shape shape{{8192}, 32, 128, DType::kBFloat16};
  const std::vector<int64_t> whole{8192, shape.heads, shape.head_dim};
  const Tensor gathered(shape.dtype, whole);
  fill_bits(gathered, base_seed());
  const Tensor out(shape.dtype, whole);
  for (const int world_size : kWorldSizes) {
    const Plan plan = Plan::from_lengths(shape.lengths, world_size);
    const std::vector<int64_t> prefixes{2 * world_size};
    const double fused = best_ms(5, [&] { extract(gathered, plan, prefixes, out, kFusedTwin); });
    const double plain =
        best_ms(1, [&] { extract(gathered, plan, prefixes, out, kReferenceTwin); });
    const double speedup = plain / fused;
    fmt::print("World size {}\n[Rank 0] Performance Comparison:\n", world_size);
    fmt::print("  Fused kernel: {:.3f} ms\n", fused);
    fmt::print("  Plain reference: {:.3f} ms\n", plain);
    fmt::print("  Speedup: {:.2f}x\n", speedup);
    fmt::print("  {}\n", speedup > 1 ? "✓ PASSED (fused is faster)" : "✗ FAILED (fused is slower)");
    EXPECT_GT(speedup, 1.0) << world_size << " ranks";
  }
}

}  // namespace
}  // namespace zigzag::test
