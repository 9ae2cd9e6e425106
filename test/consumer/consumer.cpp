// Plans two documents over two ranks, runs the ranks as threads, and compares with one rank.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include <zigzag/zigzag.h>

namespace {

constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kHeadDim = 8;

std::vector<float> numbers(std::int64_t tokens, float phase) {
  std::vector<float> x(static_cast<std::size_t>(tokens * kHeads * kHeadDim));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(phase + 0.37F * static_cast<float>(i));
  return x;
}

zigzag::TensorView view(std::vector<float>& x, std::int64_t rows) {
  return zigzag::TensorView::contiguous(x.data(), zigzag::DType::kFloat32,
                                        {rows, kHeads, kHeadDim});
}

// The attention output in global order, computed by `ranks` threads.
std::vector<float> attend(std::int64_t ranks) {
  const std::vector<std::int64_t> lengths = {5, 11};
  const zigzag::Plan plan = zigzag::Plan::from_lengths(lengths, ranks);
  const std::int64_t tokens = plan.total_tokens();
  std::vector<float> q = numbers(tokens, 0), k = numbers(tokens, 1), v = numbers(tokens, 2);
  std::vector<float> out(q.size());

  const auto group = zigzag::Communicator::threads(static_cast<int>(ranks));
  std::vector<std::thread> threads;
  for (std::int64_t rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      const std::int64_t rows = plan.local_tokens(rank);
      const auto size = static_cast<std::size_t>(rows * kHeads * kHeadDim);
      std::vector<float> local_q(size), local_k(size), local_v(size), local_out(size);
      std::vector<float> lse(static_cast<std::size_t>(rows * kHeads));
      zigzag::shard(view(q, tokens), plan, rank, view(local_q, rows));
      zigzag::shard(view(k, tokens), plan, rank, view(local_k, rows));
      zigzag::shard(view(v, tokens), plan, rank, view(local_v, rows));
      zigzag::forward(
          view(local_q, rows), view(local_k, rows), view(local_v, rows), plan,
          group[static_cast<std::size_t>(rank)], zigzag::AttentionOptions{}, view(local_out, rows),
          zigzag::TensorView::contiguous(lse.data(), zigzag::DType::kFloat32, {rows, kHeads}));
      zigzag::unshard_rank(view(local_out, rows), plan, rank, view(out, tokens));
    });
  }
  for (std::thread& thread : threads) thread.join();
  return out;
}

}  // namespace

int main() {
  const std::vector<float> one = attend(1);
  const std::vector<float> two = attend(2);
  for (std::size_t i = 0; i < one.size(); ++i) {
    if (!(one[i] == two[i]) || one[i] == 0.0F) {
      std::printf("element %zu: %g on one rank, %g on two\n", i, one[i], two[i]);
      return 1;
    }
  }
  std::printf("consumer: %zu elements equal on one rank and on two, zigzag %s\n", one.size(),
              std::string(zigzag::version()).c_str());
  return 0;
}
