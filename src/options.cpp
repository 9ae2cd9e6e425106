#include "zigzag/options.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "zigzag/error.h"

namespace zigzag {

namespace {

constexpr int kUnset = -1;

/// A Kernels value, or kUnset for the environment's.
std::atomic<int>& chosen_kernels() {
  static std::atomic<int> value{kUnset};
  return value;
}

}  // namespace

std::string_view kernels_name(Kernels kernels) {
  return kernels == Kernels::kFused ? "fused" : "reference";
}

Kernels parse_kernels(std::string_view name) {
  if (name == "fused") return Kernels::kFused;
  if (name == "reference") return Kernels::kReference;
  throw InvalidArgument("kernels is '" + std::string(name) + "'; it must be fused or reference");
}

Kernels default_kernels() {
  const int value = chosen_kernels().load();
  if (value != kUnset) return static_cast<Kernels>(value);
  const char* name = std::getenv("ZIGZAG_KERNELS");
  if (name == nullptr || *name == '\0') return Kernels::kFused;
  try {
    return parse_kernels(name);
  } catch (const InvalidArgument&) {
    throw InvalidArgument("ZIGZAG_KERNELS is '" + std::string(name) +
                          "'; it must be fused or reference");
  }
}

void set_default_kernels(std::optional<Kernels> kernels) {
  chosen_kernels().store(kernels ? static_cast<int>(*kernels) : kUnset);
}

}  // namespace zigzag
