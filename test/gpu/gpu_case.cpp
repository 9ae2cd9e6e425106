#include "gpu_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include "cuda/runtime.h"
#include "half.h"

namespace zigzag::gpu_test {
namespace {

using std::int64_t;

constexpr int64_t kFence = 1 << 18;  // bytes of NaN on either side of a tensor
constexpr auto kPoison = std::byte{0xff};

/// A tensor on a GPU with NaN around it.
class Fenced {
 public:
  Fenced(std::vector<int64_t> shape, DType dtype, Device device)
      : bytes_(count(shape) * item_size(dtype)),
        buffer_(cuda::allocate(device, bytes_ + 2 * kFence)) {
    view_ = TensorView::contiguous(static_cast<char*>(buffer_.memory.get()) + kFence, dtype,
                                   std::move(shape), device);
    const std::vector<std::byte> poison(static_cast<std::size_t>(bytes_ + 2 * kFence), kPoison);
    cuda::copy(buffer_.memory.get(), poison.data(), bytes_ + 2 * kFence);
  }
  void fill(const std::vector<std::byte>& values) { cuda::copy(view_.data, values.data(), bytes_); }
  const TensorView& view() const { return view_; }
  std::vector<std::byte> read() const {
    std::vector<std::byte> values(static_cast<std::size_t>(bytes_));
    cuda::copy(values.data(), view_.data, bytes_);
    return values;
  }
  bool fences_held() const {
    std::vector<std::byte> all(static_cast<std::size_t>(bytes_ + 2 * kFence));
    cuda::copy(all.data(), buffer_.memory.get(), bytes_ + 2 * kFence);
    const auto poisoned = [](std::byte byte) { return byte == kPoison; };
    return std::all_of(all.begin(), all.begin() + kFence, poisoned) &&
           std::all_of(all.end() - kFence, all.end(), poisoned);
  }

 private:
  static int64_t count(const std::vector<int64_t>& shape) {
    int64_t n = 1;
    for (const int64_t extent : shape) n *= extent;
    return n;
  }
  int64_t bytes_;
  Buffer buffer_;
  TensorView view_;
};

AttentionOptions options_of(const Problem& problem) {
  AttentionOptions options;
  options.mask = problem.mask;
  options.softcap = problem.softcap;
  return options;
}

struct Inputs {
  std::vector<std::byte> q, k, v, dout;
};

Inputs inputs_of(const Problem& problem, int64_t tokens) {
  const int64_t q = tokens * problem.heads * problem.head_dim;
  const int64_t k = tokens * problem.kv_heads * problem.head_dim;
  return {random_bytes(q, problem.dtype, problem.seed * 4 + 0),
          random_bytes(k, problem.dtype, problem.seed * 4 + 1),
          random_bytes(k, problem.dtype, problem.seed * 4 + 2),
          random_bytes(q, problem.dtype, problem.seed * 4 + 3)};
}

/// Puts a rank's rows of a result in their places in the whole pack.
void collect(const Fenced& part, const Plan& plan, int64_t rank, std::vector<double>& whole) {
  const std::vector<std::byte> bytes = part.read();
  const int64_t row = part.view().row_elements();
  const std::vector<double> values =
      to_doubles(bytes.data(), part.view().num_elements(), part.view().dtype);
  const std::vector<int64_t> tokens = plan.token_indices(rank);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    std::copy_n(values.begin() + static_cast<std::ptrdiff_t>(i) * row, row,
                whole.begin() + tokens[i] * row);
  }
}

}  // namespace

std::vector<std::byte> random_bytes(int64_t count, DType dtype, std::uint64_t seed) {
  std::mt19937_64 engine(seed * 0x9e3779b97f4a7c15u + 12345);
  std::vector<std::byte> bytes(static_cast<std::size_t>(count * item_size(dtype)));
  // The sum of four uniform numbers is normal enough and ten times faster than the library's.
  for (int64_t i = 0; i < count; ++i) {
    const std::uint64_t bits = engine();
    float x = -2.0f * 65535.0f;
    for (int part = 0; part < 4; ++part) x += static_cast<float>((bits >> (16 * part)) & 0xffffu);
    x *= 1.7f / 65535.0f;
    if (dtype == DType::kFloat32) {
      std::memcpy(bytes.data() + i * 4, &x, 4);
    } else {
      const std::uint16_t half = dtype == DType::kBFloat16 ? to_bfloat16(x) : to_float16(x);
      std::memcpy(bytes.data() + i * 2, &half, 2);
    }
  }
  return bytes;
}

std::vector<double> to_doubles(const std::byte* bytes, int64_t count, DType dtype) {
  std::vector<double> values(static_cast<std::size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    double& value = values[static_cast<std::size_t>(i)];
    if (dtype == DType::kFloat32) {
      float x = 0;
      std::memcpy(&x, bytes + i * 4, 4);
      value = x;
    } else {
      std::uint16_t half = 0;
      std::memcpy(&half, bytes + i * 2, 2);
      value = dtype == DType::kBFloat16 ? from_bfloat16(half) : from_float16(half);
    }
  }
  return values;
}

