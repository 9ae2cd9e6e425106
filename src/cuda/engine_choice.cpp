#include "cuda/engine_choice.h"

#include <cstdlib>
#include <string>

#include "zigzag/error.h"

namespace zigzag::cuda {

namespace {

std::string chosen() {
  // Asked anew in every call, so that tests can change it.
  const char* text = std::getenv("ZIGZAG_GPU_ENGINE");
  return text == nullptr || *text == '\0' ? "auto" : text;
}

}  // namespace

bool engine_allowed(Engine engine) {
  const std::string name = chosen();
  if (name == "auto" || name == "hopper") return true;
  if (name == "cudnn") return engine != Engine::kHopper;
  if (name == "fma") return engine == Engine::kFma;
  throw InvalidArgument("ZIGZAG_GPU_ENGINE is auto, hopper, cudnn or fma, not '" + name + "'");
}

}  // namespace zigzag::cuda
