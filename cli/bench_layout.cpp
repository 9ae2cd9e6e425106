#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

#include <fmt/format.h>

#include "bench_common.h"
#include "command.h"
#include "cpu/parallel.h"
#include "io/generate.h"
#include "progress.h"
#include "tensor_memory.h"
#include "zigzag/layout.h"
#include "zigzag/system.h"

namespace zigzag::cli {
namespace {

constexpr const char* kDefaultLengths = "40000,1000,17,20000,4519";
constexpr std::size_t kOperations = 4;
constexpr std::array<const char*, kOperations> kNames{"shard", "unshard", "extract", "scatter"};

// The tensors of all four operations. Every operation moves the whole pack once.
class LayoutBench {
 public:
  LayoutBench(const Plan& plan, const std::vector<std::int64_t>& row, DType dtype,
              std::uint64_t seed)
      : plan_(plan), prefix_(static_cast<std::size_t>(plan.num_documents()), plan.num_chunks()) {
    std::vector<std::int64_t> shape{plan.total_tokens()};
    shape.insert(shape.end(), row.begin(), row.end());
    whole_ = TensorMemory(dtype, shape);
    out_ = TensorMemory(dtype, shape);
    shards_ = TensorMemory(dtype, shape);
    io::fill_normal(seed, io::Stream::kK, 0, plan.total_tokens(), whole_.view().row_elements(),
                    dtype, whole_.view().data);
    std::int64_t begin = 0;
    for (std::int64_t r = 0; r < plan.world_size(); ++r) {
      parts_.push_back(shards_.view().slice(0, begin, plan.local_tokens(r)));
      targets_.push_back(out_.view().slice(0, begin, plan.local_tokens(r)));
      begin += plan.local_tokens(r);
      shard(whole_.view(), plan_, r, parts_.back(), options(Kernels::kReference));
    }
  }

  std::int64_t bytes() const { return whole_.bytes(); }

  void run(std::size_t operation, Kernels kernels) const {
    const OperationOptions opt = options(kernels);
    switch (operation) {
      case 0:
        for (std::size_t r = 0; r < parts_.size(); ++r) {
          shard(whole_.view(), plan_, static_cast<std::int64_t>(r), targets_[r], opt);
        }
        break;
      case 1:
        unshard(parts_, plan_, out_.view(), opt);
        break;
      case 2:
        extract(shards_.view(), plan_, prefix_, out_.view(), opt);
        break;
      default:
        for (std::size_t r = 0; r < parts_.size(); ++r) {
          scatter(whole_.view(), plan_, static_cast<std::int64_t>(r), targets_[r], opt);
        }
    }
  }

  void copy(int threads) const {
    const std::int64_t piece = (bytes() + threads - 1) / threads;
    const auto* from = static_cast<const std::byte*>(whole_.view().data);
    auto* to = static_cast<std::byte*>(out_.view().data);
    if (threads == 1) {
      std::memcpy(to, from, static_cast<std::size_t>(bytes()));
      return;
    }
    cpu::parallel_for(threads, [&](std::int64_t i) {
      const std::int64_t begin = std::min(bytes(), i * piece);
      const std::int64_t end = std::min(bytes(), begin + piece);
      std::memcpy(to + begin, from + begin, static_cast<std::size_t>(end - begin));
    });
  }

  void poison() const { std::memset(out_.view().data, 0xff, static_cast<std::size_t>(bytes())); }

  // Elements of the last result that are wrong: the inverse of the plan, element by element.
  std::int64_t wrong(std::size_t operation) const {
    const bool to_shards = operation == 0 || operation == 3;
    const TensorMemory& expected = to_shards ? shards_ : whole_;
    const std::int64_t item = item_size(whole_.view().dtype);
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < whole_.view().num_elements(); ++i) {
      count += std::memcmp(static_cast<const std::byte*>(out_.view().data) + i * item,
                           static_cast<const std::byte*>(expected.view().data) + i * item,
                           static_cast<std::size_t>(item)) != 0;
    }
    return count;
  }

 private:
  static OperationOptions options(Kernels kernels) {
    OperationOptions options;
    options.kernels = kernels;
    return options;
  }

  const Plan& plan_;
  std::vector<std::int64_t> prefix_;  // every chunk of every document
  TensorMemory whole_;
  TensorMemory shards_;  // of all ranks, end to end
  TensorMemory out_;
  std::vector<TensorView> parts_;
  std::vector<TensorView> targets_;
};

}  // namespace

int bench_layout(const BenchOptions& options) {
  const std::vector<int> threads = options.thread_counts();
  const Plan plan(options.cu_seqlens(kDefaultLengths), options.group.ranks);
  const LayoutBench bench(plan, {options.shape.kv_heads, options.shape.head_dim},
                          options.shape.type(), static_cast<std::uint64_t>(options.pack.seed));
  Progress progress(true);
  std::vector<BenchRow> rows;
  bool all_right = true;
  for (const int count : threads) {
    use_threads(count);
    std::array<Times, kOperations> fused;
    std::array<Times, kOperations> copies;
    std::array<Times, kOperations> twins;
    std::array<std::int64_t, kOperations> wrong{};
    for (std::int64_t i = -1; i < options.repeat; ++i) {
      progress.show(fmt::format("{} threads:", count),
                    static_cast<double>(i + 1) / static_cast<double>(options.repeat + 1));
      for (std::size_t op = 0; op < kOperations; ++op) {
        const double copy = timed([&] { bench.copy(count); });
        if (i < 0) bench.poison();
        const double fast = timed([&] { bench.run(op, Kernels::kFused); });
        if (i < 0) wrong[op] = bench.wrong(op);
        if (i < 0) continue;
        copies[op].add(copy);
        fused[op].add(fast);
        if (options.reference || i < 3) {
          twins[op].add(timed([&] { bench.run(op, Kernels::kReference); }));
        }
      }
    }
    const auto gigabytes = static_cast<double>(bench.bytes()) / 1e9;
    const auto row = [&](const std::string& name, const Times& times, const Times& copy,
                         const Times* twin, std::int64_t bad) {
      BenchRow line;
      line["operation"] = name;
      line["threads"] = count;
      line["ms"] = 1e3 * times.median();
      line["spread"] = times.spread();
      line["GB/s"] = times.median() > 0 ? gigabytes / times.median() : 0.0;
      line["of memcpy"] = paired_ratio(copy, times);
      line["x reference"] = nullptr;
      if (twin != nullptr) line["x reference"] = twin->median() / times.median();
      line["#wrong"] = bad;
      rows.push_back(std::move(line));
    };
    row("memcpy", copies[0], copies[0], nullptr, 0);
    for (std::size_t op = 0; op < kOperations; ++op) {
      row(kNames[op], fused[op], copies[op], &twins[op], wrong[op]);
      all_right = all_right && wrong[op] == 0;
    }
  }
  progress.clear();
  nlohmann::ordered_json head;
  head["benchmark"] = "layout";
  head["version"] = version();
  head["documents"] = plan.num_documents();
  head["tokens"] = plan.total_tokens();
  head["ranks"] = plan.world_size();
  head["kv_heads"] = options.shape.kv_heads;
  head["head_dim"] = options.shape.head_dim;
  head["dtype"] = options.shape.dtype;
  head["MB"] = static_cast<double>(bench.bytes()) / 1e6;
  head["repeat"] = options.repeat;
  print_rows(head, rows, options.json);
  return all_right ? kExitOk : kExitCheckFailed;
}

}  // namespace zigzag::cli
