#include "comm_groups.h"

#include <barrier>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>

#include "support/ranks.h"
#include "zigzag/error.h"

namespace zigzag::test {
namespace {

// What the ranks of a simulated group show each other between two barriers.
struct Board {
  explicit Board(int size) : barrier(size), sends(static_cast<std::size_t>(size)) {}
  struct Send {
    const std::byte* data;
    std::vector<std::int64_t> bytes;
  };
  std::barrier<> barrier;
  std::vector<Send> sends;
};

}  // namespace

CallbackCollectives simulated_collectives(int rank, int size, void* shared) {
  auto* board = static_cast<Board*>(shared);
  const auto self = static_cast<std::size_t>(rank);
  CallbackCollectives collectives;
  collectives.rank = rank;
  collectives.size = size;
  collectives.all_gather = [=](const void* in, std::size_t bytes, void* out) {
    board->sends[self] = {static_cast<const std::byte*>(in), {static_cast<std::int64_t>(bytes)}};
    board->barrier.arrive_and_wait();
    for (std::size_t r = 0; r < board->sends.size() && bytes > 0; ++r) {
      std::memcpy(static_cast<std::byte*>(out) + r * bytes, board->sends[r].data, bytes);
    }
    board->barrier.arrive_and_wait();
  };
  collectives.all_to_all = [=](const void* send, std::span<const std::int64_t> send_bytes,
                               void* receive, std::span<const std::int64_t> receive_bytes) {
    board->sends[self] = {static_cast<const std::byte*>(send),
                          {send_bytes.begin(), send_bytes.end()}};
    board->barrier.arrive_and_wait();
    auto* out = static_cast<std::byte*>(receive);
    bool fits = true;
    for (std::size_t r = 0; r < board->sends.size(); ++r) {
      const Board::Send& from = board->sends[r];
      std::int64_t offset = 0;
      for (std::size_t p = 0; p < self; ++p) offset += from.bytes[p];
      fits = fits && from.bytes[self] == receive_bytes[r];
      if (!fits) break;
      std::memcpy(out, from.data + offset, static_cast<std::size_t>(from.bytes[self]));
      out += from.bytes[self];
    }
    board->barrier.arrive_and_wait();
    if (!fits) throw std::logic_error("a rank expects other sizes than its peer sends");
  };
  return collectives;
}

std::string outcome(const RankBody& body, const Communicator& communicator) {
  try {
    body(communicator);
    return {};
  } catch (const InvalidArgument& error) {
    return std::string("InvalidArgument: ") + error.what();
  } catch (const CommunicationError& error) {
    return std::string("CommunicationError: ") + error.what();
  } catch (const Timeout& error) {
    return std::string("Timeout: ") + error.what();
  } catch (const std::exception& error) {
    return std::string("exception: ") + error.what();
  }
}

std::vector<std::string> SelfGroup::run(int /*size*/, const RankBody& body) {
  return {outcome(body, Communicator::self())};
}

std::vector<std::string> ThreadsGroup::run(int size, const RankBody& body) {
  return collect_ranks(size, body);
}

std::vector<std::string> CallbackGroup::run(int size, const RankBody& body) {
  Board board(size);
  std::vector<std::string> outcomes(static_cast<std::size_t>(size));
  std::vector<std::thread> threads;
  for (int r = 0; r < size; ++r) {
    threads.emplace_back([&, r] {
      outcomes[static_cast<std::size_t>(r)] =
          outcome(body, Communicator::callback(simulated_collectives(r, size, &board)));
    });
  }
  for (std::thread& thread : threads) thread.join();
  return outcomes;
}

}  // namespace zigzag::test
