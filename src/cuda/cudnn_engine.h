#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "cuda/device.h"
#include "zigzag/tensor.h"

namespace zigzag::cuda {

/// Which keys of an item a query sees, in cuDNN's terms: all; those up to its own index; or those
/// up to its own index counted from the last query and key.
enum class CudnnMask : std::uint8_t { kNone, kTopLeft, kBottomRight };

/// Everything that is baked into an execution plan. Items are ragged: their rows are told at run
/// time, up to the maxima given here. Strides count elements.
struct CudnnShape {
  DType dtype = DType::kBFloat16;
  CudnnMask mask = CudnnMask::kNone;
  bool backward = false;
  bool deterministic = false;
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0;
  std::int64_t batch = 0;    // items
  std::int64_t max_q = 0;    // rows of the longest item
  std::int64_t max_k = 0;    // likewise
  std::int64_t total_q = 0;  // backward: rows that the offsets of lse and dq stay below
  std::int64_t total_k = 0;  // backward: rows that the offsets of dk and dv stay below
  std::int64_t q_row = 0, q_head = 0;
  std::int64_t k_row = 0, k_head = 0;
  std::int64_t v_row = 0, v_head = 0;
  std::int64_t out_row = 0, out_head = 0;
  std::int64_t dout_row = 0, dout_head = 0;
  std::int64_t dq_row = 0, dq_head = 0;
  std::int64_t dk_row = 0;  // of dk and dv, whose heads lie side by side
  std::int64_t lse_row = 0;
  // Items of max_q x max_k rows, all of one length and one after another: no offsets, no lengths.
  bool dense = false;
  double scale = 1;
  auto operator<=>(const CudnnShape&) const = default;
};

/// The arrays of one launch, all in device memory. Offsets [batch + 1] count elements, lengths
/// [batch] rows.
struct CudnnArrays {
  const void *q = nullptr, *k = nullptr, *v = nullptr, *dout = nullptr;
  void *out = nullptr, *lse = nullptr;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
  const std::int64_t *q_offsets = nullptr, *k_offsets = nullptr, *v_offsets = nullptr;
  const std::int64_t *out_offsets = nullptr, *dout_offsets = nullptr, *lse_offsets = nullptr;
  const std::int64_t *dq_offsets = nullptr, *dkv_offsets = nullptr;
  const std::int32_t *q_lengths = nullptr, *k_lengths = nullptr;
};

/// cuDNN on one GPU: a handle and the execution plans built so far. One thread at a time.
class CudnnEngine {
 public:
  /// Whether cuDNN can be used in this process: its version and place, or why not.
  struct Presence {
    bool available = false;
    std::string detail;
  };
  static const Presence& presence();

  /// Throws DeviceError when cuDNN is not there or refuses this GPU.
  explicit CudnnEngine(int device);
  ~CudnnEngine();
  CudnnEngine(const CudnnEngine&) = delete;
  CudnnEngine& operator=(const CudnnEngine&) = delete;

  /// Bytes of workspace that the shape's plan needs, built when it is new; -1 when cuDNN has no
  /// plan for it, and `why` says why.
  std::int64_t prepare(const CudnnShape& shape, std::string& why);
  /// Gives the launch to `stream`. The shape has been prepared.
  void run(const CudnnShape& shape, const CudnnArrays& arrays, void* workspace, void* stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// An engine of this GPU that nobody else uses while it is held.
std::shared_ptr<CudnnEngine> borrow_cudnn_engine(int device);

}  // namespace zigzag::cuda
