#include "comm/mpi_environment.h"

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <mpi.h>

#include "comm/mpi_guard.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

std::atomic<int> g_termination_signal{0};
static_assert(std::atomic<int>::is_always_lock_free);
std::atomic<bool> g_failed{false};
// The deadline of the last group, for what is waited for without one.
std::atomic<double> g_limit{300};

extern "C" void note_termination(int signal) { g_termination_signal = signal; }

}  // namespace

MpiEnvironment::MpiEnvironment(LastWords last_words) {
  int initialised = 0;
  MPI_Initialized(&initialised);
  if (initialised != 0) throw EnvironmentError("MPI is already initialised in this process");
  int provided = 0;
  if (const int code = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
      code != MPI_SUCCESS) {
    throw EnvironmentError(fmt::format("MPI_Init_thread failed with code {}", code));
  }
  if (provided < MPI_THREAD_FUNNELED) {
    throw EnvironmentError("this MPI offers only MPI_THREAD_SINGLE; MPI_THREAD_FUNNELED is needed");
  }
  MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
  MPI_Comm_size(MPI_COMM_WORLD, &size_);
  struct sigaction action {};
  action.sa_handler = note_termination;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  sigaction(SIGTERM, &action, nullptr);
  // Open MPI writes to the connection of a peer that died, which must not end this process too.
  std::signal(SIGPIPE, SIG_IGN);
  if (last_words) guard_ = std::make_unique<MpiGuard>(std::move(last_words));
}

MpiEnvironment::~MpiEnvironment() {
  int finalised = 0;
  MPI_Finalized(&finalised);
  if (finalised != 0 || g_failed) return;
  // It waits for all processes of the job, of which one may have died since the last exchange.
  std::vector<int> others;
  for (int r = 0; r < size_; ++r) {
    if (r != rank_) others.push_back(r);
  }
  const InsideMpi inside(rank_, "MPI_Finalize", others, g_limit);
  MPI_Finalize();
}

bool started_by_mpi_launcher() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS"}) {
    if (std::getenv(name) != nullptr) return true;
  }
  return false;
}

void linger_before_exit() {
  if (!started_by_mpi_launcher()) return;
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
}

bool mpi_has_failed() { return g_failed; }

bool has_mpi() { return true; }

std::string mpi_description() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  if (MPI_Get_library_version(text, &length) != MPI_SUCCESS) return "MPI of unknown version";
  const std::string whole(text, static_cast<std::size_t>(length));
  // "Open MPI v4.1.4, package: ..., ident: ...": the first part says it all.
  return whole.substr(0, whole.find_first_of(",\n"));
}

namespace detail {

int termination_signal() { return g_termination_signal; }

void mark_mpi_failed() { g_failed = true; }

void set_mpi_limit(double seconds) { g_limit = seconds; }

}  // namespace detail

}  // namespace zigzag::comm
