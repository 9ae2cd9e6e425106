#include <algorithm>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <mpi.h>

#include "comm/exchange.h"
#include "comm/factories.h"
#include "comm/mpi_link.h"
#include "comm/rounds.h"
#include "comm/sum.h"
#include "comm/wait.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

// A round under way. Two are in flight at a time, so that the next one's messages travel while
// this one's rows are placed or added.
struct Round {
  struct Arrival {
    int peer;
    std::size_t tensor;
    std::byte* data;
    bool placed;  // received where it belongs
  };
  MpiBatch batch;
  std::vector<std::byte> send;
  std::vector<std::byte> receive;
  std::vector<Arrival> arrivals;
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

// Ranks are processes: one message per peer, tensor and round. Rows that are one run of bytes are
// sent from and received into their place; others go through bounded scratch memory.
class MpiTransport final : public Transport {
 public:
  MpiTransport(MPI_Comm communicator, double timeout) : link_(communicator, timeout) {}

  int rank() const override { return link_.rank(); }
  int size() const override { return link_.size(); }
  std::string_view name() const override { return "mpi"; }

  void all_gather(std::span<const std::byte> in, std::span<std::byte> out) override {
    exchange_bytes(in, out, "the exchange of a few bytes");
  }

  void barrier() override {
    const std::byte one{1};
    std::vector<std::byte> all(static_cast<std::size_t>(size()));
    exchange_bytes({&one, 1}, all, "barrier");
  }

  void abort(std::string_view reason) noexcept override {
    if (!settled_) link_.abort(reason);
  }

  void settle() noexcept override {
    try {
      barrier();
    } catch (...) {
      // The reason for which this rank is about to throw counts, not a peer's haste.
    }
    settled_ = true;
  }

  void gather(std::span<const TensorView> sources, std::span<const TensorView> destinations,
              const ExchangeTable& table, const Step& step, Queue /*queue*/) override {
    check_gather(sources, destinations, table, rank(), size());
    const std::vector<RowView> from = row_views(sources);
    const std::vector<RowView> to = row_views(destinations);
    run_rounds(
        table, from, step,
        [&](Round& round) { start(round, from, Side::kSource, table.sends, to, table.receives); },
        [&](const Round& round) {
          for (const Round::Arrival& arrival : round.arrivals) {
            if (arrival.placed) continue;
            unpack_rows(to[arrival.tensor], Side::kDestination, of(table.receives, arrival.peer),
                        round.begin, round.end, arrival.data);
          }
        },
        [&] { gather_own(sources, destinations, table, rank()); });
  }

  void reduce(std::span<const TensorView> partials, std::span<const TensorView> destinations,
              const ExchangeTable& table, const Step& step, Queue /*queue*/) override {
    check_reduce(partials, destinations, table, rank(), size());
    const std::vector<RowView> from = row_views(partials);
    row_views(destinations);
    run_rounds(
        table, from, step,
        [&](Round& round) {
          start(round, from, Side::kDestination, table.receives, {}, table.sends);
        },
        [&](const Round& round) { add(round, partials, destinations, table); }, [] {});
  }

 private:
  using PerRank = std::vector<std::vector<Segment>>;

  static std::span<const Segment> of(const PerRank& segments, int peer) {
    return segments[static_cast<std::size_t>(peer)];
  }

  void begin(std::string_view step) {
    settled_ = false;
    link_.begin(step);
  }

  void exchange_bytes(std::span<const std::byte> in, std::span<std::byte> out,
                      std::string_view step) {
    begin(step);
    const auto bytes = static_cast<std::int64_t>(in.size());
    MpiBatch batch;
    try {
      for (int peer = 0; peer < size(); ++peer) {
        if (peer != rank()) link_.receive(batch, peer, out.data() + peer * bytes, bytes);
      }
      for (int i = 1; i < size(); ++i) {
        link_.send(batch, (rank() + i) % size(), in.data(), bytes);
      }
      std::copy(in.begin(), in.end(), out.begin() + rank() * bytes);
      link_.wait(batch, step);
    } catch (...) {
      link_.release(batch);
      throw;
    }
  }

  template <typename Start, typename Finish, typename Meanwhile>
  void run_rounds(const ExchangeTable& table, std::span<const RowView> views, const Step& step,
                  Start&& start_round, Finish&& finish_round, Meanwhile&& meanwhile) {
    const std::string text = step_text(step);
    std::int64_t row_bytes = 0;
    for (const RowView& view : views) row_bytes += view.row_bytes;
    // A sent and a received message a peer and one block of packed rows, twice for two rounds.
    const Rounds rounds = make_rounds(table, row_bytes, 2 * (2 * std::int64_t{size()} - 1));
    const auto begin_round = [&](std::int64_t t) {
      Round& round = rounds_[t % 2];
      round.begin = rounds.begin(t);
      round.end = rounds.end(t);
      round.batch.clear();
      round.arrivals.clear();
      begin(text);
      start_round(round);
    };
    try {
      if (rounds.count > 0) begin_round(0);
      meanwhile();
      for (std::int64_t t = 0; t < rounds.count; ++t) {
        if (t + 1 < rounds.count) begin_round(t + 1);
        Round& round = rounds_[t % 2];
        link_.wait(round.batch, text);
        link_.confirm(round.batch, text);
        finish_round(round);
      }
    } catch (...) {
      for (Round& round : rounds_) link_.release(round.batch);
      throw;
    }
  }

