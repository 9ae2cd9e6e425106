#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace zigzag::cuda {

/// What a stretch of a stream was spent on.
enum class Lane : unsigned char { kAttention, kExchange };

/// One piece of a rank's work on a GPU: microseconds since the timeline was started.
struct TimelineSpan {
  std::string name;
  int rank = 0;
  int device = 0;
  Lane lane = Lane::kAttention;
  double start = 0;
  double end = 0;
};

/// Starts to record what the library gives to the GPUs of this process; costs two events a piece of
/// work while it is on, and nothing else. Throws DeviceError.
void start_timeline();

/// Waits for the recorded work and returns it in the order in which it was given; recording is off
/// from here on. The clocks of different GPUs agree within some 10 us.
std::vector<TimelineSpan> stop_timeline();

/// Records the work given to `stream` while this lives.
class TimelineScope {
 public:
  TimelineScope(std::string_view name, int rank, int device, Lane lane, void* stream);
  ~TimelineScope();
  TimelineScope(const TimelineScope&) = delete;
  TimelineScope& operator=(const TimelineScope&) = delete;

 private:
  int index_ = -1;
  void* stream_;
};

}  // namespace zigzag::cuda
