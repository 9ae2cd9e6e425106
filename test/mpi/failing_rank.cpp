#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>

#include <unistd.h>

#include "comm/mpi_environment.h"
#include "comm_model.h"
#include "zigzag/communicator.h"
#include "zigzag/error.h"

// failing_rank HOW WHERE: under mpirun, the last rank fails while the others exchange.
//   HOW    kill: SIGKILL; throw: an exception between exchanges; silent: never comes again
//   WHERE  gather, reduce, barrier or all_gather: where the others wait
// Every other rank prints what it got and exits as the command does: 3 for the environment.
namespace {

using zigzag::Communicator;
using zigzag::test::ExchangeCase;

void fail(const Communicator& communicator, const std::string& how) {
  if (how == "kill") {
    std::raise(SIGKILL);
  } else if (how == "throw") {
    communicator.abort("no space left for the gradient");
    throw std::runtime_error("no space left for the gradient");
  } else {
    std::this_thread::sleep_for(std::chrono::seconds(8));
    std::_Exit(3);
  }
}

void exchange(const Communicator& communicator, const std::string& where, const ExchangeCase& c) {
  if (where == "gather") {
    zigzag::test::check_gather(communicator, c);
  } else if (where == "reduce") {
    zigzag::test::check_reduce(communicator, c);
  } else if (where == "barrier") {
    communicator.barrier();
  } else {
    communicator.all_gather({});
    communicator.all_gather(std::vector<std::byte>(100));
  }
}

int run(const std::string& how, const std::string& where) {
  const zigzag::comm::MpiEnvironment mpi;
  const Communicator communicator = Communicator::mpi();
  const ExchangeCase c{.name = "failing", .lengths = {900, 300, 5}, .heads = 16, .head_dim = 64};
  try {
    for (int i = 0; i < 3; ++i) exchange(communicator, where, c);
    if (mpi.rank() == mpi.size() - 1) fail(communicator, how);
    for (int i = 0; i < 100000; ++i) exchange(communicator, where, c);
  } catch (const zigzag::EnvironmentError& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 4;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int code = run(argv[1], argv[2]);
  if (code != 0) zigzag::comm::linger_before_exit();
  return code;
}
