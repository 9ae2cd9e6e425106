#include "check.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cuda/runtime.h"
#include "half.h"
#include "text.h"

namespace zigzag::cli {
namespace {

double value_at(const TensorView& tensor, std::int64_t i) {
  switch (tensor.dtype) {
    case DType::kFloat64:
      return tensor.as<const double>()[i];
    case DType::kFloat16:
      return from_float16(tensor.as<const std::uint16_t>()[i]);
    case DType::kBFloat16:
      return from_bfloat16(tensor.as<const std::uint16_t>()[i]);
    default:
      return tensor.as<const float>()[i];
  }
}

// Of the finite elements: one NaN or inf must not take the bounds away from all others.
double rms(const TensorView& tensor) {
  std::int64_t count = 0;
  double sum = 0;
  for (std::int64_t i = 0; i < tensor.num_elements(); ++i) {
    const double value = value_at(tensor, i);
    if (!std::isfinite(value)) continue;
    sum += value * value;
    ++count;
  }
  return count == 0 ? 0 : std::sqrt(sum / static_cast<double>(count));
}

template <typename Predicate>
std::int64_t count_if(const TensorView& tensor, Predicate predicate) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < tensor.num_elements(); ++i) {
    count += predicate(value_at(tensor, i)) ? 1 : 0;
  }
  return count;
}

// Where the terms of a row cancel exactly (a query that sees one key has dq = 0), no relative error
// exists: rows whose reference is below `vanishing` must stay below `allowed` instead.
struct Cancellation {
  double vanishing = 0;
  double allowed = 0;
};

Difference compare(const TensorView& actual, const TensorView& reference, std::int64_t row_size,
                   const Cancellation& cancellation) {
  Difference d;
  const std::int64_t count = actual.num_elements();
  double sum = 0;
  double sum_squares = 0;
  double reference_squares = 0;
  double reference_max = 0;
  std::int64_t compared = 0;
  for (std::int64_t row = 0; row < count; row += row_size) {
    double row_squares = 0;
    double row_reference = 0;
    double row_max = 0;
    for (std::int64_t i = row; i < row + row_size; ++i) {
      const double a = value_at(actual, i);
      const double r = value_at(reference, i);
      if (!std::isfinite(a) || !std::isfinite(r)) {
        if (a != r && !(std::isnan(a) && std::isnan(r))) ++d.misplaced;
        continue;
      }
      const double difference = std::abs(a - r);
      row_max = std::max(row_max, difference);
      sum += difference;
      row_squares += difference * difference;
      row_reference += r * r;
      reference_max = std::max(reference_max, std::abs(r));
      ++compared;
    }
    d.max = std::max(d.max, row_max);
    if (std::sqrt(row_reference) < cancellation.vanishing) {
      if (!(std::sqrt(row_squares) <= cancellation.allowed)) ++d.uncancelled;
      continue;
    }
    d.max_bounded = std::max(d.max_bounded, row_max);
    sum_squares += row_squares;
    reference_squares += row_reference;
  }
  if (compared > 0) d.mean = sum / static_cast<double>(compared);
  if (sum_squares > 0) {
    d.relative_l2 = reference_squares > 0 ? std::sqrt(sum_squares / reference_squares)
                                          : std::numeric_limits<double>::infinity();
  }
  d.max_bound = 2e-5 * reference_max;
  return d;
}

struct Inputs {
  TensorMemory q, k, v, dout;
};

Inputs load_inputs(const Job& job, const Plan& whole) {
  const std::vector<Run> runs = rank_runs(whole, 0);
  Inputs inputs{job.source->load(io::Stream::kQ, runs),
                job.source->load(io::Stream::kK, runs),
                job.source->load(io::Stream::kV, runs),
                {}};
  if (job.backward) inputs.dout = job.source->load(io::Stream::kDOut, runs);
  return inputs;
}

