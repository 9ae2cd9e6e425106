#include "plan_report.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "text.h"

namespace zigzag::cli {
namespace {

constexpr std::int64_t kTableRanks = 64;
constexpr std::int64_t kListedDocuments = 16;  // as the help of --segments says
constexpr std::int64_t kListedRanks = 16;

// Non-empty chunks of all ranks: a document of L tokens has min(L, 2 x ranks) of them.
std::int64_t count_segments(const Plan& plan) {
  std::int64_t total = 0;
  for (std::int64_t d = 0; d < plan.num_documents(); ++d) {
    total += std::min(plan.document_length(d), 2 * plan.world_size());
  }
  return total;
}

// Calls f(document, chunk index, first global token, one past the last) in the order of local rows.
template <typename F>
void for_each_segment(const Plan& plan, std::int64_t rank, F f) {
  const auto [early, late] = plan.chunk_indices(rank);
  for (std::int64_t d = 0; d < plan.num_documents(); ++d) {
    const std::int64_t base = plan.cu_seqlens()[static_cast<std::size_t>(d)];
    for (const std::int64_t index : {early, late}) {
      const Chunk chunk = plan.chunk(d, index);
      if (chunk.begin < chunk.end) f(d, index, base + chunk.begin, base + chunk.end);
    }
  }
}

void write(const fmt::memory_buffer& text) { std::fwrite(text.data(), 1, text.size(), stdout); }

}  // namespace

std::string mask_text(const Mask& mask) {
  std::string text = mask.causal ? "causal" : "full";
  if (mask.window_left >= 0) text += fmt::format(", window of {} to the left", mask.window_left);
  if (!mask.causal && mask.window_right >= 0) {
    text += fmt::format(", window of {} to the right", mask.window_right);
  }
  return text;
}

PlanReport make_report(const Plan& plan, const ShapeOptions& shape, const Mask& mask,
                       const std::optional<CostModel>& model, std::vector<std::string> notes) {
  PlanReport report;
  report.heads = shape.heads;
  report.kv_heads = shape.kv_heads;
  report.head_dim = shape.head_dim;
  report.dtype = shape.type();
  report.mask = mask;
  report.balance = plan.balance(mask);
  report.segments = count_segments(plan);
  report.notes = std::move(notes);
  const std::vector<double> pairs = plan.visible_pairs_all(mask);
  const double flops_of_pair =
      4.0 * static_cast<double>(shape.heads) * static_cast<double>(shape.head_dim);
  const std::vector<double> gathered =
      plan.gathered_bytes_all(shape.kv_heads, shape.head_dim, item_size(report.dtype), mask);
  for (std::int64_t r = 0; r < plan.world_size(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    report.ranks.push_back({plan.local_tokens(r), flops_of_pair * pairs[i], gathered[i]});
  }
  if (model) {
    report.model = model;
    report.predicted = predict(plan, *model, shape.heads, shape.kv_heads, shape.head_dim,
                               item_size(report.dtype), mask);
  }
  return report;
}

void print_json(const Plan& plan, const PlanReport& report, bool all_segments) {
  nlohmann::ordered_json head;
  head["world_size"] = plan.world_size();
  head["total_tokens"] = plan.total_tokens();
  head["documents"] = plan.num_documents();
  head["balance"] = report.balance;
  head["heads"] = report.heads;
  head["kv_heads"] = report.kv_heads;
  head["head_dim"] = report.head_dim;
  head["dtype"] = dtype_name(report.dtype);
  head["mask"] = {{"causal", report.mask.causal},
                  {"window_left", report.mask.window_left},
                  {"window_right", report.mask.window_right}};
  head["fingerprint"] = fmt::format("{:016x}", plan.fingerprint());
  head["segments"] = report.segments;
  head["notes"] = report.notes;
  if (report.model) {
    const PredictedTime& p = report.predicted;
    head["predicted"] = {{"tflops", report.model->tflops},
                         {"gbps", report.model->gbps},
                         {"forward_s", p.forward},
                         {"backward_s", p.backward},
                         {"forward_compute_s", p.forward_compute},
                         {"forward_exchange_s", p.forward_exchange},
                         {"backward_compute_s", p.backward_compute},
                         {"backward_exchange_s", p.backward_exchange}};
  }
  // The list of ranks is written piece by piece: with --segments it can exceed the memory.
  const bool with_segments = all_segments || report.segments <= kManySegments;
  fmt::memory_buffer text;
  const auto out = std::back_inserter(text);
  const std::string opening = head.dump();
  fmt::format_to(out, "{},\"ranks\":[", std::string_view(opening).substr(0, opening.size() - 1));
  for (std::int64_t r = 0; r < plan.world_size(); ++r) {
    const RankReport& rank = report.ranks[static_cast<std::size_t>(r)];
    const auto [early, late] = plan.chunk_indices(r);
    fmt::format_to(out,
                   "{}{{\"rank\":{},\"tokens\":{},\"flops\":{},\"gathered_bytes\":{},"
                   "\"chunks\":[{},{}]",
                   r == 0 ? "" : ",", r, rank.tokens, rank.flops, rank.gathered_bytes, early, late);
    if (with_segments) {
      fmt::format_to(out, ",\"segments\":[");
      bool first = true;
      for_each_segment(plan, r, [&](auto document, auto chunk, auto begin, auto end) {
        fmt::format_to(out, "{}{{\"document\":{},\"chunk\":{},\"begin\":{},\"end\":{}}}",
                       first ? "" : ",", document, chunk, begin, end);
        first = false;
        if (text.size() > 1 << 20) {
          write(text);
          text.clear();
        }
      });
      fmt::format_to(out, "]");
    }
    fmt::format_to(out, "}}");
  }
  fmt::format_to(out, "]}}\n");
  write(text);
}

void print_table(const Plan& plan, const PlanReport& report, bool all_segments) {
  for (const std::string& note : report.notes) fmt::print("Note: {}.\n", note);
  fmt::print("{}, {} over {}; {}, {}, head_dim {}, {}; {}\n",
             plural(plan.num_documents(), "document"), plural(plan.total_tokens(), "token"),
             plural(plan.world_size(), "rank"), plural(report.heads, "query head"),
             plural(report.kv_heads, "KV head"), report.head_dim, dtype_name(report.dtype),
             mask_text(report.mask));
  fmt::print("Balance {:.5f} (mean FLOPs of a rank / FLOPs of the busiest)\n\n", report.balance);

  fmt::print("{:>6} {:>13} {:>15} {:>9} {:>16} {:>14}\n", "rank", "chunks", "tokens", "work",
             "forward", "receives");
  double total = 0;
  for (const RankReport& rank : report.ranks) total += rank.flops;
  const std::int64_t ranks = plan.world_size();
  for (std::int64_t r = 0; r < ranks; ++r) {
    if (ranks > kTableRanks && r == kTableRanks / 2) {
      fmt::print("{:>6} {} more ranks (all of them with --json)\n", "...", count_text(ranks - 40));
      r = ranks - (40 - kTableRanks / 2);
    }
    const RankReport& rank = report.ranks[static_cast<std::size_t>(r)];
    const auto [early, late] = plan.chunk_indices(r);
    fmt::print("{:>6} {:>13} {:>15} {:>8.3f}% {:>16} {:>14}\n", r,
               fmt::format("{}, {}", early, late), count_text(rank.tokens),
               total > 0 ? 100 * rank.flops / total : 0.0, scaled_text(rank.flops, "FLOP"),
               bytes_text(rank.gathered_bytes));
  }
  fmt::print("{:>6} {:>13} {:>15} {:>8.3f}% {:>16}\n", "all", "", count_text(plan.total_tokens()),
             total > 0 ? 100.0 : 0.0, scaled_text(total, "FLOP"));

  if (report.model) {
    const PredictedTime& p = report.predicted;
    fmt::print("\nPredicted at {} TFLOP/s and {} GB/s a rank, slowest rank:\n",
               report.model->tflops, report.model->gbps);
    fmt::print("  forward   {:>10}  (attention {}, exchange {})\n", seconds_text(p.forward),
               seconds_text(p.forward_compute), seconds_text(p.forward_exchange));
    fmt::print("  backward  {:>10}  (attention {}, exchange {})\n", seconds_text(p.backward),
               seconds_text(p.backward_compute), seconds_text(p.backward_exchange));
  }

  if (!all_segments && (plan.num_documents() > kListedDocuments || ranks > kListedRanks)) {
    fmt::print("\n{}; --segments lists them.\n", plural(report.segments, "segment"));
    return;
  }
  fmt::print("\nGlobal tokens of each rank's rows, in their order (document.chunk: begin-end):\n");
  for (std::int64_t r = 0; r < ranks; ++r) {
    fmt::print("  rank {}:", r);
    for_each_segment(plan, r, [](auto document, auto chunk, auto begin, auto end) {
      fmt::print(" {}.{}: {}-{};", document, chunk, begin, end);
    });
    fmt::print("\n");
  }
}

}  // namespace zigzag::cli
