#pragma once

#include <chrono>
#include <mutex>
#include <string>

namespace zigzag::cli {

/// One line of progress on stderr, when that is a terminal; elsewhere it prints nothing.
class Progress {
 public:
  /// `enabled`: false keeps it silent on a terminal too.
  explicit Progress(bool enabled);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Replaces the line. Safe from several threads.
  void show(const std::string& text);
  /// Replaces the line by "text 42%", at most ten times a second.
  void show(const std::string& text, double fraction);
  /// Removes the line.
  void clear();

 private:
  bool enabled_;
  std::mutex mutex_;
  std::size_t width_ = 0;
  std::chrono::steady_clock::time_point last_{};
};

}  // namespace zigzag::cli
