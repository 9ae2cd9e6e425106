#include <exception>
#include <tuple>

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "tensor.h"

namespace nb = nanobind;

NB_MODULE(_core, module) {
  module.doc() = "Bindings of the C++ library zigzag, without logic of their own.";
  // Objects in module globals outlive the check at exit, which would call them leaks.
  nb::set_leak_warnings(false);
  // The last translator registered is asked first, so derived types come after their bases.
  nb::exception<zigzag::EnvironmentError>(module, "EnvironmentFailure", PyExc_RuntimeError);
  nb::exception<zigzag::CommunicationError>(module, "CommunicationError", PyExc_RuntimeError);
  nb::exception<zigzag::DeviceError>(module, "DeviceError", PyExc_RuntimeError);
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const zigzag::Timeout& timeout) {
      PyErr_SetString(PyExc_TimeoutError, timeout.what());
    } catch (const zigzag::InvalidArgument& invalid) {
      PyErr_SetString(PyExc_ValueError, invalid.what());
    }
  });
  zigzag::python::bind_tensor(module);
  zigzag::python::bind_plan(module);
  zigzag::python::bind_communicator(module);
  zigzag::python::bind_operations(module);
  module.def("version", [] { return std::string(zigzag::version()); });
  module.def("components", [] {
    std::vector<std::tuple<std::string, bool, std::string>> rows;
    for (const zigzag::Component& part : zigzag::components()) {
      rows.emplace_back(part.name, part.available, part.detail);
    }
    return rows;
  });
}
