#pragma once

#include <string>
#include <vector>

#include "cuda/timeline.h"

namespace zigzag::cli {

/// One pass as its GPUs ran it.
struct PassTimeline {
  std::string pass;
  std::vector<cuda::TimelineSpan> spans;
};

/// Milliseconds of a pass in which no attention ran, of the rank where they are most.
double exposed_ms(const std::vector<cuda::TimelineSpan>& spans);

/// Writes the passes one after another as Chrome trace JSON (chrome://tracing, ui.perfetto.dev): a
/// process a rank, with a row for attention and one for exchange. Throws EnvironmentError.
void write_timeline(const std::string& file, const std::vector<PassTimeline>& passes);

}  // namespace zigzag::cli
