#include "timeline.h"

#include <algorithm>
#include <fstream>
#include <map>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "zigzag/error.h"

namespace zigzag::cli {
namespace {

// Between one pass and the next in the file, so that they can be told apart.
constexpr double kPauseUs = 100;

const char* lane_name(cuda::Lane lane) {
  return lane == cuda::Lane::kAttention ? "attention" : "exchange";
}

// Microseconds of the spans' union, and of their extent from first to last.
struct SpanTimes {
  double busy = 0;
  double extent = 0;
};

SpanTimes span_times(std::vector<cuda::TimelineSpan> spans) {
  SpanTimes times;
  if (spans.empty()) return times;
  std::sort(
      spans.begin(), spans.end(),
      [](const cuda::TimelineSpan& a, const cuda::TimelineSpan& b) { return a.start < b.start; });
  double until = spans.front().start;
  for (const cuda::TimelineSpan& span : spans) {
    times.busy += std::max(0.0, span.end - std::max(until, span.start));
    until = std::max(until, span.end);
  }
  times.extent = until - spans.front().start;
  return times;
}

}  // namespace

double exposed_ms(const std::vector<cuda::TimelineSpan>& spans) {
  std::map<int, std::vector<cuda::TimelineSpan>> all;
  std::map<int, std::vector<cuda::TimelineSpan>> attention;
  for (const cuda::TimelineSpan& span : spans) {
    all[span.rank].push_back(span);
    if (span.lane == cuda::Lane::kAttention) attention[span.rank].push_back(span);
  }
  double most = 0;
  for (const auto& [rank, own] : all) {
    const double exposed = span_times(own).extent - span_times(attention[rank]).busy;
    most = std::max(most, exposed);
  }
  return most / 1e3;
}

void write_timeline(const std::string& file, const std::vector<PassTimeline>& passes) {
  nlohmann::ordered_json events = nlohmann::ordered_json::array();
  std::map<int, int> devices;
  double origin = 0;
  for (const PassTimeline& pass : passes) {
    if (pass.spans.empty()) continue;
    double first = pass.spans.front().start;
    double last = pass.spans.front().end;
    for (const cuda::TimelineSpan& span : pass.spans) {
      first = std::min(first, span.start);
      last = std::max(last, span.end);
    }
    for (const cuda::TimelineSpan& span : pass.spans) {
      devices[span.rank] = span.device;
      events.push_back({{"name", span.name},
                        {"cat", pass.pass},
                        {"ph", "X"},
                        {"ts", origin + span.start - first},
                        {"dur", span.end - span.start},
                        {"pid", span.rank},
                        {"tid", static_cast<int>(span.lane)}});
    }
    origin += last - first + kPauseUs;
  }
  for (const auto& [rank, device] : devices) {
    events.push_back({{"name", "process_name"},
                      {"ph", "M"},
                      {"pid", rank},
                      {"args", {{"name", fmt::format("rank {} on cuda:{}", rank, device)}}}});
    for (const cuda::Lane lane : {cuda::Lane::kAttention, cuda::Lane::kExchange}) {
      events.push_back({{"name", "thread_name"},
                        {"ph", "M"},
                        {"pid", rank},
                        {"tid", static_cast<int>(lane)},
                        {"args", {{"name", lane_name(lane)}}}});
    }
  }
  std::ofstream out(file);
  out << nlohmann::ordered_json{{"traceEvents", events}, {"displayTimeUnit", "ms"}}.dump(1) << '\n';
  out.close();
  if (!out) throw EnvironmentError(fmt::format("the timeline cannot be written to '{}'", file));
}

}  // namespace zigzag::cli
