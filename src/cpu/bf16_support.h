#pragma once

namespace zigzag::cpu {

/// True when this machine and its operating system run AVX512_BF16 instructions.
bool has_avx512_bf16();

/// True when this machine has AMX tiles of bfloat16 and the operating system granted this process
/// their use, for which the first call asks.
bool has_amx_bf16();

}  // namespace zigzag::cpu
