// A kernel that does nothing: what small calls are held against.
#include "cuda/check.h"
#include "gpu_bench.h"

namespace zigzag::gpu_bench {
namespace {

__global__ void nothing() {}

}  // namespace

void empty_launch(void* stream) {
  nothing<<<1, 32, 0, cuda::as_stream(stream)>>>();
  cuda::check_launch("nothing");
}

}  // namespace zigzag::gpu_bench
