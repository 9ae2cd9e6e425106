#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <mutex>

#include <fmt/format.h>

#include "bench_common.h"
#include "command.h"
#include "cpu/peak.h"
#include "cuda/runtime.h"
#include "half.h"
#include "pack_source.h"
#include "progress.h"
#include "run_job.h"
#include "timeline.h"
#include "zigzag/error.h"
#include "zigzag/system.h"

namespace zigzag::cli {
namespace {

constexpr const char* kDefaultLengths = "4096";
// The plain twin is timed without being asked for up to this much work (FLOPs of a forward).
constexpr double kQuickReference = 1e9;
constexpr double kBackwardOverForward = 2.5;

enum Pass : std::size_t { kForward, kBackward, kBoth, kPasses };
constexpr std::array<const char*, kPasses> kPassNames{"forward", "backward", "both"};
using PassTimes = std::array<Times, kPasses>;

// A rank's tensors, made once for all repetitions.
struct RankTensors {
  TensorMemory q, k, v, dout;
  Results results;
  std::shared_ptr<void> stream;
};

// Attention of one pack over one group.
class AttentionBench {
 public:
  AttentionBench(const PackSource& source, const Group& group, const AttentionOptions& attention)
      : group_(group),
        plan_(source.cu_seqlens(), group.size()),
        attention_(attention),
        ranks_(static_cast<std::size_t>(group.size())) {
    group_.run([&](const Communicator& communicator, Device device) {
      const int rank = communicator.rank();
      RankTensors& mine = ranks_[static_cast<std::size_t>(rank)];
      const std::vector<Run> runs = rank_runs(plan_, rank);
      mine.q = source.load(io::Stream::kQ, runs).to(device);
      mine.k = source.load(io::Stream::kK, runs).to(device);
      mine.v = source.load(io::Stream::kV, runs).to(device);
      mine.dout = source.load(io::Stream::kDOut, runs).to(device);
      mine.results = make_results(source, plan_.local_tokens(rank), true, device);
      if (device.type == DeviceType::kCuda) mine.stream = cuda::make_stream(device);
    });
  }

  const Plan& plan() const { return plan_; }

  // One forward and backward; the times are those of the slowest rank. `timeline`: takes down what
  // the GPUs do.
  std::array<double, kPasses> step(Kernels kernels, std::vector<PassTimeline>* timeline = nullptr) {
    std::array<double, kPasses> slowest{};
    std::mutex mutex;
    group_.run([&](const Communicator& communicator, Device device) {
      RankTensors& mine = ranks_[static_cast<std::size_t>(communicator.rank())];
      AttentionOptions options = attention_;
      options.kernels = kernels;
      options.stream = mine.stream.get();
      const auto finish = [&] {
        if (device.type == DeviceType::kCuda) cuda::synchronize(device, options.stream);
      };
      // Between barriers: all ranks are inside the pass while one of them switches.
      const auto switch_timeline = [&](const char* pass) {
        if (timeline == nullptr) return;
        communicator.barrier();
        if (communicator.rank() == 0) {
          if (!timeline->empty()) timeline->back().spans = cuda::stop_timeline();
          if (pass != nullptr) {
            timeline->push_back({pass, {}});
            cuda::start_timeline();
          }
        }
      };
      const Results& r = mine.results;
      if (device.type == DeviceType::kCuda) {
        // The group is new: its memory and the packs' tables are made in a step that is not timed.
        forward(mine.q.view(), mine.k.view(), mine.v.view(), plan_, communicator, options,
                r[kOut].view(), r[kLse].view());
        backward(mine.dout.view(), mine.q.view(), mine.k.view(), mine.v.view(), r[kOut].view(),
                 r[kLse].view(), plan_, communicator, options, r[kDQ].view(), r[kDK].view(),
                 r[kDV].view());
        finish();
      }
      switch_timeline(kPassNames[kForward]);
      communicator.barrier();
      const double first = timed([&] {
        forward(mine.q.view(), mine.k.view(), mine.v.view(), plan_, communicator, options,
                r[kOut].view(), r[kLse].view());
        finish();
      });
      switch_timeline(kPassNames[kBackward]);
      communicator.barrier();
      const double second = timed([&] {
        backward(mine.dout.view(), mine.q.view(), mine.k.view(), mine.v.view(), r[kOut].view(),
                 r[kLse].view(), plan_, communicator, options, r[kDQ].view(), r[kDK].view(),
                 r[kDV].view());
        finish();
      });
      switch_timeline(nullptr);
      const std::lock_guard<std::mutex> lock(mutex);
      slowest[kForward] = std::max(slowest[kForward], first);
      slowest[kBackward] = std::max(slowest[kBackward], second);
    });
    slowest[kBoth] = slowest[kForward] + slowest[kBackward];
    return slowest;
  }

