#include "cpu/target.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string>

#include <hwy/targets.h>

#include "cpu/bf16_support.h"
#include "zigzag/error.h"

namespace zigzag::cpu {
namespace {

struct Name {
  Target target;
  std::string_view name;
};

constexpr std::array<Name, 5> kNames = {{{Target::kBaseline, "baseline"},
                                         {Target::kAvx2, "avx2"},
                                         {Target::kAvx512, "avx512"},
                                         {Target::kAvx512Bf16, "avx512_bf16"},
                                         {Target::kAmx, "amx"}}};

std::vector<Target> find_targets() {
  std::vector<Target> targets = {Target::kBaseline};
#if HWY_ARCH_X86
  const std::int64_t has = hwy::SupportedTargets();
  if (has & HWY_AVX2) targets.push_back(Target::kAvx2);
  if (has & HWY_AVX3) {
    targets.push_back(Target::kAvx512);
    if (has_avx512_bf16()) targets.push_back(Target::kAvx512Bf16);
    if (has_avx512_bf16() && has_amx_bf16()) targets.push_back(Target::kAmx);
  }
#endif
  return targets;
}

}  // namespace

std::string_view target_name(Target target) {
  for (const Name& entry : kNames) {
    if (entry.target == target) return entry.name;
  }
  return "unknown";
}

const std::vector<Target>& supported_targets() {
  static const std::vector<Target> targets = find_targets();
  return targets;
}

Target selected_target() {
  const std::vector<Target>& targets = supported_targets();
  const char* text = std::getenv("ZIGZAG_CPU_TARGET");
  if (text == nullptr || *text == '\0') return targets.back();
  for (const Target target : targets) {
    if (target_name(target) == text) return target;
  }
  std::string allowed;
  for (const Target target : targets) {
    allowed += (allowed.empty() ? "" : ", ") + std::string(target_name(target));
  }
  const bool known = std::any_of(kNames.begin(), kNames.end(),
                                 [&](const Name& entry) { return entry.name == text; });
  throw InvalidArgument("ZIGZAG_CPU_TARGET is '" + std::string(text) + "', " +
                        (known ? "which this machine cannot run" : "which is no target") +
                        "; allowed here: " + allowed);
}

}  // namespace zigzag::cpu
