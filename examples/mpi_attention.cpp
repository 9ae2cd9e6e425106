// Exact attention over the processes of MPI, forward and backward.
//
//   mpirun -n 4 build/default/examples/mpi_attention
//
// Every process draws the same pack from a seed, takes its zigzag rows, and computes attention and
// its gradients together with the others. Rank 0 then compares the rows of all processes with one
// rank's: out and dq bit for bit, dk and dv up to float32 rounding.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <limits>
#include <random>
#include <vector>

#include <mpi.h>

#include "zigzag/zigzag.h"

namespace {

constexpr std::int64_t kHeads = 8;
constexpr std::int64_t kKvHeads = 2;
constexpr std::int64_t kHeadDim = 64;

/// A tensor that owns its numbers, [tokens, heads, head_dim] or [tokens, heads].
struct Tensor {
  std::vector<std::int64_t> shape;
  std::vector<float> data;

  explicit Tensor(std::vector<std::int64_t> dims) : shape(std::move(dims)) {
    std::int64_t elements = 1;
    for (const std::int64_t dim : shape) {
      elements *= dim;
    }
    data.resize(static_cast<std::size_t>(elements));
  }

  zigzag::TensorView view() {
    return zigzag::TensorView::contiguous(data.data(), zigzag::DType::kFloat32, shape);
  }
};

Tensor random(std::int64_t tokens, std::int64_t heads, unsigned seed) {
  Tensor tensor({tokens, heads, kHeadDim});
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::generate(tensor.data.begin(), tensor.data.end(), [&] { return normal(generator); });
  return tensor;
}

/// What one rank holds: its rows of the inputs, and the results for them.
struct Step {
  Tensor q, k, v, dout, out, lse, dq, dk, dv;

  explicit Step(std::int64_t rows)
      : q({rows, kHeads, kHeadDim}),
        k({rows, kKvHeads, kHeadDim}),
        v({rows, kKvHeads, kHeadDim}),
        dout({rows, kHeads, kHeadDim}),
        out({rows, kHeads, kHeadDim}),
        lse({rows, kHeads}),
        dq({rows, kHeads, kHeadDim}),
        dk({rows, kKvHeads, kHeadDim}),
        dv({rows, kKvHeads, kHeadDim}) {}
};

Step run(const zigzag::Plan& plan, const zigzag::Communicator& group) {
  const std::int64_t rank = group.rank();
  const std::int64_t tokens = plan.total_tokens();
  Step step(plan.local_tokens(rank));
  const auto take = [&](Tensor whole, Tensor& rows) {
    zigzag::shard(whole.view(), plan, rank, rows.view());
  };
  take(random(tokens, kHeads, 1), step.q);
  take(random(tokens, kKvHeads, 2), step.k);
  take(random(tokens, kKvHeads, 3), step.v);
  take(random(tokens, kHeads, 4), step.dout);
  const zigzag::AttentionOptions options;
  zigzag::forward(step.q.view(), step.k.view(), step.v.view(), plan, group, options,
                  step.out.view(), step.lse.view());
  zigzag::backward(step.dout.view(), step.q.view(), step.k.view(), step.v.view(), step.out.view(),
                   step.lse.view(), plan, group, options, step.dq.view(), step.dk.view(),
                   step.dv.view());
  return step;
}

/// The largest difference of a rank's rows to those of the whole pack; NaN counts as infinite.
double largest_difference(const zigzag::Plan& plan, std::int64_t rank, Tensor whole,
                          const Tensor& rows) {
  Tensor expected(rows.shape);
  zigzag::shard(whole.view(), plan, rank, expected.view());
  double largest = 0;
  for (std::size_t i = 0; i < rows.data.size(); ++i) {
    const double difference = std::abs(double{rows.data[i]} - double{expected.data[i]});
    largest = std::isnan(difference) ? std::numeric_limits<double>::infinity()
                                     : std::max(largest, difference);
  }
  return largest;
}

bool main_on_ranks() {
  const zigzag::Communicator group = zigzag::Communicator::mpi();
  const std::vector<std::int64_t> lengths = {509, 3, 250};
  const auto plan = zigzag::Plan::from_lengths(lengths, group.size());
  const Step mine = run(plan, group);
  const Step alone = run(zigzag::Plan::from_lengths(lengths, 1), zigzag::Communicator::self());

  struct Row {
    const char* name;
    const Tensor& whole;
    const Tensor& part;
    double bound;
  };
  bool passed = true;
  for (const Row& row : {Row{"out", alone.out, mine.out, 0.0}, Row{"dq", alone.dq, mine.dq, 0.0},
                         Row{"dk", alone.dk, mine.dk, 2e-5}, Row{"dv", alone.dv, mine.dv, 2e-5}}) {
    const double here = largest_difference(plan, group.rank(), row.whole, row.part);
    double largest = 0;
    MPI_Allreduce(&here, &largest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    passed = passed && largest <= row.bound;
    if (group.rank() == 0) {
      std::printf("%3s: largest difference of %d ranks to one %.1e\n", row.name, group.size(),
                  largest);
    }
  }
  return passed;
}

}  // namespace

int main(int argc, char** argv) {
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  int status = 1;
  try {
    status = main_on_ranks() ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "mpi_attention: %s\n", error.what());
    MPI_Abort(MPI_COMM_WORLD, 3);
  }
  MPI_Finalize();
  return status;
}
