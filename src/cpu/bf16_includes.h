#pragma once

// What the bfloat16 kernels use, compiled without their instruction set: an inline function that
// the linker shares with other files must run on every machine.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include <immintrin.h>

#include "cpu/kernel.h"
#include "cpu/panel.h"
#include "cpu/prefetch.h"
#include "half.h"

namespace zigzag::cpu {

/// 2^f on [0, 1): the minimax of degree 4, relative error 2.6e-6.
inline constexpr float kExp2Degree4[5] = {1.0000026f, 0.69300383f, 0.24144275f, 0.052011464f,
                                          0.013534167f};

/// The order that makes {16 low, 16 high} words of 16 bits into 16 {low, high} pairs.
alignas(64) inline constexpr std::uint16_t kPairOrder[32] = {
    0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

}  // namespace zigzag::cpu
