#pragma once

#include <cstdint>

#include <cuda.h>

#include "zigzag/tensor.h"

namespace zigzag::cuda::hopper {

/// Whether this process's driver makes tensor maps.
bool has_tensor_maps();

/// How the copy engine of a multiprocessor sees x [rows, heads, head_dim], float16 or bfloat16:
/// boxes of 64 elements of a head by `box_rows` rows, laid out for the tensor cores (128-byte
/// swizzle); what lies behind the last row or element is 0. Coordinates are element, row and head.
/// Address and strides are multiples of 16 bytes, and x is not empty. Throws DeviceError when the
/// driver refuses.
CUtensorMap make_tensor_map(const TensorView& x, int box_rows);

/// Likewise with boxes of 64 elements by `box_heads` heads by `box_rows` rows; coordinates are
/// element, head and row.
CUtensorMap make_tensor_map_of_heads(const TensorView& x, int box_heads, int box_rows);

}  // namespace zigzag::cuda::hopper