// Results that agree with the reference may still be of no use: a NaN passes the check where the
// reference has one too.
std::vector<std::string> nan_notes(const Results& results, const Inputs& inputs, bool backward) {
  std::vector<std::string> found;
  for (std::size_t i = 0; i < (backward ? kResults : kDQ); ++i) {
    const std::int64_t nan = count_if(results[i].view(), [](double x) { return std::isnan(x); });
    if (nan > 0) found.push_back(fmt::format("{} holds {} NaN", kResultNames[i], count_text(nan)));
  }
  if (found.empty()) return {};
  std::vector<std::string> causes;
  const auto look = [&](const char* name, const TensorMemory& tensor) {
    const std::int64_t bad = count_if(tensor.view(), [](double x) { return !std::isfinite(x); });
    if (bad > 0) causes.push_back(fmt::format("{} of {}", count_text(bad), name));
  };
  look("q", inputs.q);
  look("k", inputs.k);
  look("v", inputs.v);
  if (backward) look("dout", inputs.dout);
  return {fmt::format("{}; {}", fmt::join(found, ", "),
                      causes.empty() ? "every element of the inputs is finite"
                                     : fmt::format("of the inputs, NaN or infinite elements: {}",
                                                   fmt::join(causes, ", ")))};
}

Results run_one_rank(const Job& job, const Plan& whole, const Inputs& inputs, Device device) {
  const Communicator self = Communicator::self();
  AttentionOptions options = job.attention;
  std::shared_ptr<void> stream;
  if (device.type == DeviceType::kCuda) {
    stream = cuda::make_stream(device);
    options.stream = stream.get();
  }
  const TensorMemory q = inputs.q.to(device);
  const TensorMemory k = inputs.k.to(device);
  const TensorMemory v = inputs.v.to(device);
  Results results = make_results(*job.source, whole.total_tokens(), job.backward, device);
  forward(q.view(), k.view(), v.view(), whole, self, options, results[kOut].view(),
          results[kLse].view());
  TensorMemory dout;
  if (job.backward) {
    dout = inputs.dout.to(device);
    backward(dout.view(), q.view(), k.view(), v.view(), results[kOut].view(), results[kLse].view(),
             whole, self, options, results[kDQ].view(), results[kDK].view(), results[kDV].view());
  }
  if (device.type == DeviceType::kCuda) cuda::synchronize(device, options.stream);
  for (TensorMemory& tensor : results) {
    if (tensor.view().data != nullptr) tensor = tensor.to({});
  }
  return results;
}

// The float64 reference, document by document and KV head by KV head so that progress shows.
Results run_reference(const Job& job, const Plan& whole, const Inputs& inputs, Progress& progress) {
  const io::ModelShape& shape = job.source->shape();
  const std::int64_t tokens = whole.total_tokens();
  Results results;
  results[kOut] = TensorMemory(DType::kFloat64, {tokens, shape.heads, shape.head_dim});
  results[kLse] = TensorMemory(DType::kFloat64, {tokens, shape.heads});
  if (job.backward) {
    results[kDQ] = TensorMemory(DType::kFloat64, {tokens, shape.heads, shape.head_dim});
    results[kDK] = TensorMemory(DType::kFloat64, {tokens, shape.kv_heads, shape.head_dim});
    results[kDV] = TensorMemory(DType::kFloat64, {tokens, shape.kv_heads, shape.head_dim});
  }
  const std::int64_t group = shape.heads / shape.kv_heads;
  AttentionOptions options = job.attention;
  options.kv_heads_per_stage = 0;  // every call below has one KV head
  const auto work_of = [](double length) { return length * length; };
  double total = 0;
  for (std::int64_t d = 0; d < whole.num_documents(); ++d) {
    total += work_of(static_cast<double>(whole.document_length(d)));
  }
  double done = 0;
  for (std::int64_t d = 0; d < whole.num_documents(); ++d) {
    const std::int64_t length = whole.document_length(d);
    const std::int64_t begin = whole.cu_seqlens()[static_cast<std::size_t>(d)];
    const std::array<std::int64_t, 2> cu{0, length};
    for (std::int64_t h = 0; h < shape.kv_heads && length > 0; ++h) {
      progress.show("checking against the float64 reference:", done / total);
      const auto rows = [&](const TensorMemory& t) { return t.view().slice(0, begin, length); };
      const auto of_q = [&](const TensorMemory& t) { return rows(t).slice(1, h * group, group); };
      const auto of_k = [&](const TensorMemory& t) { return rows(t).slice(1, h, 1); };
      reference::forward(of_q(inputs.q), of_k(inputs.k), of_k(inputs.v), cu, options,
                         of_q(results[kOut]), of_q(results[kLse]));
      if (job.backward) {
        reference::backward(of_q(inputs.dout), of_q(inputs.q), of_k(inputs.k), of_k(inputs.v), cu,
                            options, of_q(results[kDQ]), of_k(results[kDK]), of_k(results[kDV]));
      }
      done += work_of(static_cast<double>(length)) / static_cast<double>(shape.kv_heads);
    }
  }
  progress.clear();
  return results;
}

