#include "zigzag/communicator.h"

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <fmt/format.h>

#include "comm/factories.h"
#include "comm/transport.h"
#include "zigzag/error.h"

namespace zigzag {

Communicator::Communicator(std::shared_ptr<comm::Transport> transport)
    : transport_(std::move(transport)) {
  if (!transport_) throw InvalidArgument("a communicator needs a transport; null was given");
}

Communicator Communicator::self() { return Communicator(comm::make_self_transport()); }

std::vector<Communicator> Communicator::threads(int size) {
  if (size < 1 || size > Plan::kMaxWorldSize) {
    throw InvalidArgument(fmt::format("a group of threads was given size {}; it must be 1 to {}",
                                      size, Plan::kMaxWorldSize));
  }
  std::vector<Communicator> result;
  result.reserve(static_cast<std::size_t>(size));
  for (auto& transport : comm::make_threads_transports(size, timeout_seconds())) {
    result.emplace_back(Communicator(std::move(transport)));
  }
  return result;
}

Communicator Communicator::mpi(void* mpi_comm) {
  return Communicator(comm::make_mpi_transport(mpi_comm, timeout_seconds()));
}

Communicator Communicator::callback(CallbackCollectives collectives) {
  return Communicator(comm::make_callback_transport(std::move(collectives)));
}

int Communicator::rank() const { return transport_->rank(); }

int Communicator::size() const { return transport_->size(); }

std::string_view Communicator::name() const { return transport_->name(); }

void Communicator::barrier() const { transport_->barrier(); }

std::vector<std::byte> Communicator::all_gather(std::span<const std::byte> bytes) const {
  std::vector<std::byte> result(bytes.size() * static_cast<std::size_t>(size()));
  transport_->all_gather(bytes, result);
  return result;
}

void Communicator::abort(std::string_view reason) const noexcept { transport_->abort(reason); }

double timeout_seconds() {
  constexpr double kDefault = 300;
  const char* variable = std::getenv("ZIGZAG_TIMEOUT_S");
  if (variable == nullptr || *variable == '\0') return kDefault;
  const std::string_view text(variable);
  double seconds = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seconds);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(seconds) ||
      seconds <= 0) {
    throw InvalidArgument(fmt::format(
        "ZIGZAG_TIMEOUT_S is '{}'; it must be a positive number of seconds, such as 300 or 0.5",
        text));
  }
  return seconds;
}

}  // namespace zigzag