  // Posts the receives and sends of a round. `to` is empty when all rows go through scratch.
  void start(Round& round, std::span<const RowView> from, Side from_side, const PerRank& given,
             std::span<const RowView> to, const PerRank& taken) {
    std::int64_t send_bytes = 0;
    std::int64_t receive_bytes = 0;
    for (const RowView& view : from) {
      for (int peer = 0; peer < size(); ++peer) {
        if (peer == rank()) continue;
        send_bytes += count_rows(of(given, peer), round.begin, round.end) * view.row_bytes;
        receive_bytes += count_rows(of(taken, peer), round.begin, round.end) * view.row_bytes;
      }
    }
    grow(round.send, send_bytes);
    grow(round.receive, receive_bytes);
    std::byte* scratch = round.receive.data();
    for (std::size_t t = 0; t < from.size(); ++t) {
      for (int peer = 0; peer < size(); ++peer) {
        const std::span<const Segment> rows = of(taken, peer);
        const std::int64_t bytes = count_rows(rows, round.begin, round.end) * from[t].row_bytes;
        if (peer == rank() || bytes == 0) continue;
        std::byte* place =
            to.empty() ? nullptr
                       : direct_rows(to[t], Side::kDestination, rows, round.begin, round.end);
        std::byte* data = place != nullptr ? place : scratch;
        if (place == nullptr) scratch += bytes;
        link_.receive(round.batch, peer, data, bytes);
        round.arrivals.push_back({peer, t, data, place != nullptr});
      }
    }
    scratch = round.send.data();
    for (std::size_t t = 0; t < from.size(); ++t) {
      for (int i = 1; i < size(); ++i) {
        const int peer = (rank() + i) % size();
        const std::span<const Segment> rows = of(given, peer);
        const std::int64_t bytes = count_rows(rows, round.begin, round.end) * from[t].row_bytes;
        if (bytes == 0) continue;
        const std::byte* data = direct_rows(from[t], from_side, rows, round.begin, round.end);
        if (data == nullptr) {
          pack_rows(from[t], from_side, rows, round.begin, round.end, scratch);
          data = scratch;
          scratch += bytes;
        }
        link_.send(round.batch, peer, data, bytes);
      }
    }
  }

  // Adds a round's rows in rank order: the peers' from scratch, this rank's own from their place.
  void add(const Round& round, std::span<const TensorView> partials,
           std::span<const TensorView> destinations, const ExchangeTable& table) const {
    const auto ranks = static_cast<std::size_t>(size());
    std::vector<std::vector<Segment>> packed(ranks);
    for (std::size_t p = 0; p < ranks; ++p) {
      if (static_cast<int>(p) != rank()) {
        packed[p] = packed_segments(table.sends[p], round.begin, round.end);
      }
    }
    const std::int64_t last = std::min(round.end, table.local_tokens);
    for (std::size_t t = 0; t < partials.size(); ++t) {
      std::vector<Contribution> contributions(ranks);
      const auto self = static_cast<std::size_t>(rank());
      contributions[self] = {table.sends[self], partials[t].as<const float>()};
      for (const Round::Arrival& arrival : round.arrivals) {
        if (arrival.tensor != t) continue;
        const auto p = static_cast<std::size_t>(arrival.peer);
        contributions[p] = {packed[p], reinterpret_cast<const float*>(arrival.data)};
      }
      sum_rows(destinations[t], round.begin, last, contributions);
    }
  }

  static void grow(std::vector<std::byte>& buffer, std::int64_t bytes) {
    if (buffer.size() < static_cast<std::size_t>(bytes)) {
      buffer.resize(static_cast<std::size_t>(bytes));
    }
  }

  MpiLink link_;
  Round rounds_[2];
  bool settled_ = false;
};

}  // namespace

std::shared_ptr<Transport> make_mpi_transport(void* mpi_comm, double timeout) {
  int initialised = 0;
  int finalised = 0;
  MPI_Initialized(&initialised);
  MPI_Finalized(&finalised);
  if (initialised == 0 || finalised != 0) {
    throw CommunicationError(
        fmt::format("MPI is {}; a program must call MPI_Init_thread before Communicator::mpi",
                    finalised != 0 ? "finalised" : "not initialised"));
  }
  int level = MPI_THREAD_SINGLE;
  int main_thread = 1;
  MPI_Query_thread(&level);
  MPI_Is_thread_main(&main_thread);
  if (level < MPI_THREAD_SERIALIZED && main_thread == 0) {
    throw CommunicationError(
        "Communicator::mpi was called outside the thread that initialised MPI; that needs "
        "MPI_THREAD_SERIALIZED");
  }
  MPI_Comm communicator = mpi_comm == nullptr ? MPI_COMM_WORLD : *static_cast<MPI_Comm*>(mpi_comm);
  return std::make_shared<MpiTransport>(communicator, timeout);
}

}  // namespace zigzag::comm
