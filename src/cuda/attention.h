#pragma once

#include <memory>
#include <string>

#include "backend.h"
#include "cuda/cudnn_engine.h"

namespace zigzag::cuda {

/// Attention by cuDNN on `stream`. Returns false, and says why, when this call is not one for
/// cuDNN: nothing has been done then.
bool cudnn_forward(CudnnEngine& engine, const AttendArgs& args, void* stream, std::string& why);

/// A backward by cuDNN in two parts: begin gives the diagonal blocks, which need no K and V but the
/// rank's own, finish the rectangles and the sums.
class CudnnBackward {
 public:
  /// Null, and says why, when this call is not one for cuDNN: nothing has been done then.
  /// `own_rows`: k and v are the rank's own rows and dk and dv come with finish.
  static std::unique_ptr<CudnnBackward> begin(CudnnEngine& engine, const AttendBackwardArgs& args,
                                              bool own_rows, void* stream, std::string& why);
  ~CudnnBackward();
  CudnnBackward(const CudnnBackward&) = delete;
  CudnnBackward& operator=(const CudnnBackward&) = delete;

  /// False, and says why, when cuDNN has no plan for the rest: the caller starts anew elsewhere.
  bool finish(const AttendBackwardArgs& args, std::string& why);

 private:
  struct State;
  explicit CudnnBackward(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

/// Attention by the library's own kernels of plain multiply-adds: any of the three types, any mask,
/// softcap, head_dim up to 256; bitwise repeatable.
void fma_attend(const AttendArgs& args, void* stream);
void fma_attend_backward(const AttendBackwardArgs& args, void* stream);

}  // namespace zigzag::cuda
