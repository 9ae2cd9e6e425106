#include "run_job.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include <fmt/format.h>

#include "cuda/runtime.h"
#include "process_memory.h"

namespace zigzag::cli {
namespace {

// Bytes that a rank gives to one step of a gather of results.
constexpr std::int64_t kGatherBytes = std::int64_t{1} << 20;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Puts rows of a rank's shard to their places in the whole pack: in memory, in the file, or both.
class Sink {
 public:
  Sink(Results* kept, io::SafetensorsWriter* writer) : kept_(kept), writer_(writer) {}

  bool wants_rows() const { return kept_ != nullptr || writer_ != nullptr; }

  void put(std::size_t index, const std::vector<Run>& runs, std::int64_t first_row,
           std::int64_t rows, std::int64_t row_bytes, const std::byte* data) const {
    auto run = std::upper_bound(runs.begin(), runs.end(), first_row,
                                [](std::int64_t row, const Run& r) { return row < r.row; });
    if (run != runs.begin()) --run;
    const std::int64_t end_row = first_row + rows;
    for (; run != runs.end() && run->row < end_row; ++run) {
      const std::int64_t begin = std::max(run->row, first_row);
      const std::int64_t end = std::min(run->row + run->rows, end_row);
      if (begin >= end) continue;
      const std::int64_t token = run->token + begin - run->row;
      const std::byte* from = data + (begin - first_row) * row_bytes;
      const auto bytes = static_cast<std::size_t>((end - begin) * row_bytes);
      if (kept_ != nullptr) std::memcpy((*kept_)[index].row(token), from, bytes);
      if (writer_ != nullptr) {
        writer_->write(index, static_cast<std::uint64_t>(token * row_bytes), {from, bytes});
      }
    }
  }

