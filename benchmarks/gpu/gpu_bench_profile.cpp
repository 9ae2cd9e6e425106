// Steps for a profiler (cupti_trace.cpp): a memset of a telling size stands before every pass.
#include <cstdio>
#include <exception>
#include <numeric>
#include <thread>

#include <cuda_runtime_api.h>

#include "cuda/check.h"
#include "cuda/runtime.h"
#include "gpu_bench_steps.h"

namespace zigzag::gpu_bench {
namespace {

using std::int64_t;

/// Bytes of the memset before phase 0, as many as no other memset has; each phase adds 16.
constexpr int64_t kMarkBytes = 3000001;
constexpr int kRepeats = 3;

struct Case {
  std::string name;
  std::vector<int64_t> lengths;
  Heads heads;
};

void profile_case(const Case& entry, const std::string& comm, int world_size, int64_t stage,
                  int& phase) {
  const Plan plan = Plan::from_lengths(entry.lengths, world_size);
  const auto groups = Communicator::threads(world_size);
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(world_size));
  std::vector<std::thread> threads;
  for (int r = 0; r < world_size; ++r) {
    threads.emplace_back([&, r, phase] {
      const auto at = static_cast<std::size_t>(r);
      try {
        const Device device{DeviceType::kCuda, r % cuda::device_count()};
        cuda::use_device(device);
        const Communicator group = world_size == 1  ? Communicator::self()
                                   : comm == "nccl" ? Communicator::nccl(groups[at], device.index)
                                                    : Communicator::peer(groups[at], device.index);
        const auto stream = cuda::make_stream(device);
        const Buffer mark = cuda::allocate(device, kMarkBytes * 2);
        AttentionOptions options;
        options.stream = stream.get();
        options.kv_heads_per_stage = stage;
        const Step step(plan.local_tokens(r), entry.heads, DType::kBFloat16, device,
                        static_cast<std::uint64_t>(r) * 16 + 1);
        for (int i = 0; i < 2; ++i) {
          step.forward(plan, group, options);
          step.backward(plan, group, options);
        }
        for (int pass = 0; pass < 2; ++pass) {
          for (int i = 0; i < kRepeats; ++i) {
            cuda::synchronize(device, stream.get());
            group.barrier();
            cuda::check(cudaMemsetAsync(mark.memory.get(), 0,
                                        static_cast<std::size_t>(kMarkBytes + 16 * (phase + pass)),
                                        cuda::as_stream(stream.get())),
                        "cudaMemsetAsync");
            if (pass == 0) {
              step.forward(plan, group, options);
            } else {
              step.backward(plan, group, options);
            }
            cuda::synchronize(device, stream.get());
          }
        }
        group.barrier();
      } catch (const std::exception& error) {
        groups[at].abort(error.what());
        failures[at] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
  for (const char* pass : {"forward", "backward"}) {
    std::printf("phase %d: W%d stage %d %s %s\n", phase++, world_size, static_cast<int>(stage),
                entry.name.c_str(), pass);
  }
}

}  // namespace

void bench_profile(const std::string& comm, int world_size, int64_t stage) {
  static int phase = 0;
  std::vector<Case> cases;
  // As many tokens on one rank as on the largest number of ranks.
  const int64_t gpus = cuda::device_count();
  for (const std::vector<int64_t>& pack : packs_for(gpus)) cases.push_back({"steps", pack, {}});
  cases.push_back({"real 32k", real_pack(32768 * gpus, 1), {64, 8, 128}});
  cases.push_back({"real 64k", real_pack(65536 * gpus, 1), {64, 8, 128}});
  for (const Case& entry : cases) profile_case(entry, comm, world_size, stage, phase);
}

}  // namespace zigzag::gpu_bench
