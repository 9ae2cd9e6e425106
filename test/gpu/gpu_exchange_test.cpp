// Exchanges between ranks on GPUs: failures end within the deadline, long runs stay right and flat,
// a step captured in a CUDA graph gives the same bits.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "cuda/check.h"
#include "cuda/runtime.h"
#include "gpu_case.h"

namespace zigzag::gpu_test {
namespace {

using std::int64_t;

class GpuExchange : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "no GPU";
  }
};

struct Tensors {
  std::vector<Buffer> buffers;
  TensorView q, k, v, dout, out, lse, dq, dk, dv;
};

Tensors make_tensors(const Problem& problem, int64_t rows, Device device,
                     std::uint64_t first_seed = 0) {
  Tensors tensors;
  const auto make = [&](int64_t heads, bool poison, std::uint64_t seed) {
    TensorView view =
        TensorView::contiguous(nullptr, problem.dtype, {rows, heads, problem.head_dim}, device);
    const auto bytes =
        poison ? std::vector<std::byte>(
                     static_cast<std::size_t>(view.num_elements() * item_size(problem.dtype)),
                     std::byte{0xff})
               : random_bytes(view.num_elements(), problem.dtype, first_seed + seed);
    tensors.buffers.push_back(cuda::allocate(device, static_cast<int64_t>(bytes.size())));
    view.data = tensors.buffers.back().memory.get();
    cuda::copy(view.data, bytes.data(), static_cast<int64_t>(bytes.size()));
    return view;
  };
  tensors.q = make(problem.heads, false, 1);
  tensors.k = make(problem.kv_heads, false, 2);
  tensors.v = make(problem.kv_heads, false, 3);
  tensors.dout = make(problem.heads, false, 4);
  tensors.out = make(problem.heads, true, 0);
  tensors.dq = make(problem.heads, true, 0);
  tensors.dk = make(problem.kv_heads, true, 0);
  tensors.dv = make(problem.kv_heads, true, 0);
  tensors.lse = TensorView::contiguous(nullptr, DType::kFloat32, {rows, problem.heads}, device);
  tensors.buffers.push_back(cuda::allocate(device, rows * problem.heads * 4));
  tensors.lse.data = tensors.buffers.back().memory.get();
  return tensors;
}

/// What a rank works with: its GPU, its place among the peers, and options with a stream of its
/// own.
struct RankSetup {
  Device device;
  Communicator group;
  std::shared_ptr<void> stream;
  AttentionOptions options;
};

RankSetup join_peers(const std::vector<Communicator>& groups, int rank) {
  const Device device{DeviceType::kCuda, rank % cuda::device_count()};
  cuda::use_device(device);
  RankSetup setup{device,
                  Communicator::peer(groups[static_cast<std::size_t>(rank)], device.index),
                  cuda::make_stream(device),
                  {}};
  setup.options.stream = setup.stream.get();
  return setup;
}

std::vector<std::byte> read(const TensorView& view) {
  std::vector<std::byte> bytes(
      static_cast<std::size_t>(view.num_elements() * item_size(view.dtype)));
  cuda::copy(bytes.data(), view.data, static_cast<int64_t>(bytes.size()));
  return bytes;
}

