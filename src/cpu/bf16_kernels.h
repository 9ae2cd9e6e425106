#pragma once

#include "cpu/kernel.h"

namespace zigzag::cpu {

/// The bfloat16 kernels of Target::kAvx512Bf16 and Target::kAmx; null when the build is not for
/// x86-64.
const KernelSet* avx512_bf16_kernels();
const KernelSet* amx_kernels();

/// Their elementwise functions, likewise.
const ElementwiseSet* avx512_bf16_elementwise();
const ElementwiseSet* amx_elementwise();

}  // namespace zigzag::cpu