// The bounds of a relative L2 error: fixed in float32; in the half types a factor over one rank's
// error, and a ceiling that one rank itself must keep.
struct Bounds {
  double fixed;
  double factor;
  double ceiling;
};

Bounds bounds_of(std::size_t index, DType dtype, bool cuda) {
  const bool summed = index == kDK || index == kDV;
  const bool gradient = summed || index == kDQ;
  if (dtype == DType::kFloat32) {
    const double fixed = cuda ? (summed ? 2e-5 : 1e-5) : (summed ? 3e-6 : 2e-6);
    return {fixed, 0, fixed};
  }
  const double factor = summed ? 1.1 : 1.05;
  if (dtype == DType::kFloat16) return {0, factor, gradient ? 5e-3 : 2e-3};
  return {0, factor, gradient ? 3e-2 : 1e-2};
}

}  // namespace

CheckReport check_results(const Job& job, const Results& results, Device device,
                          Progress& progress) {
  const auto start = std::chrono::steady_clock::now();
  const Plan whole(job.plan->cu_seqlens(), 1);
  const Inputs inputs = load_inputs(job, whole);
  progress.show("running on one rank");
  const Results one = run_one_rank(job, whole, inputs, device);
  const Results reference = run_reference(job, whole, inputs, progress);

  // The size that a row of dq or dk would have without cancellation.
  const DType dtype = job.source->dtype();
  const auto head_dim = static_cast<double>(job.source->shape().head_dim);
  const double scale = job.attention.softmax_scale.value_or(1 / std::sqrt(head_dim));
  Cancellation gradient;
  if (job.backward) {
    const double size = std::abs(scale) * head_dim * rms(inputs.dout.view()) *
                        rms(inputs.v.view()) * std::max(rms(inputs.k.view()), rms(inputs.q.view()));
    gradient = {1e-9 * size, (dtype == DType::kFloat32 ? 1e-5 : 2e-2) * size};
  }

  CheckReport report;
  report.notes = nan_notes(results, inputs, job.backward);
  for (std::size_t i = 0; i < (job.backward ? kResults : kDQ); ++i) {
    TensorCheck& check = report.tensors[i];
    const TensorView& actual = results[i].view();
    const TensorView& single = one[i].view();
    const std::int64_t row = i == kLse ? 1 : job.source->shape().head_dim;
    const Cancellation cancellation = i == kDQ || i == kDK ? gradient : Cancellation{};
    check.run = compare(actual, reference[i].view(), row, cancellation);
    check.one_rank = compare(single, reference[i].view(), row, cancellation);
    check.equal =
        std::memcmp(actual.data, single.data, static_cast<std::size_t>(results[i].bytes())) == 0;
    for (std::int64_t e = 0; e < actual.num_elements(); ++e) {
      const double difference = std::abs(value_at(actual, e) - value_at(single, e));
      if (difference > check.one_rank_max) check.one_rank_max = difference;
    }
    const bool cuda = device.type == DeviceType::kCuda;
    const Bounds bounds = bounds_of(i, dtype, cuda);
    check.l2_bound = bounds.factor == 0 ? bounds.fixed : bounds.factor * check.one_rank.relative_l2;
    const bool bounded = dtype == DType::kFloat32 && !cuda && i != kDK && i != kDV;
    if (!bounded) check.run.max_bound = 0;
    check.passed = check.run.misplaced == 0 && check.run.uncancelled == 0 &&
                   check.run.relative_l2 <= check.l2_bound &&
                   check.one_rank.relative_l2 <= bounds.ceiling &&
                   (!bounded || check.run.max_bounded <= check.run.max_bound);
    report.passed = report.passed && check.passed;
  }
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace zigzag::cli
