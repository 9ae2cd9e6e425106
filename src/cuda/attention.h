#pragma once

#include <string>

#include "backend.h"
#include "cuda/cudnn_engine.h"

namespace zigzag::cuda {

/// Attention by cuDNN on `stream`. Returns false, and says why, when this call is not one for
/// cuDNN: nothing has been done then.
bool cudnn_forward(CudnnEngine& engine, const AttendArgs& args, void* stream, std::string& why);
bool cudnn_backward(CudnnEngine& engine, const AttendBackwardArgs& args, void* stream,
                    std::string& why);

/// Attention by the library's own kernels of plain multiply-adds: any of the three types, any mask,
/// softcap, head_dim up to 256; bitwise repeatable.
void fma_attend(const AttendArgs& args, void* stream);
void fma_attend_backward(const AttendBackwardArgs& args, void* stream);

}  // namespace zigzag::cuda
