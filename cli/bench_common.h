#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "group.h"
#include "pack_options.h"

namespace zigzag::cli {

/// The option set that all benchmarks share; only attention has a device and an exchange.
struct BenchOptions {
  PackOptions pack;
  ShapeOptions shape;
  MaskOptions mask;
  GroupOptions group;
  std::string threads;  // "1,2"; empty: one thread and all cores
  std::int64_t repeat = 9;
  bool reference = false;
  bool json = false;
  std::string timeline;  // attention on GPUs: the file to write

  /// Declares the flags; the defaults are what this object holds. `exchange`: with --device and
  /// --comm.
  void declare(Flags& flags, bool exchange);
  /// The thread counts. Throws InvalidArgument.
  std::vector<int> thread_counts() const;
  /// The pack: from the flags, or `fallback` lengths when none is given.
  std::vector<std::int64_t> cu_seqlens(const std::string& fallback) const;
};

/// Times of one measured thing, in seconds.
class Times {
 public:
  void add(double seconds) { seconds_.push_back(seconds); }
  bool empty() const { return seconds_.empty(); }
  const std::vector<double>& all() const { return seconds_; }
  double median() const { return quantile(0.5); }
  double best() const { return quantile(0); }
  /// Interquartile range divided by the median.
  double spread() const;

 private:
  double quantile(double q) const;
  std::vector<double> seconds_;
};

/// The median over repetitions of base / measured, paired in time: what a shared machine does to
/// one it does to the other.
double paired_ratio(const Times& base, const Times& measured);

/// Seconds that `work` takes.
double timed(const std::function<void()>& work);

/// Makes operations use `threads` threads (ZIGZAG_NUM_THREADS).
void use_threads(int threads);

/// One line of a result; keys are the columns.
using BenchRow = nlohmann::ordered_json;

/// Prints rows as a table (a column a key) or as one JSON object with `head` first.
void print_rows(const nlohmann::ordered_json& head, const std::vector<BenchRow>& rows, bool json);

int bench_layout(const BenchOptions& options);
int bench_attention(const BenchOptions& options);
int bench_plan(const BenchOptions& options);

}  // namespace zigzag::cli
