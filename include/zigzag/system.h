#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace zigzag {

/// The library's version, "major.minor.patch".
std::string_view version();

/// One line of `zigzag doctor`: a part, whether it can be used, and what was found or how to get
/// it.
struct Component {
  std::string name;
  bool available = false;
  std::string detail;
};

/// What this build and machine offer: CPU targets, threads, MPI, CUDA, cuDNN, NCCL, peer memory.
/// Never throws: a broken part is a Component that says so.
std::vector<Component> components();

/// Threads that operations on the CPU use: `ZIGZAG_NUM_THREADS`, else the cores this process may
/// run on. Throws InvalidArgument when the variable is not a positive number.
int num_threads();

}  // namespace zigzag