std::string describe(const Problem& problem) {
  std::string text = "[";
  for (std::size_t i = 0; i < problem.lengths.size() && i < 6; ++i) {
    text += (i == 0 ? "" : ",") + std::to_string(problem.lengths[i]);
  }
  if (problem.lengths.size() > 6) {
    text += ",... " + std::to_string(problem.lengths.size()) + " documents";
  }
  text += "] " + std::to_string(problem.heads) + "/" + std::to_string(problem.kv_heads) +
          " heads x " + std::to_string(problem.head_dim) + " " +
          std::string(dtype_name(problem.dtype)) + (problem.mask.causal ? " causal" : " full");
  if (problem.mask.window_left >= 0) text += " left " + std::to_string(problem.mask.window_left);
  if (problem.mask.window_right >= 0) text += " right " + std::to_string(problem.mask.window_right);
  if (problem.softcap != 0) text += " softcap " + std::to_string(problem.softcap);
  return text;
}

std::vector<std::byte> shard_bytes(const std::vector<std::byte>& x, DType dtype,
                                   const std::vector<int64_t>& shape, const Plan& plan,
                                   int64_t rank) {
  std::vector<int64_t> part_shape = shape;
  part_shape[0] = plan.local_tokens(rank);
  int64_t elements = 1;
  for (const int64_t extent : part_shape) elements *= extent;
  std::vector<std::byte> part(static_cast<std::size_t>(elements * item_size(dtype)));
  OperationOptions options;
  options.kernels = Kernels::kReference;
  shard(TensorView::contiguous(const_cast<std::byte*>(x.data()), dtype, shape), plan, rank,
        TensorView::contiguous(part.data(), dtype, part_shape), options);
  return part;
}

