#pragma once

#include <stdexcept>
#include <string>

#include <CLI/CLI.hpp>

#include "flags.h"

namespace zigzag::cli {

/// Exit codes of the command (interface.md).
inline constexpr int kExitOk = 0;
inline constexpr int kExitCheckFailed = 1;
inline constexpr int kExitBadInput = 2;
inline constexpr int kExitEnvironment = 3;

/// Each adds its subcommand to the app and, when the caller chose it, sets `action`.
void add_plan(CLI::App& app, Action& action);
void add_run(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);
void add_doctor(CLI::App& app, Action& action);

/// False in processes of an MPI job other than rank 0, which print no results.
bool speaks();

/// To call once the ranks of an MPI job are one group: from then on a failure is each rank's own.
void every_rank_speaks();

/// Writes one line to stderr. Before the ranks of an MPI job are one group, processes other than
/// rank 0 wait, so that a mistake that all of them find is said once.
void say(const std::string& line);

}  // namespace zigzag::cli
