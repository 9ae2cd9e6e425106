#include "zigzag/system.h"

#include <exception>
#include <functional>
#include <string>

#include "cpu/target.h"
#include "cuda/runtime.h"
#include "zigzag/version.h"
#include "zigzag_build_info.h"

#define ZIGZAG_TEXT_OF(x) #x
#define ZIGZAG_TEXT(x) ZIGZAG_TEXT_OF(x)

namespace zigzag {
namespace {

// One component whose text comes from code that may fail.
Component probe(std::string name, const std::function<std::string()>& detail) {
  try {
    std::string text = detail();
    return {std::move(name), true, std::move(text)};
  } catch (const std::exception& error) {
    return {std::move(name), false, error.what()};
  } catch (...) {
    return {std::move(name), false, "failed for an unknown reason"};
  }
}

std::string cpu_detail() {
  std::string text = "kernels run on " + std::string(cpu::target_name(cpu::selected_target()));
  text += "; this machine supports";
  for (const cpu::Target target : cpu::supported_targets()) {
    text += ' ';
    text += cpu::target_name(target);
  }
  return text;
}

}  // namespace

std::string_view version() {
  return ZIGZAG_TEXT(ZIGZAG_VERSION_MAJOR) "." ZIGZAG_TEXT(ZIGZAG_VERSION_MINOR) "." ZIGZAG_TEXT(
      ZIGZAG_VERSION_PATCH);
}

std::vector<Component> components() {
  std::vector<Component> all;
  all.push_back(probe("CPU", cpu_detail));
  all.push_back(probe("threads", [] {
    const int threads = num_threads();
    return std::to_string(threads) + (threads == 1 ? " thread" : " threads") +
           " for operations on the CPU (ZIGZAG_NUM_THREADS)";
  }));
  all.push_back({"MPI", build_info::kMpi, build_info::kMpiReason});
  try {
    for (Component& component : cuda::components()) all.push_back(std::move(component));
  } catch (const std::exception& error) {
    all.push_back({"CUDA", false, error.what()});
  }
  return all;
}

}  // namespace zigzag