  // The rows of a result of every rank in global order, on the host.
  TensorMemory whole(std::size_t index) const {
    const TensorView& first = ranks_.front().results[index].view();
    std::vector<std::int64_t> shape = first.shape;
    shape[0] = plan_.total_tokens();
    TensorMemory all(first.dtype, shape);
    for (std::size_t r = 0; r < ranks_.size(); ++r) {
      const TensorMemory part = ranks_[r].results[index].to({});
      for (const Run& run : rank_runs(plan_, static_cast<std::int64_t>(r))) {
        std::memcpy(all.row(run.token), part.row(run.row),
                    static_cast<std::size_t>(run.rows * part.row_bytes()));
      }
    }
    return all;
  }

 private:
  const Group& group_;
  Plan plan_;
  AttentionOptions attention_;
  std::vector<RankTensors> ranks_;
};

float value_at(const TensorView& tensor, std::int64_t i) {
  switch (tensor.dtype) {
    case DType::kFloat16:
      return from_float16(tensor.as<const std::uint16_t>()[i]);
    case DType::kBFloat16:
      return from_bfloat16(tensor.as<const std::uint16_t>()[i]);
    default:
      return tensor.as<const float>()[i];
  }
}

// Elements that differ by more than `tolerance` x the largest magnitude, NaN included.
std::int64_t count_wrong(const TensorMemory& actual, const TensorMemory& expected,
                         double tolerance) {
  const std::int64_t count = actual.view().num_elements();
  double largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double value = std::abs(value_at(expected.view(), i));
    if (std::isfinite(value)) largest = std::max(largest, value);
  }
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const float a = value_at(actual.view(), i);
    const float e = value_at(expected.view(), i);
    if (a == e) continue;
    if (!(std::abs(a - e) <= tolerance * largest)) ++wrong;
  }
  return wrong;
}

// How far two correct results may be apart: rounding of the type, and of sums in another order.
double tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return 4e-3;
    case DType::kBFloat16:
      return 3e-2;
    default:
      return 2e-5;
  }
}

struct Measured {
  PassTimes over_ranks;
  PassTimes one_rank;
  PassTimes twin;
  Times peak;                          // GFLOP/s
  std::vector<PassTimeline> timeline;  // on GPUs
  std::int64_t wrong = 0;
};

void record(PassTimes& times, const std::array<double, kPasses>& step) {
  for (std::size_t p = 0; p < kPasses; ++p) times[p].add(step[p]);
}

Measured measure(AttentionBench& bench, AttentionBench* single, int threads, bool with_twin,
                 std::int64_t repeat, DType dtype, bool on_cpu, Progress& progress) {
  Measured m;
  const double tolerance = tolerance_of(dtype);
  std::array<TensorMemory, kResults> fused;
  bench.step(Kernels::kFused);
  if (single != nullptr) {
    single->step(Kernels::kFused);
    for (std::size_t i = 0; i < kResults; ++i) {
      // Every row's keys are visited in the same order whatever the number of ranks.
      const bool same_bits = on_cpu && i != kDK && i != kDV;
      m.wrong += count_wrong(bench.whole(i), single->whole(i), same_bits ? 0 : tolerance);
    }
  }
  if (with_twin) {
    for (std::size_t i = 0; i < kResults; ++i) fused[i] = bench.whole(i);
    record(m.twin, bench.step(Kernels::kReference));
    for (std::size_t i = 0; i < kResults; ++i) {
      m.wrong += count_wrong(fused[i], bench.whole(i), tolerance);
    }
  }
  for (std::int64_t i = 0; i < repeat; ++i) {
    progress.show(fmt::format("{} threads:", threads),
                  static_cast<double>(i) / static_cast<double>(repeat));
    if (on_cpu) m.peak.add(cpu::fma_peak_gflops(threads));
    record(m.over_ranks, bench.step(Kernels::kFused));
    if (single != nullptr) record(m.one_rank, single->step(Kernels::kFused));
  }
  if (!on_cpu) bench.step(Kernels::kFused, &m.timeline);
  return m;
}

