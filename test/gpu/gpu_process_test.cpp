// Ranks that are processes: gpu_process_test RANKS peer|nccl [STEPS [kill|kill-backward]]. The
// parent forks before it touches CUDA; the ranks' host messages go through shared memory. Each rank
// compares its rows with the float64 reference. With "kill" the last rank is killed after STEPS
// steps in a forward, with "kill-backward" in a backward, when its part of an exchange has been
// promised but not made: the others must end with an error that names it within ZIGZAG_TIMEOUT_S,
// and new processes must then be able to use the GPUs. Exit code 0 when all went so.
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cuda/check.h"
#include "cuda/runtime.h"
#include "gpu_case.h"

namespace zigzag::gpu_test {
namespace {

using std::int64_t;

constexpr std::size_t kSlotBytes = 1 << 16;
constexpr int kMaxRanks = 16;

/// What the processes share: a slot a rank, and counters of who has come and who has read.
struct Shared {
  std::atomic<std::uint64_t> arrived{0};
  std::atomic<std::uint64_t> left{0};
  std::byte slots[kMaxRanks][kSlotBytes];
};

void wait_until(const std::atomic<std::uint64_t>& counter, std::uint64_t value) {
  const auto start = std::chrono::steady_clock::now();
  while (counter.load() < value) {
    std::this_thread::yield();
    if (std::chrono::steady_clock::now() - start >
        std::chrono::duration<double>(timeout_seconds())) {
      throw std::runtime_error("a process did not come in time");
    }
  }
}

Communicator make_bootstrap(Shared& shared, int rank, int size) {
  CallbackCollectives collectives;
  collectives.rank = rank;
  collectives.size = size;
  auto round = std::make_shared<std::uint64_t>(0);
  collectives.all_gather = [&shared, rank, size, round](const void* in, std::size_t bytes,
                                                        void* out) {
    if (bytes > kSlotBytes) throw std::runtime_error("message too long for the test");
    ++*round;
    const std::uint64_t target = *round * static_cast<std::uint64_t>(size);
    // Nobody overwrites a slot before everybody has read the last message.
    wait_until(shared.left, target - static_cast<std::uint64_t>(size));
    std::memcpy(shared.slots[rank], in, bytes);
    ++shared.arrived;
    wait_until(shared.arrived, target);
    for (int r = 0; r < size; ++r) {
      std::memcpy(static_cast<std::byte*>(out) + bytes * static_cast<std::size_t>(r),
                  shared.slots[r], bytes);
    }
    ++shared.left;
  };
  collectives.all_to_all = [](const void*, std::span<const int64_t>, void*,
                              std::span<const int64_t>) {
    throw std::runtime_error("host rows are not expected here");
  };
  return Communicator::callback(collectives);
}

struct GpuTensor {
  Buffer buffer;
  TensorView view;
};

GpuTensor on_gpu(std::vector<int64_t> shape, DType dtype, Device device,
                 const std::vector<std::byte>* values) {
  GpuTensor tensor;
  tensor.view = TensorView::contiguous(nullptr, dtype, std::move(shape), device);
  const int64_t bytes = tensor.view.num_elements() * item_size(dtype);
  tensor.buffer = cuda::allocate(device, bytes);
  tensor.view.data = tensor.buffer.memory.get();
  const std::vector<std::byte> poison(static_cast<std::size_t>(bytes), std::byte{0xff});
  cuda::copy(tensor.view.data, values == nullptr ? poison.data() : values->data(), bytes);
  return tensor;
}

double local_error(const GpuTensor& got, const std::vector<double>& want, const Plan& plan,
                   int rank) {
  const int64_t row = got.view.row_elements();
  const int64_t count = got.view.num_elements();
  std::vector<std::byte> bytes(static_cast<std::size_t>(count * item_size(got.view.dtype)));
  cuda::copy(bytes.data(), got.view.data, static_cast<int64_t>(bytes.size()));
  std::vector<double> local;
  for (const int64_t token : plan.token_indices(rank)) {
    local.insert(local.end(), want.begin() + token * row, want.begin() + (token + 1) * row);
  }
  return distance(to_doubles(bytes.data(), count, got.view.dtype), local);
}

/// Blocks a stream until the process dies.
void sleep_on_stream(void*) {
  while (true) std::this_thread::sleep_for(std::chrono::hours(1));
}

/// In which pass the last rank is killed.
enum class Kill : std::uint8_t { kNever, kForward, kBackward };

/// A pass to which the last rank promises its rows and is killed before it packs them.
int run_until_killed(Kill kill, int rank, int size, Device device, const Communicator& group,
                     void* stream) {
  // Long enough that partial gradients would be fetched while attention goes on.
  const Plan plan = Plan::from_lengths(std::vector<int64_t>{65536}, size);
  const auto tensor = [&](int64_t heads) {
    return on_gpu({plan.local_tokens(rank), heads, 64}, DType::kBFloat16, device, nullptr);
  };
  const GpuTensor q = tensor(4);
  const GpuTensor k = tensor(2);
  const GpuTensor v = tensor(2);
  const GpuTensor out = tensor(4);
  const GpuTensor lse = on_gpu({plan.local_tokens(rank), 4}, DType::kFloat32, device, nullptr);
  const GpuTensor dout = tensor(4);
  const GpuTensor dq = tensor(4);
  const GpuTensor dk = tensor(2);
  const GpuTensor dv = tensor(2);
  AttentionOptions options;
  options.stream = stream;
  const auto pass = [&](bool backwards) {
    if (backwards) {
      backward(dout.view, q.view, k.view, v.view, out.view, lse.view, plan, group, options, dq.view,
               dk.view, dv.view);
    } else {
      forward(q.view, k.view, v.view, plan, group, options, out.view, lse.view);
    }
    cuda::synchronize(device, stream);
  };
  if (kill == Kill::kBackward) {
    // The first backward of a pack agrees with the others on memory; the one that is to be killed
    // has nothing left to ask them on the host.
    pass(false);
    pass(true);
  }
  const bool victim = rank == size - 1;
  if (victim) {
    cuda::check(cudaLaunchHostFunc(cuda::as_stream(stream), sleep_on_stream, nullptr),
                "cudaLaunchHostFunc");
  }
  if (victim) {
    // Its own calls may wait for the stream that sleeps; by then the others have its promise.
    std::thread([] {
      std::this_thread::sleep_for(std::chrono::milliseconds(1500));
      (void)raise(SIGKILL);
    }).detach();
  }
  const auto start = std::chrono::steady_clock::now();
  std::string message;
  try {
    pass(kill == Kill::kBackward);
  } catch (const std::exception& error) {
    message = error.what();
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const bool named = message.find("waited") != std::string::npos &&
                     message.find("gather of K and V") != std::string::npos;
  std::printf("rank %d after %.1f s: %s\n", rank, seconds,
              message.empty() ? "no error" : message.c_str());
  std::fflush(stdout);
  return named && seconds < timeout_seconds() + 10 ? 0 : 1;
}

int run_rank(Shared& shared, int rank, int size, const std::string& comm, int steps, Kill kill,
             const std::vector<Problem>& problems,
             const std::vector<std::shared_ptr<const Results>>& wanted) {
  const Device device{DeviceType::kCuda, rank % cuda::device_count()};
  cuda::use_device(device);
  const Communicator bootstrap = make_bootstrap(shared, rank, size);
  const Communicator group = comm == "nccl" ? Communicator::nccl(bootstrap, device.index)
                                            : Communicator::peer(bootstrap, device.index);
  const std::shared_ptr<void> stream = cuda::make_stream(device);
  double worst = 0;
  for (int step = 0; step < steps; ++step) {
    const auto which = static_cast<std::size_t>(step) % problems.size();
    const Problem& problem = problems[which];
    const Results& want = *wanted[which];
    const Plan plan = Plan::from_lengths(problem.lengths, size);
    const int64_t tokens = plan.total_tokens();
    const int64_t rows = plan.local_tokens(rank);
    const auto input = [&](int64_t heads, std::uint64_t stream_id) {
      const std::vector<int64_t> shape{tokens, heads, problem.head_dim};
      const auto bytes = shard_bytes(random_bytes(tokens * heads * problem.head_dim, problem.dtype,
                                                  problem.seed * 4 + stream_id),
                                     problem.dtype, shape, plan, rank);
      return on_gpu({rows, heads, problem.head_dim}, problem.dtype, device, &bytes);
    };
    const auto output = [&](int64_t heads) {
      return on_gpu({rows, heads, problem.head_dim}, problem.dtype, device, nullptr);
    };
    const GpuTensor q = input(problem.heads, 0);
    const GpuTensor k = input(problem.kv_heads, 1);
    const GpuTensor v = input(problem.kv_heads, 2);
    const GpuTensor dout = input(problem.heads, 3);
    const GpuTensor out = output(problem.heads);
    const GpuTensor lse = on_gpu({rows, problem.heads}, DType::kFloat32, device, nullptr);
    const GpuTensor dq = output(problem.heads);
    const GpuTensor dk = output(problem.kv_heads);
    const GpuTensor dv = output(problem.kv_heads);
    AttentionOptions options;
    options.mask = problem.mask;
    options.stream = stream.get();
    forward(q.view, k.view, v.view, plan, group, options, out.view, lse.view);
    backward(dout.view, q.view, k.view, v.view, out.view, lse.view, plan, group, options, dq.view,
             dk.view, dv.view);
    cuda::synchronize(device, stream.get());
    const double bound = problem.dtype == DType::kFloat32 ? 2e-5 : 1e-2;
    const double errors[] = {
        local_error(out, want.out, plan, rank), local_error(lse, want.lse, plan, rank),
        local_error(dq, want.dq, plan, rank), local_error(dk, want.dk, plan, rank),
        local_error(dv, want.dv, plan, rank)};
    for (const double error : errors) {
      worst = std::max(worst, error / bound);
      if (!(error <= bound)) {
        std::printf("rank %d step %d %s: error %.3e, allowed %.1e\n", rank, step,
                    describe(problem).c_str(), error, bound);
        return 1;
      }
    }
  }
  if (kill != Kill::kNever) {
    return run_until_killed(kill, rank, size, device, group, stream.get());
  }
  std::printf("rank %d of %d, %s: %d steps, largest error %.2f of its bound\n", rank, size,
              comm.c_str(), steps, worst);
  return 0;
}

/// Runs the ranks and returns how many did not end as they should.
int run_processes(int size, const std::string& comm, int steps, Kill kill,
                  const std::vector<Problem>& problems,
                  const std::vector<std::shared_ptr<const Results>>& wanted) {
  void* memory =
      mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no shared memory");
  auto* shared = new (memory) Shared;
  std::fflush(stdout);
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      int code = 1;
      try {
        code = run_rank(*shared, rank, size, comm, steps, kill, problems, wanted);
      } catch (const std::exception& error) {
        std::printf("rank %d: %s\n", rank, error.what());
      }
      std::fflush(stdout);
      _exit(code);
    }
    children.push_back(child);
  }
  int failed = 0;
  for (int rank = 0; rank < size; ++rank) {
    int status = 0;
    const bool waited = waitpid(children[static_cast<std::size_t>(rank)], &status, 0) > 0;
    const bool killed = waited && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    const bool ended = waited && WIFEXITED(status) && WEXITSTATUS(status) == 0;
    if (!(kill != Kill::kNever && rank == size - 1 ? killed : ended)) ++failed;
  }
  std::printf("%d of %d ranks failed\n", failed, size);
  (void)munmap(memory, sizeof(Shared));
  return failed;
}

int run(int argc, char** argv) {
  const int size = argc > 1 ? std::stoi(argv[1]) : 2;
  const std::string comm = argc > 2 ? argv[2] : "peer";
  const int steps = argc > 3 ? std::stoi(argv[3]) : 6;
  if (size < 1 || size > kMaxRanks) {
    std::fprintf(stderr, "RANKS is %d; it must be 1 to %d\n", size, kMaxRanks);
    return 2;
  }
  std::vector<Problem> problems(3);
  problems[0].lengths = {300, 1, 0, 129};
  problems[1].lengths = {400, 77, 64};
  problems[1].dtype = DType::kBFloat16;
  problems[1].head_dim = 128;
  problems[2].lengths = {650};
  problems[2].dtype = DType::kBFloat16;
  std::vector<std::shared_ptr<const Results>> wanted;
  for (const Problem& problem : problems) wanted.push_back(reference_of(problem));

  const std::string word = argc > 4 ? argv[4] : "";
  const Kill kill = word == "kill"            ? Kill::kForward
                    : word == "kill-backward" ? Kill::kBackward
                                              : Kill::kNever;
  const int failed = run_processes(size, comm, steps, kill, problems, wanted);
  if (kill == Kill::kNever || failed != 0) return failed == 0 ? 0 : 1;
  std::printf("new processes on the same GPUs:\n");
  return run_processes(size, comm, steps, Kill::kNever, problems, wanted) == 0 ? 0 : 1;
}

}  // namespace
}  // namespace zigzag::gpu_test

int main(int argc, char** argv) {
  try {
    return zigzag::gpu_test::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_process_test: %s\n", error.what());
    return 3;
  }
}
