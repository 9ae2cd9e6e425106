#pragma once

#include <cstdint>

namespace zigzag::cuda {

/// What computes attention on a GPU: the library's tensor-core kernels for Hopper, cuDNN, or the
/// library's kernels of plain multiply-adds, which serve everything.
enum class Engine : std::uint8_t { kHopper, kCudnn, kFma };

/// Whether ZIGZAG_GPU_ENGINE ("auto", "hopper", "cudnn" or "fma"; default auto) lets this engine be
/// tried. They are tried in this order: what one cannot serve falls to those behind it. Throws
/// InvalidArgument when the variable holds anything else.
bool engine_allowed(Engine engine);

}  // namespace zigzag::cuda
