#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <unistd.h>

#include "comm/mpi_environment.h"
#include "comm_model.h"
#include "zigzag/attention.h"
#include "zigzag/communicator.h"
#include "zigzag/error.h"

// failing_rank HOW WHERE: under mpirun, the last rank fails while the others exchange.
//   HOW    kill: SIGKILL; throw: an exception between exchanges; silent: never comes again;
//          differ: makes another call than the others; never: it does not fail, something else
//          has to
//   WHERE  gather, reduce, barrier or all_gather: where the others wait; forward or backward:
//          inside that call, in its second gather; reduction: inside a backward, in its second
//          reduction; end: between its last exchange and MPI_Finalize
// Every other rank prints what it got and exits as the command does: 3 for the environment.
namespace {

using zigzag::Communicator;
using zigzag::test::ExchangeCase;

void fail(const Communicator& communicator, const std::string& how) {
  if (how == "kill") {
    std::raise(SIGKILL);
  } else if (how == "differ") {
    communicator.all_gather(std::vector<std::byte>(8));
  } else if (how == "throw") {
    communicator.abort("no space left for the gradient");
    throw std::runtime_error("no space left for the gradient");
  } else {
    std::this_thread::sleep_for(std::chrono::seconds(4));
    std::_Exit(3);
  }
}

// A rank's transport that fails in the second stage of the second call.
class FailingTransport final : public zigzag::comm::Transport {
 public:
  FailingTransport(Communicator inner, std::string how, std::string where)
      : inner_(std::move(inner)), how_(std::move(how)), where_(std::move(where)) {}

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  std::string_view name() const override { return inner_.name(); }
  void all_gather(std::span<const std::byte> in, std::span<std::byte> out) override {
    inner_.transport().all_gather(in, out);
  }
  void barrier() override { inner_.barrier(); }
  void abort(std::string_view reason) noexcept override { inner_.abort(reason); }
  void gather(std::span<const zigzag::TensorView> sources,
              std::span<const zigzag::TensorView> destinations,
              const zigzag::comm::ExchangeTable& table, const zigzag::comm::Step& step,
              zigzag::Queue queue) override {
    if (where_ != "reduction" && ++calls_ == 4) fail(inner_, how_);
    inner_.transport().gather(sources, destinations, table, step, queue);
  }
  void reduce(std::span<const zigzag::TensorView> partials,
              std::span<const zigzag::TensorView> destinations,
              const zigzag::comm::ExchangeTable& table, const zigzag::comm::Step& step,
              zigzag::Queue queue) override {
    if (where_ == "reduction" && ++calls_ == 4) fail(inner_, how_);
    inner_.transport().reduce(partials, destinations, table, step, queue);
  }

 private:
  Communicator inner_;
  std::string how_;
  std::string where_;
  int calls_ = 0;
};

// Forward or backward again and again, in two stages each.
void attend(const Communicator& communicator, const std::string& where, const ExchangeCase& c) {
  const zigzag::Plan plan = zigzag::Plan::from_lengths(c.lengths, communicator.size());
  const std::int64_t rows = plan.local_tokens(communicator.rank());
  std::vector<std::vector<float>> memory;
  const auto tensor = [&](std::vector<std::int64_t> shape) {
    auto view = zigzag::TensorView::contiguous(nullptr, zigzag::DType::kFloat32, std::move(shape));
    memory.emplace_back(static_cast<std::size_t>(view.num_elements()), 0.25f);
    view.data = memory.back().data();
    return view;
  };
  const auto q = tensor({rows, c.heads, c.head_dim});
  const auto k = tensor({rows, 2, c.head_dim});
  const auto v = tensor({rows, 2, c.head_dim});
  const auto out = tensor({rows, c.heads, c.head_dim});
  const auto lse = tensor({rows, c.heads});
  zigzag::AttentionOptions options;
  options.kv_heads_per_stage = 1;
  if (where == "forward") {
    for (;;) zigzag::forward(q, k, v, plan, communicator, options, out, lse);
  }
  const auto dq = tensor({rows, c.heads, c.head_dim});
  const auto dk = tensor({rows, 2, c.head_dim});
  const auto dv = tensor({rows, 2, c.head_dim});
  for (;;) zigzag::backward(q, q, k, v, out, lse, plan, communicator, options, dq, dk, dv);
}

bool attends(const std::string& where) {
  return where == "forward" || where == "backward" || where == "reduction";
}

void exchange(const Communicator& communicator, const std::string& where, const ExchangeCase& c) {
  if (where == "gather") {
    zigzag::test::check_gather(communicator, c);
  } else if (where == "reduce") {
    zigzag::test::check_reduce(communicator, c);
  } else if (where == "barrier") {
    communicator.barrier();
  } else {
    communicator.all_gather({});
    communicator.all_gather(std::vector<std::byte>(100));
  }
}

int run(const std::string& how, const std::string& where) {
  const zigzag::comm::MpiEnvironment mpi([](const std::string& sentence) {
    std::fprintf(stderr, "%s\n", sentence.c_str());
    zigzag::comm::linger_before_exit();
    std::_Exit(3);
  });
  const Communicator communicator = Communicator::mpi();
  const ExchangeCase c{.name = "failing", .lengths = {900, 300, 5}, .heads = 16, .head_dim = 64};
  try {
    if (attends(where)) {
      const bool last = how != "never" && mpi.rank() == mpi.size() - 1;
      attend(last ? Communicator(std::make_shared<FailingTransport>(communicator, how, where))
                  : communicator,
             where, c);
    }
    for (int i = 0; i < 3; ++i) exchange(communicator, where, c);
    if (how != "never" && mpi.rank() == mpi.size() - 1) fail(communicator, how);
    if (where == "end") return 0;
    for (int i = 0; i < 100000; ++i) exchange(communicator, where, c);
  } catch (const zigzag::EnvironmentError& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 4;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int code = run(argv[1], argv[2]);
  if (code != 0) {
    zigzag::comm::linger_before_exit();
    if (zigzag::comm::mpi_has_failed()) std::_Exit(code);
  }
  return code;
}
