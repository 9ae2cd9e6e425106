#pragma once

#include "cpu/kernel.h"

namespace zigzag::cpu {

/// The bfloat16 kernels of Target::kAvx512Bf16 and Target::kAmx; null when the build is not for
/// x86-64.
const KernelSet* avx512_bf16_kernels();
const KernelSet* amx_kernels();

}  // namespace zigzag::cpu
