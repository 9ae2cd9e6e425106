#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace zigzag::cpu {

/// An instruction set that kernels are compiled for, weakest first.
enum class Target : std::uint8_t {
  kBaseline,    // what every machine of this architecture has
  kAvx2,        // AVX2 with FMA
  kAvx512,      // AVX-512 F, BW, CD, DQ, VL
  kAvx512Bf16,  // and its bfloat16 dot product
  kAmx,         // and tiles of bfloat16
};

/// "baseline", "avx2", "avx512", "avx512_bf16" or "amx".
std::string_view target_name(Target target);

/// The targets that this machine and build can run, weakest first; never empty.
const std::vector<Target>& supported_targets();

/// The target that kernels run on: `ZIGZAG_CPU_TARGET`, else the strongest supported one. Throws
/// InvalidArgument when the variable holds another word or a target that this machine lacks.
Target selected_target();

}  // namespace zigzag::cpu