TEST_F(GpuExchange, RankThatFailsEndsTheOthers) {
  const auto groups = Communicator::threads(3);
  Problem problem;
  problem.lengths = {200, 100};
  const Plan plan = Plan::from_lengths(problem.lengths, 3);
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::string> messages(3);
  on_ranks(3, [&](int rank) {
    const Device device{DeviceType::kCuda, rank % cuda::device_count()};
    const Communicator group =
        Communicator::peer(groups[static_cast<std::size_t>(rank)], device.index);
    const Tensors t = make_tensors(problem, plan.local_tokens(rank), device);
    const auto stream = cuda::make_stream(device);
    AttentionOptions options;
    options.stream = stream.get();
    try {
      if (rank == 1) throw std::runtime_error("planted failure");
      forward(t.q, t.k, t.v, plan, group, options, t.out, t.lse);
    } catch (const std::exception& error) {
      if (rank == 1) group.abort(error.what());
      messages[static_cast<std::size_t>(rank)] = error.what();
    }
    cuda::synchronize(device, stream.get());
  });
  for (const int rank : {0, 2}) {
    EXPECT_NE(messages[static_cast<std::size_t>(rank)].find("planted failure"), std::string::npos)
        << messages[static_cast<std::size_t>(rank)];
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

void poison(const Tensors& tensors, cudaStream_t stream) {
  for (const TensorView* view :
       {&tensors.out, &tensors.lse, &tensors.dq, &tensors.dk, &tensors.dv}) {
    cuda::check(
        cudaMemsetAsync(view->data, 0xff,
                        static_cast<std::size_t>(view->num_elements() * item_size(view->dtype)),
                        stream),
        "cudaMemsetAsync");
  }
}

std::vector<double> values(const TensorView& view) {
  const std::vector<std::byte> bytes = read(view);
  return to_doubles(bytes.data(), view.num_elements(), view.dtype);
}

/// What the first step of a pack gave: later ones are compared with it.
struct First {
  std::vector<std::byte> out, lse;
  std::vector<double> dq, dk, dv;
};

/// How many steps went wrong, and by how many bytes the GPU's memory in use grew in the second
/// half.
struct LongRun {
  int wrong = 0;
  std::size_t growth = 0;
};

std::vector<LongRun> long_run(int ranks, int steps) {
  Problem problem;
  problem.dtype = DType::kBFloat16;
  problem.heads = 8;
  problem.kv_heads = 2;
  problem.head_dim = 128;
  // Packs of one number of tokens, so that a rank's tensors serve them all.
  const std::vector<std::vector<int64_t>> packs{{2048},         {1000, 1048},
                                                {64, 1920, 64}, {700, 700, 600, 40, 8},
                                                {2047, 1},      std::vector<int64_t>(64, 32)};
  std::vector<Plan> plans;
  for (const auto& pack : packs) plans.push_back(Plan::from_lengths(pack, ranks));
  const auto groups = Communicator::threads(ranks);
  std::vector<LongRun> results(static_cast<std::size_t>(ranks));
  on_ranks(ranks, [&](int rank) {
    LongRun& result = results[static_cast<std::size_t>(rank)];
    auto [device, group, stream, options] = join_peers(groups, rank);
    const Tensors t = make_tensors(problem, plans[0].local_tokens(rank), device);
    std::vector<First> first(3 * packs.size());  // by pack and stage
    std::size_t free_before = 0;
    std::size_t free_after = 0;
    std::size_t total = 0;
    for (int step = 0; step < steps; ++step) {
      const auto which = static_cast<std::size_t>(step * 31 / 7) % packs.size();
      poison(t, cuda::as_stream(stream.get()));
      // Stages of one and of both heads, in no simple order.
      const int stage = step % 3;
      options.kv_heads_per_stage = stage;
      forward(t.q, t.k, t.v, plans[which], group, options, t.out, t.lse);
      backward(t.dout, t.q, t.k, t.v, t.out, t.lse, plans[which], group, options, t.dq, t.dk, t.dv);
      // Between checks steps follow one another without a pause.
      if (step % 5 == 4 || step < 40) {
        cuda::synchronize(device, stream.get());
        First& want = first[3 * which + static_cast<std::size_t>(stage)];
        const First got{read(t.out), read(t.lse), values(t.dq), values(t.dk), values(t.dv)};
        if (want.out.empty()) {
          want = got;
        } else if (got.lse != want.lse || got.out != want.out ||
                   !(distance(got.dq, want.dq) < 5e-3) || !(distance(got.dk, want.dk) < 5e-3) ||
                   !(distance(got.dv, want.dv) < 5e-3)) {
          ++result.wrong;
        }
      }
      if (step == steps / 2 || step == steps - 1) {
        cuda::synchronize(device, stream.get());
        group.barrier();
        cuda::check(cudaMemGetInfo(step == steps / 2 ? &free_before : &free_after, &total),
                    "memory");
        group.barrier();
      }
    }
    if (free_after < free_before) result.growth = free_before - free_after;
  });
  return results;
}

TEST_F(GpuExchange, LongRunStaysRightAndFlat) {
  for (const int ranks : {2, 4}) {
    for (const LongRun& result : long_run(ranks, 1000)) {
      EXPECT_EQ(result.wrong, 0) << ranks << " ranks";
      // The driver's pool grows by 32 MiB when ranks that share a GPU meet in a new order.
      EXPECT_LE(result.growth, std::size_t{32} << 20) << ranks << " ranks";
    }
  }
}

/// Rows that a forward fetches while it computes are used when they have arrived, not before: what
/// lies in their place is of the call before, which had other keys.
TEST_F(GpuExchange, FetchedRowsAreThoseOfTheCall) {
  Problem problem;
  problem.dtype = DType::kBFloat16;
  problem.heads = 8;
  problem.kv_heads = 2;
  problem.head_dim = 128;
  for (const int ranks : {2, 4}) {
    const std::vector<Plan> plans = {
        Plan::from_lengths(std::vector<int64_t>{16384}, ranks),
        Plan::from_lengths(std::vector<int64_t>{8992, 304, 7088}, ranks)};
    const auto groups = Communicator::threads(ranks);
    std::vector<int> wrong(static_cast<std::size_t>(ranks), 0);
    on_ranks(ranks, [&](int rank) {
      auto [device, group, stream, options] = join_peers(groups, rank);
      const auto seed = static_cast<std::uint64_t>(10 * rank);
      const Tensors sets[] = {
          make_tensors(problem, plans[0].local_tokens(rank), device, seed + 100),
          make_tensors(problem, plans[0].local_tokens(rank), device, seed + 200)};
      std::vector<First> first(4);
      for (int step = 0; step < 200; ++step) {
        const auto set = static_cast<std::size_t>(step % 2);
        const auto which = static_cast<std::size_t>(step / 2 % 3 % 2);
        const Tensors& t = sets[set];
        poison(t, cuda::as_stream(stream.get()));
        forward(t.q, t.k, t.v, plans[which], group, options, t.out, t.lse);
        if (step % 3 == 1) continue;  // calls also follow one another without a pause
        cuda::synchronize(device, stream.get());
        First& want = first[2 * which + set];
        const First got{read(t.out), read(t.lse), {}, {}, {}};
        if (want.out.empty()) want = got;
        if (got.lse != want.lse || got.out != want.out) ++wrong[static_cast<std::size_t>(rank)];
      }
    });
    for (const int count : wrong) EXPECT_EQ(count, 0) << ranks << " ranks";
  }
}

TEST_F(GpuExchange, StepReplayedFromAGraph) {
  Problem problem;
  problem.dtype = DType::kBFloat16;
  problem.head_dim = 128;
  problem.lengths = {1500, 300, 248};
  const Plan plan = Plan::from_lengths(problem.lengths, 1);
  const Device device{DeviceType::kCuda, 0};
  const Communicator group = Communicator::self();
  const auto stream = cuda::make_stream(device);
  AttentionOptions options;
  options.stream = stream.get();
  const Tensors t = make_tensors(problem, plan.total_tokens(), device);
  const auto step = [&] {
    forward(t.q, t.k, t.v, plan, group, options, t.out, t.lse);
    backward(t.dout, t.q, t.k, t.v, t.out, t.lse, plan, group, options, t.dq, t.dk, t.dv);
  };
  step();
  cuda::synchronize(device, stream.get());
  step();
  cuda::synchronize(device, stream.get());
  const std::vector<std::byte> want = read(t.out);

  const cudaStream_t queue = cuda::as_stream(stream.get());
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  cuda::check(cudaStreamBeginCapture(queue, cudaStreamCaptureModeThreadLocal), "begin capture");
  step();
  cuda::check(cudaStreamEndCapture(queue, &graph), "end capture");
  cuda::check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cuda::check(cudaMemset(t.out.data, 0xff, want.size()), "poison");
  cuda::check(cudaDeviceSynchronize(), "synchronize");
  for (int i = 0; i < 3; ++i) cuda::check(cudaGraphLaunch(exec, queue), "launch");
  cuda::synchronize(device, stream.get());
  EXPECT_TRUE(read(t.out) == want);
  cuda::check(cudaGraphExecDestroy(exec), "destroy");
  cuda::check(cudaGraphDestroy(graph), "destroy");
}

/// Every rank captures its step and launches the graph: the ranks wait for one another inside.
TEST_F(GpuExchange, StepOfSeveralRanksReplayedFromGraphs) {
  constexpr int kRanks = 2;
  Problem problem;
  problem.dtype = DType::kBFloat16;
  problem.head_dim = 128;
  problem.lengths = {1500, 300, 248};
  const Plan plan = Plan::from_lengths(problem.lengths, kRanks);
  const auto groups = Communicator::threads(kRanks);
  std::vector<int> wrong(kRanks, 0);
  on_ranks(kRanks, [&](int rank) {
    const Device device{DeviceType::kCuda, rank % cuda::device_count()};
    cuda::use_device(device);
    const Communicator& threads = groups[static_cast<std::size_t>(rank)];
    const Communicator group = Communicator::peer(threads, device.index);
    try {
      const auto stream = cuda::make_stream(device);
      const cudaStream_t queue = cuda::as_stream(stream.get());
      AttentionOptions options;
      options.stream = stream.get();
      const Tensors t = make_tensors(problem, plan.local_tokens(rank), device);
      const auto step = [&] {
        forward(t.q, t.k, t.v, plan, group, options, t.out, t.lse);
        backward(t.dout, t.q, t.k, t.v, t.out, t.lse, plan, group, options, t.dq, t.dk, t.dv);
      };
      step();
      step();
      cuda::synchronize(device, stream.get());
      const First want{read(t.out), read(t.lse), values(t.dq), values(t.dk), values(t.dv)};
      const auto compare = [&](const char* what) {
        cuda::synchronize(device, stream.get());
        const bool same = read(t.out) == want.out && read(t.lse) == want.lse &&
                          distance(values(t.dq), want.dq) < 5e-3 &&
                          distance(values(t.dk), want.dk) < 5e-3 &&
                          distance(values(t.dv), want.dv) < 5e-3;
        if (same) return;
        std::printf("rank %d: %s differs\n", rank, what);
        ++wrong[static_cast<std::size_t>(rank)];
      };
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t exec = nullptr;
      cuda::check(cudaStreamBeginCapture(queue, cudaStreamCaptureModeThreadLocal), "begin capture");
      step();
      cuda::check(cudaStreamEndCapture(queue, &graph), "end capture");
      cuda::check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
      for (int round = 0; round < 5; ++round) {
        poison(t, queue);
        for (int i = 0; i < 3; ++i) cuda::check(cudaGraphLaunch(exec, queue), "launch");
        compare("a replay");
        // Plain steps between the replays.
        poison(t, queue);
        step();
        if (round % 2 == 0) compare("a step between replays");
      }
      cuda::synchronize(device, stream.get());
      group.barrier();
      cuda::check(cudaGraphExecDestroy(exec), "destroy");
      cuda::check(cudaGraphDestroy(graph), "destroy");
    } catch (const std::exception& error) {
      threads.abort(error.what());
      throw;
    }
  });
  for (const int count : wrong) EXPECT_EQ(count, 0);
}

}  // namespace
}  // namespace zigzag::gpu_test
