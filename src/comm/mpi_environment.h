#pragma once

#include <functional>
#include <memory>
#include <string>

namespace zigzag::comm {

class MpiGuard;

/// MPI for the life of a command, on the main thread. The library itself never initialises MPI;
/// this is for programs. Throws EnvironmentError when the library was built without MPI.
///
/// The destructor finalises MPI unless the group has failed: then finalising would wait for dead
/// peers, and the program should end by itself. While the object lives, SIGTERM, with which
/// mpirun ends a job when one process died, does not kill the process: a rank that waits or comes
/// to its next exchange gets a CommunicationError instead and can say what happened. SIGPIPE, which
/// a dead peer's connection raises, is ignored.
///
/// `last_words` is for calls of MPI that never return (comm/mpi_guard.h), MPI_Finalize included. It
/// is called on another thread and should print its sentence and end the process with _exit(3).
class MpiEnvironment {
 public:
  using LastWords = std::function<void(const std::string&)>;
  explicit MpiEnvironment(LastWords last_words);
  ~MpiEnvironment();
  MpiEnvironment(const MpiEnvironment&) = delete;
  MpiEnvironment& operator=(const MpiEnvironment&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }

 private:
  int rank_ = 0;
  int size_ = 1;
  std::unique_ptr<MpiGuard> guard_;
};

/// True when this process was started by mpirun or srun as one of several, as far as the
/// environment tells; MPI need not be initialised.
bool started_by_mpi_launcher();

/// To call between a failing command's last words and its exit. The first process that ends with a
/// code other than 0 makes mpirun end the others; this leaves them half a second for their words.
/// Returns at once in a process that no MPI launcher started.
void linger_before_exit();

/// True when an exchange over MPI has failed. MPI is not finalised then, and its exit handlers may
/// wait for ever: a program should leave by std::_Exit.
bool mpi_has_failed();

/// Whether the library has MPI, and which: "Open MPI 4.1.4", or how to build it.
bool has_mpi();
std::string mpi_description();

namespace detail {
/// The signal that asks this process to end, once it came; 0 before. Set by MpiEnvironment.
int termination_signal();
/// From here on MpiEnvironment does not finalise.
void mark_mpi_failed();
/// How long MPI_Finalize may take before the guard of MpiEnvironment speaks.
void set_mpi_limit(double seconds);
}  // namespace detail

}  // namespace zigzag::comm