void add_rows(std::vector<BenchRow>& rows, const Measured& m, int threads, double forward_flops) {
  for (std::size_t p = 0; p < kPasses; ++p) {
    const double factor = p == kForward    ? 1
                          : p == kBackward ? kBackwardOverForward
                                           : 1 + kBackwardOverForward;
    const double gflops = factor * forward_flops / 1e9;
    const Times& times = m.over_ranks[p];
    const double rate = times.median() > 0 ? gflops / times.median() : 0;
    BenchRow row;
    row["pass"] = kPassNames[p];
    row["threads"] = threads;
    row["ms"] = 1e3 * times.median();
    row["spread"] = times.spread();
    row["TFLOP/s"] = rate / 1e3;
    row["of FMA peak"] = nullptr;
    if (!m.peak.empty()) {
      Times shares;
      for (std::size_t i = 0; i < m.peak.all().size(); ++i) {
        shares.add(gflops / times.all()[i] / m.peak.all()[i]);
      }
      row["of FMA peak"] = shares.median();
    }
    row["one rank ms"] = nullptr;
    row["of one rank"] = nullptr;
    if (!m.one_rank[p].empty()) {
      row["one rank ms"] = 1e3 * m.one_rank[p].median();
      row["of one rank"] = paired_ratio(m.one_rank[p], times);
    }
    row["x reference"] = nullptr;
    if (!m.twin[p].empty()) row["x reference"] = m.twin[p].median() / times.median();
    if (p < m.timeline.size()) row["exposed ms"] = exposed_ms(m.timeline[p].spans);
    if (p == kBoth && !m.timeline.empty()) row["exposed ms"] = nullptr;
    row["#wrong"] = m.wrong;
    rows.push_back(std::move(row));
  }
}

}  // namespace

int bench_attention(const BenchOptions& options) {
  BenchOptions chosen = options;
  if (chosen.pack.lengths.empty() && chosen.pack.lengths_file.empty() &&
      chosen.pack.documents.empty()) {
    chosen.pack.lengths = kDefaultLengths;
  }
  AttentionOptions attention;
  chosen.mask.apply(attention);
  const std::unique_ptr<PackSource> source = open_source(chosen.pack, chosen.shape);
  const std::vector<int> threads = chosen.thread_counts();
  const Group group(chosen.group);
  GroupOptions one = chosen.group;
  one.ranks = 1;
  const Group single_group(one);
  const bool on_cpu = group.device() == "cpu";
  if (on_cpu && !chosen.timeline.empty()) {
    throw InvalidArgument("--timeline shows what GPUs do; it needs --device cuda");
  }

  Progress progress(true);
  progress.show("drawing q, k, v");
  AttentionBench bench(*source, group, attention);
  std::unique_ptr<AttentionBench> single;
  if (group.size() > 1) {
    single = std::make_unique<AttentionBench>(*source, single_group, attention);
  }
  double forward_flops = 0;
  const io::ModelShape& shape = source->shape();
  for (std::int64_t r = 0; r < group.size(); ++r) {
    forward_flops += bench.plan().flops(r, shape.heads, shape.head_dim, attention.mask);
  }
  const bool with_twin = options.reference || forward_flops <= kQuickReference;

  std::vector<BenchRow> rows;
  std::int64_t wrong = 0;
  nlohmann::ordered_json head;
  head["benchmark"] = "attention";
  head["version"] = version();
  head["device"] = group.device();
  head["comm"] = group.comm();
  head["documents"] = bench.plan().num_documents();
  head["tokens"] = bench.plan().total_tokens();
  head["ranks"] = group.size();
  head["heads"] = shape.heads;
  head["kv_heads"] = shape.kv_heads;
  head["head_dim"] = shape.head_dim;
  head["dtype"] = dtype_name(source->dtype());
  head["forward_gflop"] = forward_flops / 1e9;
  head["balance"] = bench.plan().balance(attention.mask);
  head["repeat"] = options.repeat;
  for (const int count : threads) {
    if (on_cpu) use_threads(count);
    const Measured m = measure(bench, single.get(), count, with_twin, options.repeat,
                               source->dtype(), on_cpu, progress);
    if (on_cpu) head[fmt::format("fma_peak_gflops_{}_threads", count)] = m.peak.median();
    add_rows(rows, m, count, forward_flops);
    wrong += m.wrong;
    if (!chosen.timeline.empty()) write_timeline(chosen.timeline, m.timeline);
    if (!on_cpu) break;
  }
  progress.clear();
  print_rows(head, rows, options.json);
  return wrong == 0 ? kExitOk : kExitCheckFailed;
}

}  // namespace zigzag::cli
