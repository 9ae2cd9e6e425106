#include "support/ranks.h"

#include <chrono>
#include <exception>
#include <stdexcept>
#include <thread>
#include <utility>

#include "support/random.h"
#include "zigzag/error.h"

namespace zigzag::test {

namespace {

std::vector<std::exception_ptr> run(int world_size,
                                    const std::function<void(const Communicator&)>& work) {
  std::vector<Communicator> group = Communicator::threads(world_size);
  std::vector<std::exception_ptr> failures(group.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < group.size(); ++r) {
    threads.emplace_back([&, r, communicator = std::move(group[r])]() mutable {
      // Moved here, so that the rank leaves the group when its work ends.
      const Communicator own = std::move(communicator);
      try {
        work(own);
      } catch (...) {
        failures[r] = std::current_exception();
      }
    });
  }
  group.clear();
  for (std::thread& thread : threads) thread.join();
  return failures;
}

class DelayedTransport final : public comm::Transport {
 public:
  DelayedTransport(Communicator inner, std::uint64_t seed, int most_microseconds)
      : inner_(std::move(inner)),
        stream_(mix(seed, static_cast<std::uint64_t>(inner_.rank()))),
        most_microseconds_(most_microseconds) {}

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  std::string_view name() const override { return inner_.name(); }
  void all_gather(std::span<const std::byte> in, std::span<std::byte> out) override {
    wait();
    inner_.transport().all_gather(in, out);
  }
  void barrier() override {
    wait();
    inner_.barrier();
  }
  void abort(std::string_view reason) noexcept override { inner_.abort(reason); }
  void gather(std::span<const TensorView> sources, std::span<const TensorView> destinations,
              const comm::ExchangeTable& table, const comm::Step& step, Queue queue) override {
    wait();
    inner_.transport().gather(sources, destinations, table, step, queue);
    wait();
  }
  void reduce(std::span<const TensorView> partials, std::span<const TensorView> destinations,
              const comm::ExchangeTable& table, const comm::Step& step, Queue queue) override {
    wait();
    inner_.transport().reduce(partials, destinations, table, step, queue);
    wait();
  }

 private:
  void wait() {
    if (most_microseconds_ == 0) return;
    std::this_thread::sleep_for(std::chrono::microseconds(stream_.integer(0, most_microseconds_)));
  }

  Communicator inner_;
  Stream stream_;
  int most_microseconds_;
};

class ForbiddenTransport final : public comm::Transport {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::string_view name() const override { return "forbidden"; }
  void all_gather(std::span<const std::byte> /*in*/, std::span<std::byte> /*out*/) override {
    throw std::logic_error("a rank alone exchanged bytes");
  }
  void barrier() override { throw std::logic_error("a rank alone waited at a barrier"); }
  void abort(std::string_view /*reason*/) noexcept override {}
  void gather(std::span<const TensorView> /*sources*/, std::span<const TensorView> /*destinations*/,
              const comm::ExchangeTable& /*table*/, const comm::Step& /*step*/,
              Queue /*queue*/) override {
    throw std::logic_error("a rank alone gathered");
  }
  void reduce(std::span<const TensorView> /*partials*/,
              std::span<const TensorView> /*destinations*/, const comm::ExchangeTable& /*table*/,
              const comm::Step& /*step*/, Queue /*queue*/) override {
    throw std::logic_error("a rank alone reduced");
  }
};

}  // namespace

void run_ranks(int world_size, const std::function<void(const Communicator&)>& work) {
  std::exception_ptr reported;
  for (const std::exception_ptr& failure : run(world_size, work)) {
    if (!failure) continue;
    try {
      std::rethrow_exception(failure);
    } catch (const CommunicationError&) {
      if (!reported) reported = failure;
    }
  }
  if (reported) std::rethrow_exception(reported);
}

std::vector<std::string> collect_ranks(int world_size,
                                       const std::function<void(const Communicator&)>& work) {
  std::vector<std::string> result;
  for (const std::exception_ptr& failure : run(world_size, work)) {
    result.emplace_back();
    if (!failure) continue;
    try {
      std::rethrow_exception(failure);
    } catch (const InvalidArgument& error) {
      result.back() = std::string("InvalidArgument: ") + error.what();
    } catch (const CommunicationError& error) {
      result.back() = std::string("CommunicationError: ") + error.what();
    } catch (const Timeout& error) {
      result.back() = std::string("Timeout: ") + error.what();
    } catch (const std::exception& error) {
      result.back() = std::string("exception: ") + error.what();
    }
  }
  return result;
}

Communicator delayed(const Communicator& communicator, std::uint64_t seed) {
  return Communicator(std::make_shared<DelayedTransport>(communicator, seed, 3000));
}

Communicator gathering(const Communicator& communicator) {
  return Communicator(std::make_shared<DelayedTransport>(communicator, 0, 0));
}

Communicator forbidden() { return Communicator(std::make_shared<ForbiddenTransport>()); }

}  // namespace zigzag::test
