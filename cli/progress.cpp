#include "progress.h"

#include <algorithm>
#include <cstdio>

#include <fmt/format.h>
#include <unistd.h>

namespace zigzag::cli {

Progress::Progress(bool enabled) : enabled_(enabled && ::isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() { clear(); }

void Progress::show(const std::string& text) {
  if (!enabled_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  fmt::print(stderr, "\r{:<{}}", text, width_);
  std::fflush(stderr);
  width_ = text.size();
}

void Progress::show(const std::string& text, double fraction) {
  if (!enabled_) return;
  const auto now = std::chrono::steady_clock::now();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
  }
  show(fmt::format("{} {:3.0f}%", text, 100 * std::clamp(fraction, 0.0, 1.0)));
}

void Progress::clear() {
  if (!enabled_ || width_ == 0) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  fmt::print(stderr, "\r{:<{}}\r", "", width_);
  std::fflush(stderr);
  width_ = 0;
}

}  // namespace zigzag::cli
