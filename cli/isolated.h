#pragma once

#include <functional>
#include <string>

namespace zigzag::cli {

/// What a piece of work that ran in a process of its own came to.
struct Isolated {
  bool finished = false;
  std::string text;  // what the work returned, or why it did not finish
};

/// Runs `work` in a child process, so that neither a crash nor a hang of it ends this one: it is
/// killed after `seconds`. Call it before this process starts threads.
Isolated run_isolated(const std::function<std::string()>& work, unsigned seconds);

}  // namespace zigzag::cli
