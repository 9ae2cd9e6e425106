// What a build without CUDA offers instead of src/cuda.
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "cuda/layout.h"
#include "cuda/runtime.h"
#include "cuda/timeline.h"
#include "zigzag/communicator.h"
#include "zigzag/error.h"

namespace zigzag {
namespace {

constexpr const char* kHowToBuild =
    "this build of zigzag has no CUDA: build it with -DZIGZAG_CUDA=ON where nvcc and the headers "
    "of "
    "cuDNN are (scripts/fetch_cuda_headers.sh fetches the headers)";

[[noreturn]] void refuse() { throw DeviceError(kHowToBuild); }

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(Device, Kernels, void*) { refuse(); }

Communicator Communicator::peer(const Communicator&, int) { refuse(); }

namespace cuda {

void copy_rows(std::span<const TensorView>, const TensorView&, std::span<const Segment>,
               std::uint64_t, void*) {
  refuse();
}

void copy_rows_plain(std::span<const TensorView>, const TensorView&, std::span<const Segment>,
                     void*) {
  refuse();
}

int device_count() noexcept { return 0; }

std::vector<Component> components() { return {{"CUDA", false, kHowToBuild}}; }

bool peers_reach(std::span<const int>) noexcept { return false; }

std::string bus_id(Device) { refuse(); }

std::string why_unreachable(Device, const std::string&) noexcept { return kHowToBuild; }

std::string attention_engine(Device) { refuse(); }

Buffer allocate(Device, std::int64_t) { refuse(); }

void copy(void*, const void*, std::int64_t) { refuse(); }

std::shared_ptr<void> make_stream(Device) { refuse(); }

void synchronize(Device, void*) { refuse(); }

void use_device(Device) { refuse(); }

void start_timeline() { refuse(); }

std::vector<TimelineSpan> stop_timeline() { refuse(); }

}  // namespace cuda
}  // namespace zigzag
