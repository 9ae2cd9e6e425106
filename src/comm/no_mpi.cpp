#include <string>

#include "comm/factories.h"
#include "comm/mpi_environment.h"
#include "comm/mpi_guard.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

const char* const kHow =
    "this build has no MPI; install an MPI (apt-get install libopenmpi-dev openmpi-bin) and "
    "configure with -DZIGZAG_MPI=ON";

}  // namespace

std::shared_ptr<Transport> make_mpi_transport(void* /*mpi_comm*/, double /*timeout*/) {
  throw CommunicationError(kHow);
}

MpiEnvironment::MpiEnvironment(LastWords /*last_words*/) { throw EnvironmentError(kHow); }

MpiEnvironment::~MpiEnvironment() = default;

MpiGuard::MpiGuard(std::function<void(const std::string&)> /*last_words*/) {}

MpiGuard::~MpiGuard() = default;

bool started_by_mpi_launcher() { return false; }

void linger_before_exit() {}

bool mpi_has_failed() { return false; }

bool has_mpi() { return false; }

std::string mpi_description() { return kHow; }

namespace detail {

int termination_signal() { return 0; }

void mark_mpi_failed() {}

void set_mpi_limit(double /*seconds*/) {}

}  // namespace detail

}  // namespace zigzag::comm
