#include "cuda/hopper/tensor_map.h"

#include <string>

#include <cuda_runtime_api.h>

#include "zigzag/error.h"

namespace zigzag::cuda::hopper {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

/// The driver is asked at run time, so that nothing links to it.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                              12000, cudaEnableDefault, &found);
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    (void)cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<Encode>(function);
}

Encode encode() {
  static const Encode function = find_encode();
  return function;
}

/// `second`, `third`: the dimensions of x that the map has after the elements of a head.
CUtensorMap make_map(const TensorView& x, int second, int third, int box_second, int box_third) {
  CUtensorMap map;
  const CUtensorMapDataType type = x.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto bytes = [&](int dimension) {
    // A single head or row may have any stride.
    const std::int64_t stride = x.shape[static_cast<std::size_t>(dimension)] == 1
                                    ? x.shape[2]
                                    : x.strides[static_cast<std::size_t>(dimension)];
    return static_cast<cuuint64_t>((stride * item_size(x.dtype) + 15) / 16 * 16);
  };
  const auto size = [&](int dimension) {
    return static_cast<cuuint64_t>(x.shape[static_cast<std::size_t>(dimension)]);
  };
  const cuuint64_t sizes[] = {size(2), size(second), size(third)};
  const cuuint64_t strides[] = {bytes(second), bytes(third)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_second),
                            static_cast<cuuint32_t>(box_third)};
  const cuuint32_t steps[] = {1, 1, 1};
  const CUresult status =
      encode()(&map, type, 3, x.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw DeviceError("cuTensorMapEncodeTiled refused a tensor of " + std::to_string(x.shape[0]) +
                      " rows (CUDA driver error " + std::to_string(static_cast<int>(status)) + ")");
  }
  return map;
}

}  // namespace

bool has_tensor_maps() { return encode() != nullptr; }

CUtensorMap make_tensor_map(const TensorView& x, int box_rows) {
  return make_map(x, 0, 1, box_rows, 1);
}

CUtensorMap make_tensor_map_of_heads(const TensorView& x, int box_heads, int box_rows) {
  return make_map(x, 1, 0, box_heads, box_rows);
}

}  // namespace zigzag::cuda::hopper
