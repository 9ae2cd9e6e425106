#include <algorithm>
#include <cmath>
#include <optional>

#include <fmt/format.h>

#include "bench_common.h"
#include "command.h"
#include "io/deterministic_math.h"
#include "io/generate.h"
#include "process_memory.h"
#include "zigzag/plan.h"
#include "zigzag/system.h"

namespace zigzag::cli {
namespace {

constexpr std::int64_t kDocuments = 1'000'000;

// Lengths from about 10 to 100,000 tokens, most of them short, as in real collections.
std::vector<std::int64_t> drawn_cu_seqlens(std::uint64_t seed) {
  std::vector<float> normal(static_cast<std::size_t>(kDocuments));
  io::fill_normal(seed, io::Stream::kQ, 0, kDocuments, 1, DType::kFloat32, normal.data());
  std::vector<std::int64_t> cu_seqlens{0};
  for (const float x : normal) {
    const double length = 600 * io::portable_exp(1.2 * static_cast<double>(x));
    cu_seqlens.push_back(cu_seqlens.back() + std::max<std::int64_t>(1, std::llround(length)));
  }
  return cu_seqlens;
}

}  // namespace

int bench_plan(const BenchOptions& options) {
  const bool given = !options.pack.lengths.empty() || !options.pack.lengths_file.empty() ||
                     !options.pack.documents.empty();
  const std::vector<std::int64_t> cu_seqlens =
      given ? options.cu_seqlens("")
            : drawn_cu_seqlens(static_cast<std::uint64_t>(options.pack.seed));
  const std::int64_t ranks = options.group.ranks;
  const Mask mask = options.mask.mask();
  const std::int64_t item = item_size(options.shape.type());
  std::vector<BenchRow> rows;
  std::int64_t all_wrong = 0;
  const auto measure = [&](const std::string& what, const std::function<std::int64_t()>& work) {
    const double before = peak_resident_bytes();
    Times times;
    std::int64_t wrong = 0;
    for (std::int64_t i = 0; i < options.repeat; ++i) {
      times.add(timed([&] { wrong = work(); }));
    }
    all_wrong += wrong;
    BenchRow row;
    row["what"] = what;
    row["ms"] = 1e3 * times.median();
    row["spread"] = times.spread();
    row["peak MB more"] = (peak_resident_bytes() - before) / 1e6;
    row["#wrong"] = wrong;
    rows.push_back(std::move(row));
  };
  std::optional<Plan> plan;
  measure("build the plan", [&] {
    plan.emplace(cu_seqlens, ranks);
    return std::int64_t{plan->total_tokens() != cu_seqlens.back()};
  });
  measure("tokens of every rank", [&] {
    std::int64_t sum = 0;
    for (std::int64_t r = 0; r < ranks; ++r) sum += plan->local_tokens(r);
    return std::int64_t{sum != plan->total_tokens()};
  });
  measure("visible pairs of every rank", [&] {
    const std::vector<double> pairs = plan->visible_pairs_all(mask);
    return std::int64_t{pairs.back() != plan->visible_pairs(ranks - 1, mask)};
  });
  measure("gathered bytes of every rank", [&] {
    const std::int64_t kv_heads = options.shape.kv_heads;
    const std::int64_t head_dim = options.shape.head_dim;
    const auto bytes = plan->gathered_bytes_all(kv_heads, head_dim, item, mask);
    return std::int64_t{bytes.front() != plan->gathered_bytes(0, kv_heads, head_dim, item, mask)};
  });
  measure("predicted time", [&] {
    const PredictedTime time = predict(*plan, {400, 50}, options.shape.heads,
                                       options.shape.kv_heads, options.shape.head_dim, item, mask);
    return std::int64_t{!(time.forward >= time.forward_compute)};
  });
  measure("work items of one rank", [&] {
    std::int64_t queries = 0;
    for (const WorkItem& w : plan->work_items(0, mask)) queries += w.q_count;
    return std::int64_t{queries != plan->local_tokens(0)};
  });
  measure("rows of one rank as indices", [&] {
    return std::int64_t{static_cast<std::int64_t>(plan->token_indices(0).size()) !=
                        plan->local_tokens(0)};
  });
  nlohmann::ordered_json head;
  head["benchmark"] = "plan";
  head["version"] = version();
  head["documents"] = plan->num_documents();
  head["tokens"] = plan->total_tokens();
  head["ranks"] = ranks;
  head["repeat"] = options.repeat;
  head["peak_resident_MB"] = peak_resident_bytes() / 1e6;
  print_rows(head, rows, options.json);
  return all_wrong == 0 ? kExitOk : kExitCheckFailed;
}

}  // namespace zigzag::cli
