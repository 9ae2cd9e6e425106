// Layout operations on a GPU: bitwise equal to the same operation on the CPU.
#include <cstring>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/runtime.h"
#include "gpu_case.h"

namespace zigzag::gpu_test {
namespace {

using std::int64_t;

const Device kGpu{DeviceType::kCuda, 0};

struct Pair {
  std::vector<std::byte> host;
  Buffer gpu;
  TensorView host_view;
  TensorView gpu_view;
};

/// A tensor whose rows stand `gap` elements apart, on both sides, with the same bytes; `shift`
/// bytes off the aligned address.
Pair make_pair(std::vector<int64_t> shape, DType dtype, int64_t gap, int64_t shift,
               std::uint64_t seed) {
  Pair pair;
  std::vector<int64_t> storage = shape;
  storage.back() += gap;
  int64_t count = 1;
  for (const int64_t extent : storage) count *= extent;
  const int64_t bytes = count * item_size(dtype) + shift;
  pair.host.resize(static_cast<std::size_t>(bytes));
  std::mt19937_64 engine(seed);
  for (std::byte& byte : pair.host) byte = static_cast<std::byte>(engine());
  pair.gpu = cuda::allocate(kGpu, bytes);
  cuda::copy(pair.gpu.memory.get(), pair.host.data(), bytes);
  const std::size_t last = shape.size() - 1;
  pair.host_view =
      TensorView::contiguous(pair.host.data() + shift, dtype, storage).slice(last, 0, shape[last]);
  pair.gpu_view = TensorView::contiguous(static_cast<char*>(pair.gpu.memory.get()) + shift, dtype,
                                         storage, kGpu)
                      .slice(last, 0, shape[last]);
  return pair;
}

void expect_equal(const Pair& pair, const char* what) {
  std::vector<std::byte> got(pair.host.size());
  cuda::copy(got.data(), pair.gpu.memory.get(), static_cast<int64_t>(got.size()));
  EXPECT_TRUE(got == pair.host) << what;
}

std::vector<int64_t> with_rows(int64_t rows, const std::vector<int64_t>& row) {
  std::vector<int64_t> shape{rows};
  shape.insert(shape.end(), row.begin(), row.end());
  return shape;
}

void check_all(const std::vector<int64_t>& lengths, int64_t world_size,
               const std::vector<int64_t>& row, DType dtype, int64_t gap, int64_t shift) {
  const Plan plan = Plan::from_lengths(lengths, world_size);
  const int64_t tokens = plan.total_tokens();
  std::uint64_t seed = 1;
  const auto pair = [&](int64_t rows) {
    return make_pair(with_rows(rows, row), dtype, gap, shift, ++seed);
  };
  const std::shared_ptr<void> stream = cuda::make_stream(kGpu);
  OperationOptions options;
  options.stream = stream.get();
  const auto wait = [&] { cuda::synchronize(kGpu, stream.get()); };

  const Pair x = pair(tokens);
  std::vector<Pair> parts;
  for (int64_t r = 0; r < world_size; ++r) {
    parts.push_back(pair(plan.local_tokens(r)));
    shard(x.host_view, plan, r, parts.back().host_view);
    shard(x.gpu_view, plan, r, parts.back().gpu_view, options);
    wait();
    expect_equal(parts.back(), "shard");
  }
  const Pair back = pair(tokens);
  std::vector<TensorView> host_parts;
  std::vector<TensorView> gpu_parts;
  for (const Pair& part : parts) {
    host_parts.push_back(part.host_view);
    gpu_parts.push_back(part.gpu_view);
  }
  unshard(host_parts, plan, back.host_view);
  unshard(gpu_parts, plan, back.gpu_view, options);
  wait();
  expect_equal(back, "unshard");

  const Pair one = pair(tokens);
  const int64_t rank = world_size - 1;
  const auto last = static_cast<std::size_t>(rank);
  unshard_rank(parts[last].host_view, plan, rank, one.host_view);
  unshard_rank(parts[last].gpu_view, plan, rank, one.gpu_view, options);
  wait();
  expect_equal(one, "unshard_rank");

  std::vector<int64_t> chunks;
  for (std::size_t d = 0; d < lengths.size(); ++d) {
    chunks.push_back(static_cast<int64_t>(d * 7 + 3) % (2 * world_size + 1));
  }
  const Pair prefix = pair(extracted_tokens(plan, chunks));
  extract(x.host_view, plan, chunks, prefix.host_view);
  extract(x.gpu_view, plan, chunks, prefix.gpu_view, options);
  wait();
  expect_equal(prefix, "extract");

  const Pair scattered = pair(plan.local_tokens(0));
  scatter(x.host_view, plan, 0, scattered.host_view);
  scatter(x.gpu_view, plan, 0, scattered.gpu_view, options);
  wait();
  expect_equal(scattered, "scatter");
}

class GpuLayout : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "no GPU";
  }
};

TEST_F(GpuLayout, TypesAndRows) {
  const std::vector<int64_t> lengths{512, 1, 0, 1024, 7, 768, 3};
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32, DType::kInt64, DType::kUInt8}) {
    for (const std::vector<int64_t>& row : {std::vector<int64_t>{8, 128}, {4, 64}, {3, 5}, {17}}) {
      for (const int64_t world_size : {1, 2, 3, 4, 8}) {
        SCOPED_TRACE(shape_text(row) + " W " + std::to_string(world_size));
        check_all(lengths, world_size, row, dtype, 0, 0);
      }
    }
  }
}

TEST_F(GpuLayout, StridedAndUnaligned) {
  const std::vector<int64_t> lengths{300, 129, 5, 64};
  for (const int64_t gap : {1, 8}) {
    for (const int64_t shift : {0, 2, 8}) {
      check_all(lengths, 3, {4, 64}, DType::kFloat16, gap, shift);
      check_all(lengths, 3, {3, 4, 5}, DType::kFloat16, gap, shift);
    }
  }
}

TEST_F(GpuLayout, ManyDocuments) {
  std::vector<int64_t> lengths;
  for (int64_t i = 0; i < 3000; ++i) lengths.push_back(i % 37);
  check_all(lengths, 4, {2, 64}, DType::kBFloat16, 0, 0);
  check_all(lengths, 80, {8}, DType::kBFloat16, 0, 0);
}

TEST_F(GpuLayout, Empty) {
  check_all({}, 2, {2, 64}, DType::kBFloat16, 0, 0);
  check_all({0, 0}, 2, {2, 64}, DType::kBFloat16, 0, 0);
  check_all({1}, 4, {2, 64}, DType::kBFloat16, 0, 0);
}

}  // namespace
}  // namespace zigzag::gpu_test