void on_ranks(int64_t world_size, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(world_size));
  for (int r = 0; r < world_size; ++r) {
    threads.emplace_back([&, r] {
      try {
        body(r);
      } catch (...) {
        failures[static_cast<std::size_t>(r)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

std::shared_ptr<const Results> reference_of(const Problem& problem) {
  static std::mutex mutex;
  static std::map<std::string, std::shared_ptr<const Results>> kept;
  std::string key = describe(problem) + "/" + std::to_string(problem.seed);
  for (const int64_t length : problem.lengths) key += "," + std::to_string(length);
  const std::lock_guard lock(mutex);
  auto& entry = kept[key];
  if (entry != nullptr) return entry;

  const Plan plan = Plan::from_lengths(problem.lengths, 1);
  const int64_t tokens = plan.total_tokens();
  const Inputs inputs = inputs_of(problem, tokens);
  const std::vector<int64_t> q_shape{tokens, problem.heads, problem.head_dim};
  const std::vector<int64_t> k_shape{tokens, problem.kv_heads, problem.head_dim};
  const auto input = [&](const std::vector<std::byte>& bytes, const std::vector<int64_t>& shape) {
    return TensorView::contiguous(const_cast<std::byte*>(bytes.data()), problem.dtype, shape);
  };
  const auto output = [](std::vector<double>& values, const std::vector<int64_t>& shape) {
    int64_t count = 1;
    for (const int64_t extent : shape) count *= extent;
    values.assign(static_cast<std::size_t>(count), 0.0);
    return TensorView::contiguous(values.data(), DType::kFloat64, shape);
  };
  auto results = std::make_shared<Results>();
  const AttentionOptions options = options_of(problem);
  reference::forward(input(inputs.q, q_shape), input(inputs.k, k_shape), input(inputs.v, k_shape),
                     plan.cu_seqlens(), options, output(results->out, q_shape),
                     output(results->lse, {tokens, problem.heads}));
  reference::backward(input(inputs.dout, q_shape), input(inputs.q, q_shape),
                      input(inputs.k, k_shape), input(inputs.v, k_shape), plan.cu_seqlens(),
                      options, output(results->dq, q_shape), output(results->dk, k_shape),
                      output(results->dv, k_shape));
  entry = results;
  return entry;
}

Results run_on_gpus(const Problem& problem, const RunOptions& run, bool& fences_held) {
  const Plan plan = Plan::from_lengths(problem.lengths, run.world_size);
  const int64_t tokens = plan.total_tokens();
  const Inputs inputs = inputs_of(problem, tokens);
  const int64_t q_row = problem.heads * problem.head_dim;
  const int64_t k_row = problem.kv_heads * problem.head_dim;
  Results results;
  const auto size = [](int64_t count) { return static_cast<std::size_t>(count); };
  results.out.resize(size(tokens * q_row));
  results.lse.resize(size(tokens * problem.heads));
  results.dq.resize(size(tokens * q_row));
  results.dk.resize(size(tokens * k_row));
  results.dv.resize(size(tokens * k_row));
  fences_held = true;
  std::mutex mutex;
  const auto groups = Communicator::threads(static_cast<int>(run.world_size));
  on_ranks(run.world_size, [&](int rank) {
    const Communicator& threads = groups[static_cast<std::size_t>(rank)];
    try {
      const Device device{DeviceType::kCuda, rank % cuda::device_count()};
      cuda::use_device(device);
      const Communicator group = run.world_size == 1  ? Communicator::self()
                                 : run.comm == "nccl" ? Communicator::nccl(threads, device.index)
                                                      : Communicator::peer(threads, device.index);
      const int64_t rows = plan.local_tokens(rank);
      const std::vector<int64_t> q_shape{rows, problem.heads, problem.head_dim};
      const std::vector<int64_t> k_shape{rows, problem.kv_heads, problem.head_dim};
      Fenced q(q_shape, problem.dtype, device);
      Fenced k(k_shape, problem.dtype, device);
      Fenced v(k_shape, problem.dtype, device);
      Fenced dout(q_shape, problem.dtype, device);
      Fenced out(q_shape, problem.dtype, device);
      Fenced lse({rows, problem.heads}, DType::kFloat32, device);
      Fenced dq(q_shape, problem.dtype, device);
      Fenced dk(k_shape, problem.dtype, device);
      Fenced dv(k_shape, problem.dtype, device);
      const std::vector<int64_t> all_q{tokens, problem.heads, problem.head_dim};
      const std::vector<int64_t> all_k{tokens, problem.kv_heads, problem.head_dim};
      q.fill(shard_bytes(inputs.q, problem.dtype, all_q, plan, rank));
      k.fill(shard_bytes(inputs.k, problem.dtype, all_k, plan, rank));
      v.fill(shard_bytes(inputs.v, problem.dtype, all_k, plan, rank));
      dout.fill(shard_bytes(inputs.dout, problem.dtype, all_q, plan, rank));

      const std::shared_ptr<void> stream = cuda::make_stream(device);
      TensorView q_view = q.view();
      TensorView k_view = k.view();
      TensorView v_view = v.view();
      Fenced packed({rows, problem.heads + 2 * problem.kv_heads, problem.head_dim}, problem.dtype,
                    device);
      if (run.packed) {
        q_view = packed.view().slice(1, 0, problem.heads);
        k_view = packed.view().slice(1, problem.heads, problem.kv_heads);
        v_view = packed.view().slice(1, problem.heads + problem.kv_heads, problem.kv_heads);
        OperationOptions copy_options;
        copy_options.stream = stream.get();
        const Plan alone = Plan::from_lengths(std::vector<int64_t>{rows}, 1);
        shard(q.view(), alone, 0, q_view, copy_options);
        shard(k.view(), alone, 0, k_view, copy_options);
        shard(v.view(), alone, 0, v_view, copy_options);
      }
      AttentionOptions options = options_of(problem);
      options.kernels = run.kernels;
      options.stream = stream.get();
      options.deterministic = run.deterministic;
      options.kv_heads_per_stage = run.kv_heads_per_stage;
      forward(q_view, k_view, v_view, plan, group, options, out.view(), lse.view());
      backward(dout.view(), q_view, k_view, v_view, out.view(), lse.view(), plan, group, options,
               dq.view(), dk.view(), dv.view());
      cuda::synchronize(device, stream.get());

      const std::lock_guard lock(mutex);
      for (const Fenced* tensor : {&out, &lse, &dq, &dk, &dv}) {
        fences_held = fences_held && tensor->fences_held();
      }
      collect(out, plan, rank, results.out);
      collect(lse, plan, rank, results.lse);
      collect(dq, plan, rank, results.dq);
      collect(dk, plan, rank, results.dk);
      collect(dv, plan, rank, results.dv);
    } catch (const std::exception& error) {
      threads.abort(error.what());
      throw;
    }
  });
  return results;
}

double distance(const std::vector<double>& got, const std::vector<double>& want) {
  if (got.size() != want.size()) return std::numeric_limits<double>::infinity();
  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (!std::isfinite(want[i]) || !std::isfinite(got[i])) {
      if (got[i] == want[i]) continue;
      return std::numeric_limits<double>::infinity();
    }
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  // Gradients that are exactly 0 (a token alone) are compared by size: inputs are near 1.
  const double floor = 1e-4 * static_cast<double>(want.size());
  return std::sqrt(difference / std::max({norm, floor, 1e-300}));
}

Errors errors_of(const Problem& problem, const RunOptions& run) {
  const auto want = reference_of(problem);
  bool fences_held = false;
  const Results got = run_on_gpus(problem, run, fences_held);
  Errors errors{distance(got.out, want->out), distance(got.lse, want->lse),
                distance(got.dq, want->dq), distance(got.dk, want->dk), distance(got.dv, want->dv)};
  if (!fences_held) errors.out = std::numeric_limits<double>::infinity();
  return errors;
}

}  // namespace zigzag::gpu_test
