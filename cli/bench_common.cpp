#include "bench_common.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>

#include <fmt/format.h>

#include "zigzag/error.h"
#include "zigzag/system.h"

namespace zigzag::cli {
namespace {

constexpr std::int64_t kMostThreads = 1024;

std::string cell(const nlohmann::ordered_json& value) {
  if (value.is_null()) return "-";
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number_float()) {
    const double number = value.get<double>();
    return std::abs(number) >= 100 ? fmt::format("{:.1f}", number) : fmt::format("{:.3g}", number);
  }
  return value.dump();
}

}  // namespace

void BenchOptions::declare(Flags& flags, bool exchange) {
  pack.declare(flags);
  flags.integer("--seed", pack.seed, 0, std::numeric_limits<std::int64_t>::max(),
                "Seed of everything that is drawn");
  if (exchange) {
    group.declare_threads(flags);
  } else {
    group.declare_ranks(flags);
  }
  shape.declare(flags);
  mask.declare(flags);
  mask.declare_scores(flags);
  flags.group("Measurement");
  flags.text("--threads", threads, "N[,N...]",
             "Threads of an operation on the CPU [one, and all cores]");
  flags.integer("--repeat", repeat, 1, 100000, "Timed repetitions, after one that is not");
  flags.toggle("--reference", reference, "Time the plain twins too, however long they take");
  flags.toggle("--json", json, "Print one JSON object");
}

std::vector<int> BenchOptions::thread_counts() const {
  if (threads.empty()) {
    const int all = num_threads();
    return all > 1 ? std::vector<int>{1, all} : std::vector<int>{1};
  }
  std::vector<int> counts;
  for (const std::int64_t count : parse_lengths("--threads", threads)) {
    if (count < 1 || count > kMostThreads) {
      throw InvalidArgument(
          fmt::format("--threads holds {}; 1 to {} are allowed", count, kMostThreads));
    }
    counts.push_back(static_cast<int>(count));
  }
  return counts;
}

std::vector<std::int64_t> BenchOptions::cu_seqlens(const std::string& fallback) const {
  PackOptions chosen = pack;
  if (pack.lengths.empty() && pack.lengths_file.empty() && pack.documents.empty()) {
    chosen.lengths = fallback;
  }
  chosen.check();
  return read_lengths(chosen).cu_seqlens;
}

double Times::quantile(double q) const {
  if (seconds_.empty()) return 0;
  std::vector<double> sorted = seconds_;
  std::sort(sorted.begin(), sorted.end());
  const double at = q * static_cast<double>(sorted.size() - 1);
  const auto low = static_cast<std::size_t>(at);
  const std::size_t high = std::min(low + 1, sorted.size() - 1);
  return sorted[low] + (at - static_cast<double>(low)) * (sorted[high] - sorted[low]);
}

double Times::spread() const {
  const double middle = median();
  return middle > 0 ? (quantile(0.75) - quantile(0.25)) / middle : 0;
}

double paired_ratio(const Times& base, const Times& measured) {
  Times ratios;
  for (std::size_t i = 0; i < std::min(base.all().size(), measured.all().size()); ++i) {
    if (measured.all()[i] > 0) ratios.add(base.all()[i] / measured.all()[i]);
  }
  return ratios.median();
}

double timed(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void use_threads(int threads) {
  ::setenv("ZIGZAG_NUM_THREADS", std::to_string(threads).c_str(), 1);
}

void print_rows(const nlohmann::ordered_json& head, const std::vector<BenchRow>& rows, bool json) {
  if (json) {
    nlohmann::ordered_json object = head;
    object["rows"] = rows;
    fmt::print("{}\n", object.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
    return;
  }
  for (const auto& [key, value] : head.items()) {
    if (value.is_primitive()) fmt::print("{}: {}\n", key, cell(value));
  }
  if (rows.empty()) return;
  std::vector<std::size_t> widths;
  for (const auto& [key, value] : rows.front().items()) {
    std::size_t width = key.size();
    for (const BenchRow& row : rows) width = std::max(width, cell(row.at(key)).size());
    widths.push_back(width);
  }
  const auto line = [&](const std::function<std::string(const std::string&)>& text) {
    std::size_t column = 0;
    for (const auto& [key, value] : rows.front().items()) {
      const std::size_t width = widths[column];
      if (column++ == 0) {
        fmt::print("{:<{}}", text(key), width);
      } else {
        fmt::print("  {:>{}}", text(key), width);
      }
    }
    fmt::print("\n");
  };
  fmt::print("\n");
  line([](const std::string& key) { return key; });
  for (const BenchRow& row : rows) line([&](const std::string& key) { return cell(row.at(key)); });
}

}  // namespace zigzag::cli
