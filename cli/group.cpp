#include "group.h"

#include <cstdlib>
#include <exception>
#include <new>
#include <system_error>
#include <thread>

#include <fmt/format.h>

#include "command.h"
#include "cuda/runtime.h"
#include "io/atomic_file.h"
#include "zigzag/error.h"
#include "zigzag/plan.h"

namespace zigzag::cli {
namespace {

constexpr std::int64_t kMostRanks = 4096;

// How much an exception says about the cause: a rank that stopped because of another says little.
int weight(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const CommunicationError&) {
    return 1;
  } catch (const Timeout&) {
    return 2;
  } catch (const InvalidArgument&) {
    return 4;
  } catch (...) {
    return 3;
  }
}

void rethrow_first_cause(const std::vector<std::exception_ptr>& errors) {
  std::exception_ptr best;
  for (const std::exception_ptr& error : errors) {
    if (error && (!best || weight(error) > weight(best))) best = error;
  }
  if (best) std::rethrow_exception(best);
}

// When MPI never returns, only another thread can still end this process in good order.
void die_with_words(const std::string& sentence) {
  io::unlink_temporary_files();
  say(fmt::format("zigzag: {}", sentence));
  comm::linger_before_exit();
  std::_Exit(kExitEnvironment);
}

std::string cuda_reason() {
  for (const Component& component : cuda::components()) {
    if (!component.available) return component.detail;
  }
  return "no GPU was found";
}

}  // namespace

std::int64_t launched_processes() {
  if (!comm::started_by_mpi_launcher()) return 1;
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"}) {
    const char* value = std::getenv(name);
    if (value != nullptr) return std::strtol(value, nullptr, 10);
  }
  return 1;
}

void GroupOptions::declare(Flags& flags) {
  flags.group("Ranks");
  flags
      .integer("--ranks", ranks, 1, kMostRanks,
               "Ranks that share the pack (under mpirun: its processes)")
      ->default_str("");
  flags.choice("--device", device, {"cpu", "cuda"}, "Where attention runs");
  flags.choice("--comm", comm, {"threads", "mpi", "nccl", "peer"},
               "How ranks exchange [threads; mpi under mpirun; on cuda peer, else nccl]");
}

void GroupOptions::declare_threads(Flags& flags) {
  flags.group("Ranks");
  flags.integer("--ranks", ranks, 1, kMostRanks, "Ranks that share the pack: threads of a process");
  flags.choice("--device", device, {"cpu", "cuda"}, "Where attention runs");
  flags.choice("--comm", comm, {"threads", "nccl", "peer"},
               "How ranks exchange [threads; on cuda peer, else nccl]");
}

void GroupOptions::declare_ranks(Flags& flags) {
  flags.group("Ranks");
  flags.integer("--ranks", ranks, 1, Plan::kMaxWorldSize, "Ranks that share the pack");
}

Group::Group(const GroupOptions& options) : device_(options.device), comm_(options.comm) {
  const std::int64_t launched = options.alone ? 1 : launched_processes();
  const bool gpu = device_ == "cuda";
  if (gpu && (comm_ == "threads" || comm_ == "mpi")) {
    throw InvalidArgument(fmt::format(
        "--comm {} exchanges host memory and --device is cuda; choose --comm peer or nccl", comm_));
  }
  if (!gpu && (comm_ == "peer" || comm_ == "nccl")) {
    throw InvalidArgument(fmt::format(
        "--comm {} exchanges GPU memory and --device is cpu; choose --comm threads or mpi", comm_));
  }
  if (comm_ == "threads" && launched > 1) {
    throw InvalidArgument(
        fmt::format("{} processes were started together, but --comm is threads; "
                    "choose --comm mpi or start one process",
                    launched));
  }
  if (comm_ == "mpi" && !comm::started_by_mpi_launcher()) {
    throw InvalidArgument(
        "--comm mpi needs a launcher; start it as 'mpirun -n N zigzag run --comm mpi ...', or use "
        "--comm threads");
  }
  const bool mpi = launched > 1 || comm_ == "mpi";
  if (mpi && options.ranks != 0 && options.ranks != launched) {
    throw InvalidArgument(
        fmt::format("--ranks is {}, but {} processes were started; leave it out "
                    "or give the same",
                    options.ranks, launched));
  }
  if (!mpi && options.ranks == 0) {
    throw InvalidArgument("--ranks is missing; give the number of ranks, at least 1");
  }
  size_ = static_cast<int>(mpi ? launched : options.ranks);
  if (gpu) {
    devices_ = cuda::device_count();
    if (devices_ == 0) throw DeviceError(fmt::format("--device cuda: {}", cuda_reason()));
    if (comm_.empty()) {
      std::vector<int> all;
      all.reserve(static_cast<std::size_t>(size_));
      for (int r = 0; r < size_; ++r) all.push_back(device_of(r).index);
      comm_ = cuda::peers_reach(all) ? "peer" : "nccl";
    }
  } else if (comm_.empty()) {
    comm_ = mpi ? "mpi" : "threads";
  }
  if (mpi) {
    mpi_ = std::make_unique<comm::MpiEnvironment>(die_with_words);
    every_rank_speaks();
    if (mpi_->size() != size_) {
      throw EnvironmentError(
          fmt::format("MPI has {} processes, but the launcher announced {}", mpi_->size(), size_));
    }
  }
}

Device Group::device_of(int rank) const {
  if (device_ != "cuda") return {};
  return {DeviceType::kCuda, rank % devices_};
}

void Group::run(const std::function<void(const Communicator&, Device)>& work) const {
  const auto guarded = [&](const Communicator& host, std::exception_ptr& error) {
    try {
      const Device device = device_of(host.rank());
      if (device.type == DeviceType::kCuda) cuda::use_device(device);
      if (comm_ == "peer") {
        work(Communicator::peer(host, device.index), device);
      } else if (comm_ == "nccl") {
        work(Communicator::nccl(host, device.index), device);
      } else {
        work(host, device);
      }
    } catch (const std::exception& failure) {
      error = std::current_exception();
      host.abort(failure.what());
    } catch (...) {
      error = std::current_exception();
      host.abort("an unknown failure");
    }
  };
  if (mpi_ != nullptr) {
    std::vector<std::exception_ptr> errors(1);
    guarded(Communicator::mpi(), errors[0]);
    rethrow_first_cause(errors);
    return;
  }
  const std::vector<Communicator> communicators = Communicator::threads(size_);
  std::vector<std::exception_ptr> errors(communicators.size());
  std::vector<std::thread> threads;
  std::string refused;
  threads.reserve(communicators.size());
  for (std::size_t r = 0; r < communicators.size() && refused.empty(); ++r) {
    try {
      threads.emplace_back([&, r] { guarded(communicators[r], errors[r]); });
    } catch (const std::system_error& error) {
      refused = fmt::format("the system refused a thread for rank {} of {}: {}; use fewer ranks", r,
                            size_, error.code().message());
      communicators[r].abort(refused);
    }
  }
  for (std::thread& thread : threads) thread.join();
  if (!refused.empty()) throw EnvironmentError(refused);
  rethrow_first_cause(errors);
}

}  // namespace zigzag::cli