 private:
  Results* kept_;
  io::SafetensorsWriter* writer_;
};

// Sends every rank's rows to the root in bounded steps.
void gather_rows(const Communicator& communicator, const Plan& plan, std::size_t index,
                 const TensorMemory& tensor, const std::vector<std::vector<Run>>& runs_of,
                 const Sink& sink) {
  const std::int64_t row_bytes = tensor.row_bytes();
  const std::int64_t world = plan.world_size();
  std::int64_t most = 0;
  for (std::int64_t r = 0; r < world; ++r) most = std::max(most, plan.local_tokens(r));
  const std::int64_t step = std::max<std::int64_t>(1, kGatherBytes / row_bytes);
  const std::int64_t mine = plan.local_tokens(communicator.rank());
  for (std::int64_t begin = 0; begin < most; begin += step) {
    const std::int64_t piece = std::min(step, most - begin);
    std::vector<std::byte> bytes(static_cast<std::size_t>(piece * row_bytes));
    const std::int64_t have = std::clamp<std::int64_t>(mine - begin, 0, piece);
    if (have > 0) {
      std::memcpy(bytes.data(), tensor.row(begin), static_cast<std::size_t>(have * row_bytes));
    }
    const std::vector<std::byte> all = communicator.all_gather(bytes);
    if (communicator.rank() != 0) continue;
    for (std::int64_t r = 0; r < world; ++r) {
      const std::int64_t rows = std::clamp<std::int64_t>(plan.local_tokens(r) - begin, 0, piece);
      sink.put(index, runs_of[static_cast<std::size_t>(r)], begin, rows, row_bytes,
               all.data() + r * piece * row_bytes);
    }
  }
}

std::vector<io::SafetensorsSpec> output_specs(const PackSource& source, bool backward) {
  const io::ModelShape& shape = source.shape();
  const std::int64_t tokens = source.cu_seqlens().back();
  const std::vector<std::int64_t> q{tokens, shape.heads, shape.head_dim};
  const std::vector<std::int64_t> k{tokens, shape.kv_heads, shape.head_dim};
  std::vector<io::SafetensorsSpec> specs{{"out", source.dtype(), q},
                                         {"lse", DType::kFloat32, {tokens, shape.heads}}};
  if (backward) {
    specs.push_back({"dq", source.dtype(), q});
    specs.push_back({"dk", source.dtype(), k});
    specs.push_back({"dv", source.dtype(), k});
  }
  return specs;
}

}  // namespace

Results make_results(const PackSource& source, std::int64_t rows, bool backward, Device device) {
  const io::ModelShape& shape = source.shape();
  Results results;
  results[kOut] = TensorMemory(source.dtype(), {rows, shape.heads, shape.head_dim}, device);
  results[kLse] = TensorMemory(DType::kFloat32, {rows, shape.heads}, device);
  if (backward) {
    results[kDQ] = TensorMemory(source.dtype(), {rows, shape.heads, shape.head_dim}, device);
    results[kDK] = TensorMemory(source.dtype(), {rows, shape.kv_heads, shape.head_dim}, device);
    results[kDV] = TensorMemory(source.dtype(), {rows, shape.kv_heads, shape.head_dim}, device);
  }
  return results;
}

JobResult run_job(const Job& job, const Group& group, Progress& progress,
                  std::unique_ptr<io::SafetensorsWriter>& writer) {
  const Plan& plan = *job.plan;
  const PackSource& source = *job.source;
  JobResult result;
  result.times.resize(static_cast<std::size_t>(group.size()));
  const bool root = group.is_root();
  const bool deliver = job.keep_results || !job.output.empty();
  if (root && job.keep_results) {
    result.results = make_results(source, plan.total_tokens(), job.backward, {});
  }
  if (root && !job.output.empty()) {
    writer =
        std::make_unique<io::SafetensorsWriter>(job.output, output_specs(source, job.backward));
  }
  const Sink sink(root && job.keep_results ? &result.results : nullptr, writer.get());

  group.run([&](const Communicator& communicator, Device device) {
    const int rank = communicator.rank();
    const bool speaks = rank == 0;
    if (speaks) progress.show("reading or drawing q, k, v");
    const std::vector<Run> runs = rank_runs(plan, rank);
    const TensorMemory q = source.load(io::Stream::kQ, runs).to(device);
    const TensorMemory k = source.load(io::Stream::kK, runs).to(device);
    const TensorMemory v = source.load(io::Stream::kV, runs).to(device);
    Results local = make_results(source, plan.local_tokens(rank), job.backward, device);
    AttentionOptions options = job.attention;
    std::shared_ptr<void> stream;
    if (device.type == DeviceType::kCuda) {
      stream = cuda::make_stream(device);
      options.stream = stream.get();
    }
    const auto finish = [&] {
      if (device.type == DeviceType::kCuda) cuda::synchronize(device, options.stream);
    };

    RankTimes times;
    communicator.barrier();
    if (speaks) progress.show("forward");
    Clock::time_point start = Clock::now();
    forward(q.view(), k.view(), v.view(), plan, communicator, options, local[kOut].view(),
            local[kLse].view());
    finish();
    times.forward = seconds_since(start);
    if (job.backward) {
      const TensorMemory dout = source.load(io::Stream::kDOut, runs).to(device);
      communicator.barrier();
      if (speaks) progress.show("backward");
      start = Clock::now();
      backward(dout.view(), q.view(), k.view(), v.view(), local[kOut].view(), local[kLse].view(),
               plan, communicator, options, local[kDQ].view(), local[kDK].view(),
               local[kDV].view());
      finish();
      times.backward = seconds_since(start);
    }
    times.peak_bytes = peak_resident_bytes();
    const std::vector<std::byte> all = communicator.all_gather(std::as_bytes(std::span(&times, 1)));
    if (speaks) std::memcpy(result.times.data(), all.data(), all.size());

    if (!deliver) return;
    if (speaks) progress.show("collecting results");
    std::vector<std::vector<Run>> runs_of;
    if (group.is_mpi() && rank == 0) {
      for (std::int64_t r = 0; r < plan.world_size(); ++r) runs_of.push_back(rank_runs(plan, r));
    }
    for (std::size_t i = 0; i < (job.backward ? kResults : kDQ); ++i) {
      const TensorMemory tensor = local[i].to({});
      if (group.is_mpi()) {
        gather_rows(communicator, plan, i, tensor, runs_of, sink);
      } else {
        sink.put(i, runs, 0, plan.local_tokens(rank), tensor.row_bytes(), tensor.row(0));
      }
    }
    // Rank 0 may go on with a long check: nobody must wait for it after this.
    communicator.barrier();
  });
  progress.clear();
  return result;
}

}  // namespace zigzag::cli
