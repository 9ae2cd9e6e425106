#include "backend.h"

#include <memory>
#include <string>
#include <utility>

#include "cuda/attention.h"
#include "cuda/check.h"
#include "cuda/cudnn_engine.h"
#include "cuda/device.h"
#include "cuda/engine_choice.h"
#include "cuda/hopper/engine.h"
#include "cuda/timeline.h"
#include "zigzag/error.h"

namespace zigzag::cuda {
namespace {

/// Rows of a tile past the end of a buffer may be multiplied by masked weights, so what follows
/// the last row must be finite: this many bytes behind every buffer are zero.
constexpr std::int64_t kZeroTail = std::int64_t{1} << 20;

class CudaBackend final : public Backend {
 public:
  CudaBackend(Device device, Kernels kernels, void* stream)
      : device_(DeviceState::get(device.index)), kernels_(kernels), stream_(as_stream(stream)) {}

  bool overlaps() const override { return true; }
  Queue compute_queue() override { return {stream_}; }
  Queue exchange_queue() override { return {device_.side_stream(stream_)}; }

  void order(Queue earlier, Queue later) override {
    device_.order(as_stream(earlier.stream), as_stream(later.stream));
  }

  Buffer allocate(std::int64_t bytes, Queue queue) override {
    DeviceGuard guard(device_.index());
    DeviceState* device = &device_;
    const cudaStream_t stream = as_stream(queue.stream);
    void* memory = device_.allocate(bytes + kZeroTail, stream);
    Buffer buffer;
    buffer.memory = std::shared_ptr<void>(
        memory, [device, stream](void* pointer) { device->free(pointer, stream); });
    buffer.bytes = bytes;
    check(cudaMemsetAsync(static_cast<char*>(memory) + bytes, 0, kZeroTail, stream),
          "cudaMemsetAsync");
    return buffer;
  }

  void attend(const AttendArgs& args) override {
    if (args.q.num_elements() == 0) return;
    std::string why;
    if (tries_hopper() && hopper::forward(args, nullptr, stream_, why)) return;
    CudnnEngine* const engine = cudnn();
    if (engine != nullptr && cudnn_forward(*engine, args, stream_, why)) return;
    const auto scope = span(args, "forward, own kernels");
    fma_attend(args, stream_);
  }

  bool attends_open(const AttendArgs& args, const TensorView& own_k,
                    const TensorView& own_v) const override {
    return args.q.num_elements() != 0 && tries_hopper() && hopper::fetches(args, own_k, own_v);
  }

  void attend_open(const AttendArgs& args, const OpenGather& open) override {
    std::string why;
    if (!hopper::forward(args, &open, stream_, why)) throw DeviceError(why);
  }

  void attend_backward_early(const AttendBackwardArgs& args) override { begin(args, true); }

  bool attend_backward_others(const AttendBackwardArgs& args) override {
    return hopper_begun_ != nullptr && hopper_begun_->others(args);
  }

  void attend_backward(const AttendBackwardArgs& args) override {
    if (hopper_begun_ == nullptr && cudnn_begun_ == nullptr) begin(args, false);
    if (hopper_begun_ != nullptr) {
      const std::unique_ptr<hopper::HopperBackward> backward = std::move(hopper_begun_);
      return backward->finish(args);
    }
    std::string why;
    const std::unique_ptr<CudnnBackward> backward = std::move(cudnn_begun_);
    if (backward != nullptr && backward->finish(args, why)) return;
    const auto scope = span(args, "backward, own kernels");
    fma_attend_backward(args, stream_);
  }

 private:
  TimelineScope span(const AttendArgs& args, std::string_view name) const {
    return {name, static_cast<int>(args.rank), device_.index(), Lane::kAttention, stream_};
  }

  bool tries_hopper() const {
    return kernels_ != Kernels::kReference && engine_allowed(Engine::kHopper);
  }

  /// `own_rows`: k and v are the rank's own rows.
  void begin(const AttendBackwardArgs& args, bool own_rows) {
    hopper_begun_.reset();
    cudnn_begun_.reset();
    if (args.q.num_elements() == 0 || kernels_ == Kernels::kReference) return;
    std::string why;
    if (tries_hopper()) {
      hopper_begun_ = hopper::HopperBackward::begin(args, own_rows, stream_, why);
      if (hopper_begun_ != nullptr) return;
    }
    if (CudnnEngine* engine = cudnn()) {
      cudnn_begun_ = CudnnBackward::begin(*engine, args, own_rows, stream_, why);
    }
  }

  CudnnEngine* cudnn() {
    if (kernels_ == Kernels::kReference || !engine_allowed(Engine::kCudnn) ||
        !CudnnEngine::presence().available) {
      return nullptr;
    }
    if (engine_ == nullptr) engine_ = borrow_cudnn_engine(device_.index());
    return engine_.get();
  }

  DeviceState& device_;
  Kernels kernels_;
  cudaStream_t stream_;
  std::shared_ptr<CudnnEngine> engine_;
  std::unique_ptr<CudnnBackward> cudnn_begun_;
  std::unique_ptr<hopper::HopperBackward> hopper_begun_;
};

}  // namespace
}  // namespace zigzag::cuda

namespace zigzag {

std::unique_ptr<Backend> make_cuda_backend(Device device, Kernels kernels, void* stream) {
  return std::make_unique<cuda::CudaBackend>(device, kernels, stream);
}

}  // namespace zigzag
