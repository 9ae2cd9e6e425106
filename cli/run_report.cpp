#include "run_report.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "plan_report.h"
#include "text.h"

namespace zigzag::cli {
namespace {

constexpr double kBackwardOverForward = 2.5;  // five matrix products against two
constexpr std::size_t kTableRanks = 64;

struct Totals {
  double forward_flops = 0;
  double forward = 0;  // seconds of the slowest rank
  double backward = 0;

  double forward_tflops() const { return forward > 0 ? forward_flops / forward / 1e12 : 0; }
  double backward_tflops() const {
    return backward > 0 ? kBackwardOverForward * forward_flops / backward / 1e12 : 0;
  }
  double tflops() const {
    const double seconds = forward + backward;
    const double flops = forward_flops * (backward > 0 ? 1 + kBackwardOverForward : 1);
    return seconds > 0 ? flops / seconds / 1e12 : 0;
  }
};

Totals totals_of(const RunReport& report) {
  Totals totals;
  const io::ModelShape& shape = report.job->source->shape();
  for (std::int64_t r = 0; r < report.group->size(); ++r) {
    totals.forward_flops +=
        report.job->plan->flops(r, shape.heads, shape.head_dim, report.job->attention.mask);
    const RankTimes& times = report.times[static_cast<std::size_t>(r)];
    totals.forward = std::max(totals.forward, times.forward);
    totals.backward = std::max(totals.backward, times.backward);
  }
  return totals;
}

std::vector<std::string> notes_of(const RunReport& report) {
  std::vector<std::string> notes = report.job->source->notes();
  if (report.check) {
    notes.insert(notes.end(), report.check->notes.begin(), report.check->notes.end());
  }
  return notes;
}

// JSON has no infinity.
nlohmann::ordered_json number(double value) {
  if (!std::isfinite(value)) return nullptr;
  return value;
}

nlohmann::ordered_json check_json(const CheckReport& check, bool backward) {
  nlohmann::ordered_json json;
  json["passed"] = check.passed;
  json["seconds"] = check.seconds;
  for (std::size_t i = 0; i < (backward ? kResults : kDQ); ++i) {
    const TensorCheck& tensor = check.tensors[i];
    const std::string name(kResultNames[i]);
    json[name + "_max"] = number(tensor.run.max);
    json[name + "_mean"] = number(tensor.run.mean);
    json[name + "_relative_l2"] = number(tensor.run.relative_l2);
    json[name + "_relative_l2_bound"] = number(tensor.l2_bound);
    json[name + "_one_rank_max"] = number(tensor.one_rank_max);
    json[name + "_one_rank_equal"] = tensor.equal;
    json[name + "_misplaced"] = tensor.run.misplaced + tensor.run.uncancelled;
    json[name + "_passed"] = tensor.passed;
  }
  return json;
}

void print_check(const CheckReport& check, bool backward) {
  fmt::print("\nCheck against the float64 reference and one rank ({}):\n",
             seconds_text(check.seconds));
  fmt::print("{:>6} {:>11} {:>11} {:>12} {:>12} {:>15}\n", "", "max diff", "mean diff",
             "relative L2", "allowed", "from one rank");
  for (std::size_t i = 0; i < (backward ? kResults : kDQ); ++i) {
    const TensorCheck& tensor = check.tensors[i];
    fmt::print("{:>6} {:>11.3e} {:>11.3e} {:>12.3e} {:>12.3e} {:>15}  {}\n", kResultNames[i],
               tensor.run.max, tensor.run.mean, tensor.run.relative_l2, tensor.l2_bound,
               tensor.equal ? "same bits" : fmt::format("{:.3e}", tensor.one_rank_max),
               tensor.passed ? "ok" : "EXCEEDED");
    if (tensor.run.max_bound > 0 && !(tensor.run.max_bounded <= tensor.run.max_bound)) {
      fmt::print("       the largest difference of {} exceeds {:.3e}\n", kResultNames[i],
                 tensor.run.max_bound);
    }
    if (tensor.run.misplaced > 0) {
      fmt::print("       {} elements of {} differ in being infinite or NaN\n", tensor.run.misplaced,
                 kResultNames[i]);
    }
    if (tensor.run.uncancelled > 0) {
      fmt::print("       {} rows of {} should vanish and do not\n", tensor.run.uncancelled,
                 kResultNames[i]);
    }
  }
  fmt::print("Check {}\n", check.passed ? "passed" : "FAILED");
}

void print_memory(const RunReport& report) {
  const MemoryReport& m = report.memory;
  if (m.peak == 0) return;
  fmt::print("\nPeak resident memory of {}: {}\n",
             report.group->is_mpi() ? "the largest process" : "this process with all ranks",
             bytes_text(m.peak));
  const auto always = [](double bytes, const std::string& what) {
    fmt::print("  {:>12}  {}\n", bytes_text(bytes), what);
  };
  const auto line = [&](double bytes, const std::string& what) {
    if (bytes > 0) always(bytes, what);
  };
  line(m.inputs, report.job->backward ? "q, k, v, dout" : "q, k, v");
  line(m.results, report.job->backward ? "out, lse, dq, dk, dv" : "out, lse");
  const std::int64_t kv_heads = report.job->source->shape().kv_heads;
  line(m.gathered, fmt::format("gathered K and V, {} of {} KV heads at a time", m.stage, kv_heads));
  line(m.partials,
       fmt::format("dK and dV in float32, {} of {} KV heads at a time, before the sum over ranks",
                   m.stage, kv_heads));
  always(m.rest(),
         "program, threads, tables, scratch, and float32 sums of a few documents and KV heads");
  fmt::print("All but the last are linear in the tokens; nothing grows with their square.\n");
  if (m.whole > 0) {
    fmt::print(
        "Measured before --check, which adds {} of results in global order, as much of one rank's, "
        "and the\nfloat64 reference.\n",
        bytes_text(m.whole));
  }
}

}  // namespace

double MemoryReport::rest() const {
  return std::max(0.0, peak - inputs - results - gathered - partials);
}

MemoryReport measure_memory(const Job& job, const Group& group,
                            const std::vector<RankTimes>& times) {
  MemoryReport memory;
  const Plan& plan = *job.plan;
  const io::ModelShape& shape = job.source->shape();
  const auto item = static_cast<double>(item_size(job.source->dtype()));
  const bool host = group.device() == "cpu";
  const Kernels kernels = job.attention.kernels.value_or(default_kernels());
  // Rank threads read K and V where the others hold them, and have no partials.
  const bool in_place = host && group.comm() == "threads" && kernels == Kernels::kFused;
  memory.stage = job.attention.kv_heads_per_stage > 0
                     ? job.attention.kv_heads_per_stage
                     : auto_kv_heads_per_stage(plan, shape.kv_heads, shape.head_dim,
                                               job.source->dtype(), group.device_of(0));
  const auto q_row = static_cast<double>(shape.heads * shape.head_dim);
  const auto k_row = static_cast<double>(shape.kv_heads * shape.head_dim);
  const auto stage_row = static_cast<double>(memory.stage * shape.head_dim);
  const std::vector<std::int64_t> gathered = plan.gathered_tokens_all(job.attention.mask);
  for (std::int64_t r = 0; r < plan.world_size(); ++r) {
    // Under MPI the process of rank 0 stands for all: they differ by one token.
    if (group.is_mpi() && r > 0) break;
    if (!host) continue;
    const auto rows = static_cast<double>(plan.local_tokens(r));
    memory.inputs += rows * item * (q_row + 2 * k_row + (job.backward ? q_row : 0));
    memory.results += rows * (item * q_row + 4 * static_cast<double>(shape.heads));
    if (job.backward) memory.results += rows * item * (q_row + 2 * k_row);
    if (plan.world_size() == 1) continue;
    const auto keys = static_cast<double>(gathered[static_cast<std::size_t>(r)]);
    if (in_place) continue;
    memory.gathered += 2 * keys * stage_row * item;
    if (job.backward) memory.partials += 2 * keys * stage_row * 4;
  }
  if (job.keep_results) {
    const auto tokens = static_cast<double>(plan.total_tokens());
    memory.whole = tokens * (item * q_row + 4 * static_cast<double>(shape.heads));
    if (job.backward) memory.whole += tokens * item * (q_row + 2 * k_row);
  }
  for (const RankTimes& rank : times) memory.peak = std::max(memory.peak, rank.peak_bytes);
  return memory;
}

void print_run_json(const RunReport& report) {
  const Job& job = *report.job;
  const io::ModelShape& shape = job.source->shape();
  const Totals totals = totals_of(report);
  nlohmann::ordered_json json;
  json["ranks"] = report.group->size();
  json["device"] = report.group->device();
  json["comm"] = report.group->comm();
  json["dtype"] = dtype_name(job.source->dtype());
  json["tokens"] = job.plan->total_tokens();
  json["documents"] = job.plan->num_documents();
  json["heads"] = shape.heads;
  json["kv_heads"] = shape.kv_heads;
  json["head_dim"] = shape.head_dim;
  json["mask"] = {{"causal", job.attention.mask.causal},
                  {"window_left", job.attention.mask.window_left},
                  {"window_right", job.attention.mask.window_right}};
  json["kernels"] = kernels_name(job.attention.kernels.value_or(default_kernels()));
  json["kv_heads_per_stage"] = report.memory.stage;
  json["fingerprint"] = fmt::format("{:016x}", job.plan->fingerprint());
  json["forward_ms"] = 1e3 * totals.forward;
  if (job.backward) {
    json["backward_ms"] = 1e3 * totals.backward;
  } else {
    json["backward_ms"] = nullptr;
  }
  json["tflops"] = totals.tflops();
  json["forward_tflops"] = totals.forward_tflops();
  json["backward_tflops"] = totals.backward_tflops();
  json["balance"] = job.plan->balance(job.attention.mask);
  json["peak_resident_bytes"] = report.memory.peak;
  json["memory"] = {{"inputs_bytes", report.memory.inputs},
                    {"results_bytes", report.memory.results},
                    {"gathered_bytes", report.memory.gathered},
                    {"partials_bytes", report.memory.partials},
                    {"rest_bytes", report.memory.rest()}};
  json["check_results_bytes"] = report.memory.whole;
  json["notes"] = notes_of(report);
  auto ranks = nlohmann::ordered_json::array();
  for (std::int64_t r = 0; r < report.group->size(); ++r) {
    const RankTimes& times = report.times[static_cast<std::size_t>(r)];
    nlohmann::ordered_json rank;
    rank["rank"] = r;
    rank["tokens"] = job.plan->local_tokens(r);
    rank["flops"] = job.plan->flops(r, shape.heads, shape.head_dim, job.attention.mask);
    rank["gathered_bytes"] = job.plan->gathered_bytes(
        r, shape.kv_heads, shape.head_dim, item_size(job.source->dtype()), job.attention.mask);
    rank["forward_ms"] = 1e3 * times.forward;
    rank["backward_ms"] = job.backward ? nlohmann::ordered_json(1e3 * times.backward) : nullptr;
    ranks.push_back(std::move(rank));
  }
  json["per_rank"] = std::move(ranks);
  if (report.check) {
    json["check"] = check_json(*report.check, job.backward);
  } else {
    json["check"] = nullptr;
  }
  if (!job.output.empty()) json["output"] = job.output;
  fmt::print("{}\n", json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

void print_run_summary(const RunReport& report) {
  const Job& job = *report.job;
  const io::ModelShape& shape = job.source->shape();
  const Totals totals = totals_of(report);
  for (const std::string& note : notes_of(report)) fmt::print("Note: {}.\n", note);
  fmt::print("{}, {} over {} ({}, {}); {}, {}, head_dim {}, {}; {}\n\n",
             plural(job.plan->num_documents(), "document"),
             plural(job.plan->total_tokens(), "token"), plural(report.group->size(), "rank"),
             report.group->comm(), report.group->device(), plural(shape.heads, "query head"),
             plural(shape.kv_heads, "KV head"), shape.head_dim, dtype_name(job.source->dtype()),
             mask_text(job.attention.mask));
  fmt::print("{:<9} {:>10} {:>14} {:>9}\n", "", "time", "work", "TFLOP/s");
  fmt::print("{:<9} {:>10} {:>14} {:>9.4f}\n", "forward", seconds_text(totals.forward),
             scaled_text(totals.forward_flops, "FLOP"), totals.forward_tflops());
  if (job.backward) {
    fmt::print("{:<9} {:>10} {:>14} {:>9.4f}\n", "backward", seconds_text(totals.backward),
               scaled_text(kBackwardOverForward * totals.forward_flops, "FLOP"),
               totals.backward_tflops());
    fmt::print(
        "{:<9} {:>10} {:>14} {:>9.4f}\n", "both", seconds_text(totals.forward + totals.backward),
        scaled_text((1 + kBackwardOverForward) * totals.forward_flops, "FLOP"), totals.tflops());
  }
  fmt::print("\n{:>5} {:>12} {:>14} {:>12} {:>10} {:>10}\n", "rank", "tokens", "forward work",
             "receives", "forward", "backward");
  for (std::size_t r = 0; r < std::min(report.times.size(), kTableRanks); ++r) {
    const auto rank = static_cast<std::int64_t>(r);
    fmt::print(
        "{:>5} {:>12} {:>14} {:>12} {:>10} {:>10}\n", r, count_text(job.plan->local_tokens(rank)),
        scaled_text(job.plan->flops(rank, shape.heads, shape.head_dim, job.attention.mask), "FLOP"),
        bytes_text(job.plan->gathered_bytes(rank, shape.kv_heads, shape.head_dim,
                                            item_size(job.source->dtype()), job.attention.mask)),
        seconds_text(report.times[r].forward),
        job.backward ? seconds_text(report.times[r].backward) : "-");
  }
  if (report.times.size() > kTableRanks) {
    fmt::print("  and {} more ranks (all of them with --json)\n",
               report.times.size() - kTableRanks);
  }
  print_memory(report);
  if (report.check) print_check(*report.check, job.backward);
  if (!job.output.empty()) fmt::print("\nResults written to {}\n", job.output);
}

}  // namespace zigzag::cli
