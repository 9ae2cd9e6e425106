#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <fmt/format.h>
#include <unistd.h>

#include "comm/mpi_environment.h"
#include "command.h"
#include "io/atomic_file.h"
#include "zigzag/error.h"
#include "zigzag/system.h"

namespace zigzag::cli {
namespace {

// Removes unfinished outputs, then dies of the same signal so that the caller's shell sees it.
void on_signal(int number) {
  io::unlink_temporary_files();
  std::signal(number, SIG_DFL);
  std::raise(number);
}

void install_handlers() {
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    // What the caller ignores (nohup) stays ignored.
    if (std::signal(number, on_signal) == SIG_IGN) std::signal(number, SIG_IGN);
  }
}

// One sentence for a mistake in the flags that the parser found.
std::string parse_sentence(const CLI::App& app, const CLI::ParseError& error) {
  std::string name = "zigzag";
  for (const CLI::App* command = &app; command != nullptr;) {
    const auto chosen = command->get_subcommands();
    command = chosen.empty() ? nullptr : chosen.front();
    if (command != nullptr) name += " " + command->get_name();
  }
  std::string what = error.what();
  const std::string subject = what.substr(0, what.find(':'));
  if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
    // What follows an unknown flag is its value as likely as not.
    const std::vector<std::string> unknown = app.remaining(true);
    const std::string first = unknown.empty() ? subject : unknown.front();
    if (name == "zigzag" && !first.starts_with("-")) {
      return fmt::format("there is no subcommand '{}'; plan, run, bench and doctor are there",
                         first);
    }
    what = fmt::format("unknown argument '{}'", first);
  } else if (dynamic_cast<const CLI::ArgumentMismatch*>(&error) != nullptr) {
    const bool none =
        what.find("missing") != std::string::npos || what.find("received 0") != std::string::npos;
    what = subject + (none ? " needs a value" : " is given more than once; once is allowed");
  }
  for (char& c : what) {
    if (c == '\n') c = ' ';
  }
  return fmt::format("{} ({} --help lists what is allowed)", what, name);
}

int command_line(int argc, char** argv) {
  CLI::App app("Exact attention over packed documents sharded over ranks.", "zigzag");
  app.set_version_flag("--version", fmt::format("zigzag {}", version()));
  app.require_subcommand(0, 1);
  app.get_formatter()->column_width(36);
  app.footer("zigzag <subcommand> --help explains each with examples.");
  Action action;
  add_plan(app, action);
  add_run(app, action);
  add_bench(app, action);
  add_doctor(app, action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& success) {
    return app.exit(success);
  } catch (const CLI::ParseError& error) {
    throw InvalidArgument(parse_sentence(app, error));
  }
  if (!action) {
    throw InvalidArgument(
        "a subcommand is missing; plan, run, bench and doctor are there (zigzag --help)");
  }
  const int code = action();
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    throw EnvironmentError("standard output cannot be written");
  }
  return code;
}

}  // namespace

// Every process of an MPI job reads the same flags and finds the same mistakes: one of them speaks.
bool speaks() {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"}) {
    const char* rank = std::getenv(name);
    if (rank != nullptr) return std::string_view(rank) == "0";
  }
  return true;
}

namespace {
std::atomic<bool> group_started{false};
}

void every_rank_speaks() { group_started = true; }

void say(const std::string& line) {
  // The mistake may be this process's alone (a file missing on its host). When rank 0 found it too,
  // it speaks at once, ends, and the launcher ends this process before it repeats the sentence.
  if (!group_started && !speaks()) std::this_thread::sleep_for(std::chrono::seconds(2));
  fmt::print(stderr, "{}\n", line);
}

}  // namespace zigzag::cli

int main(int argc, char** argv) {
  namespace cli = zigzag::cli;
  namespace comm = zigzag::comm;
  cli::install_handlers();
  const auto fail = [](int code, const std::string& sentence) {
    cli::say(fmt::format("zigzag: {}", sentence));
    comm::linger_before_exit();
    if (comm::mpi_has_failed()) {
      std::fflush(nullptr);
      std::_Exit(code);
    }
    return code;
  };
  try {
    const int code = cli::command_line(argc, argv);
    if (code != cli::kExitOk) comm::linger_before_exit();
    return code;
  } catch (const zigzag::InvalidArgument& error) {
    return fail(cli::kExitBadInput, error.what());
  } catch (const std::bad_alloc&) {
    return fail(cli::kExitEnvironment,
                "not enough memory; use fewer tokens, heads or a smaller head_dim");
  } catch (const std::exception& error) {
    return fail(cli::kExitEnvironment, error.what());
  }
}
