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

/// False in processes of an MPI job other than rank 0, which say nothing.
bool speaks();

/// Writes one line to stderr, unless this is a process of an MPI job other than rank 0.
void say(const std::string& line);

}  // namespace zigzag::cli
