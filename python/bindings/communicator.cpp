#include <cstring>
#include <memory>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "comm/agree.h"
#include "comm/choose.h"
#include "comm/shared_messages.h"
#include "cuda/runtime.h"
#include "gil.h"
#include "run.h"

namespace zigzag::python {
namespace {

using Bytes = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>;

Bytes writable(void* data, std::size_t size) {
  return Bytes(static_cast<std::uint8_t*>(data), {size}, nb::none());
}

// The callee only reads it; NumPy sees a writable array so that torch.from_numpy takes it.
Bytes readable(const void* data, std::size_t size) {
  return writable(const_cast<void*>(data), size);  // NOLINT
}

std::size_t sum(std::span<const std::int64_t> values) {
  std::int64_t total = 0;
  for (const std::int64_t value : values) {
    total += value;
  }
  return static_cast<std::size_t>(total);
}

/// A Python object that may be released on any thread.
std::shared_ptr<nb::object> share(nb::object object) {
  return {new nb::object(std::move(object)), [](nb::object* owned) {
            if (Py_IsInitialized() == 0) {
              return;  // the interpreter is gone, and its objects with it
            }
            const GilHeld acquire;
            delete owned;
          }};
}

Communicator make_callback(int rank, int size, nb::callable all_gather, nb::callable all_to_all,
                           const std::optional<nb::callable>& abort) {
  CallbackCollectives collectives;
  collectives.rank = rank;
  collectives.size = size;
  collectives.all_gather = [call = share(std::move(all_gather)), size](
                               const void* in, std::size_t bytes, void* out) {
    call_python([&] {
      (*call)(nb::cast(readable(in, bytes), nb::rv_policy::reference),
              nb::cast(writable(out, bytes * static_cast<std::size_t>(size)),
                       nb::rv_policy::reference));
    });
  };
  collectives.all_to_all = [call = share(std::move(all_to_all))](
                               const void* send, std::span<const std::int64_t> send_bytes,
                               void* receive, std::span<const std::int64_t> receive_bytes) {
    call_python([&] {
      (*call)(nb::cast(readable(send, sum(send_bytes)), nb::rv_policy::reference),
              std::vector<std::int64_t>(send_bytes.begin(), send_bytes.end()),
              nb::cast(writable(receive, sum(receive_bytes)), nb::rv_policy::reference),
              std::vector<std::int64_t>(receive_bytes.begin(), receive_bytes.end()));
    });
  };
  if (abort) {
    collectives.abort = [call = share(*abort)](std::string_view reason) {
      call_python([&] { (*call)(std::string(reason)); });
    };
  }
  return Communicator::callback(std::move(collectives));
}

nb::bytes all_gather(const Communicator& self, const nb::bytes& data) {
  const std::vector<std::byte> in(static_cast<const std::byte*>(data.data()),
                                  static_cast<const std::byte*>(data.data()) + data.size());
  auto out = std::make_shared<std::vector<std::byte>>();
  run_operation([self, in, out] { *out = self.all_gather(in); }, self);
  return nb::bytes(out->data(), out->size());
}

// Takes part in the agreement before an exchange with an error, so that the other ranks of the call
// get a sentence and not a hang. Always throws.
void refuse(const Communicator& communicator, const std::string& message) {
  run_operation(
      [communicator, message] {
        comm::Agreement agreement;
        agreement.error = message;
        comm::agree(communicator.transport(), agreement);
        throw InvalidArgument(message);  // a group of one rank agrees with itself
      },
      communicator);
}

// GPU groups: the host's messages go through `bootstrap`, whose functions may be Python's.
Communicator on_gpu(Communicator (*make)(const Communicator&, int), const Communicator& bootstrap,
                    int device) {
  std::optional<Communicator> made;
  run_operation([&] { made = make(bootstrap, device); }, bootstrap, {DeviceType::kCuda, device});
  return *made;
}

std::pair<std::string, std::string> choose(const Communicator& bootstrap, int device,
                                           const std::string& wanted) {
  comm::ExchangeChoice choice;
  run_operation([&] { choice = comm::choose_exchange(bootstrap.transport(), device, wanted); },
                bootstrap, {DeviceType::kCuda, device});
  return {choice.name, choice.reason};
}

Communicator share_messages(const Communicator& base) {
  return comm::share_messages(base, timeout_seconds(), [] {
    call_python([] {
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    });
  });
}

void synchronize(int device) {
  const GilReleased release;
  cuda::synchronize({DeviceType::kCuda, device}, nullptr);
}

}  // namespace

void bind_communicator(nb::module_& module) {
  nb::class_<Communicator>(module, "Communicator",
                           "A group of ranks; zigzag_attention.Communicator wraps it.")
      .def_static("self", &Communicator::self)
      .def_static("threads", &Communicator::threads, nb::arg("size"))
      .def_static(
          "mpi",
          [](std::uintptr_t address) {
            return Communicator::mpi(reinterpret_cast<void*>(address));  // NOLINT
          },
          nb::arg("address") = 0)
      .def_static("callback", &make_callback, nb::arg("rank"), nb::arg("size"),
                  nb::arg("all_gather"), nb::arg("all_to_all"),
                  nb::arg("abort").none() = nb::none())
      .def_static(
          "peer",
          [](const Communicator& bootstrap, int device) {
            return on_gpu(&Communicator::peer, bootstrap, device);
          },
          nb::arg("bootstrap"), nb::arg("device"))
      .def_static(
          "nccl",
          [](const Communicator& bootstrap, int device) {
            return on_gpu(&Communicator::nccl, bootstrap, device);
          },
          nb::arg("bootstrap"), nb::arg("device"))
      .def_prop_ro("rank", &Communicator::rank)
      .def_prop_ro("size", &Communicator::size)
      .def_prop_ro("name", [](const Communicator& self) { return std::string(self.name()); })
      .def("barrier",
           [](const Communicator& self) { run_operation([self] { self.barrier(); }, self); })
      .def("all_gather", &all_gather, nb::arg("data"))
      .def(
          "abort",
          [](const Communicator& self, const std::string& reason) {
            const GilReleased release;
            self.abort(reason);
          },
          nb::arg("reason"));
  module.def("refuse", &refuse, nb::arg("communicator"), nb::arg("message"));
  module.def("choose_exchange", &choose, nb::arg("bootstrap"), nb::arg("device"),
             nb::arg("wanted"));
  module.def("share_messages", &share_messages, nb::arg("base"));
  module.def("synchronize", &synchronize, nb::arg("device"));
  module.def("timeout_seconds", &timeout_seconds);
}

}  // namespace zigzag::python
