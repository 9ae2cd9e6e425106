#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/mpi_environment.h"
#include "flags.h"
#include "zigzag/communicator.h"
#include "zigzag/tensor.h"

namespace zigzag::cli {

/// Where ranks run and how they exchange.
struct GroupOptions {
  std::int64_t ranks = 0;
  std::string device = "cpu";
  std::string comm;  // empty: chosen by device
  /// Threads of this process even when a launcher started several.
  bool alone = false;

  /// Declares --ranks, --device and --comm of ranks that are threads, or processes of mpirun.
  void declare(Flags& flags);
  /// Declares them for ranks that are threads of this process and nothing else.
  void declare_threads(Flags& flags);
  /// Declares --ranks for what one process computes for all ranks.
  void declare_ranks(Flags& flags);
};

/// Processes that mpirun or srun started together; 1 without a launcher.
std::int64_t launched_processes();

/// The ranks of a command: W threads of this process, or this process as one of an MPI job.
class Group {
 public:
  /// Throws InvalidArgument when the options contradict each other or how the command was started,
  /// EnvironmentError when the device or the transport is missing.
  explicit Group(const GroupOptions& options);

  /// Number of ranks.
  int size() const { return size_; }
  /// "threads", "mpi", "peer" or "nccl".
  const std::string& comm() const { return comm_; }
  const std::string& device() const { return device_; }
  /// True in the one process that prints and writes.
  bool is_root() const { return mpi_ == nullptr || mpi_->rank() == 0; }
  /// True when ranks are processes of their own.
  bool is_mpi() const { return mpi_ != nullptr; }
  /// The device of a rank: GPUs are dealt out in turn.
  Device device_of(int rank) const;

  /// Runs `work` for every rank of this process, each on a thread of its own, or on this thread
  /// under MPI. When ranks throw, tells the others and rethrows the exception that says most.
  void run(const std::function<void(const Communicator&, Device)>& work) const;

 private:
  std::string device_;
  std::string comm_;
  int size_ = 1;
  int devices_ = 0;
  std::unique_ptr<comm::MpiEnvironment> mpi_;
};

}  // namespace zigzag::cli
