#pragma once

#include <cstdint>

namespace zigzag::cuda {

/// What computes attention on a GPU: the library's tensor-core kernels for Hopper, cuDNN, or the
/// library's kernels of plain multiply-adds, which serve everything.
enum class Engine : std::uint8_t { kHopper, kCudnn, kFma };

/// Whether ZIGZAG_GPU_ENGINE ("auto", "hopper", "cudnn" or "fma"; default auto) lets this engine be
/// tried. What it cannot serve falls to the engines behind it. Throws InvalidArgument when the
/// variable holds anything else.
bool engine_allowed(Engine engine);

/// Whether the tensor-core kernels are tried before cuDNN in a forward: cuDNN's takes less power,
/// so that a GPU at its limit runs 3% faster with it; the kernels serve what it does not.
bool hopper_goes_first();

}  // namespace zigzag::cuda
