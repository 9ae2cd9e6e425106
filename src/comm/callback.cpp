#include <algorithm>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "comm/exchange.h"
#include "comm/factories.h"
#include "comm/rounds.h"
#include "comm/sum.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

std::int64_t sum_row_bytes(std::span<const RowView> views) {
  std::int64_t bytes = 0;
  for (const RowView& view : views) bytes += view.row_bytes;
  return bytes;
}

// Exchanges through the caller's all_to_all: per round one packed message a peer, which holds the
// rows of every tensor one after another. Deadlines are the caller's.
class CallbackTransport final : public Transport {
 public:
  explicit CallbackTransport(CallbackCollectives collectives)
      : collectives_(std::move(collectives)) {}

  int rank() const override { return collectives_.rank; }
  int size() const override { return collectives_.size; }
  std::string_view name() const override { return "callback"; }

  void all_gather(std::span<const std::byte> in, std::span<std::byte> out) override {
    if (size() == 1) {
      std::copy(in.begin(), in.end(), out.begin());
      return;
    }
    collectives_.all_gather(in.data(), in.size(), out.data());
  }

  void barrier() override {
    const std::byte one{1};
    std::vector<std::byte> all(static_cast<std::size_t>(size()));
    all_gather({&one, 1}, all);
  }

  void abort(std::string_view reason) noexcept override {
    if (!collectives_.abort || size() == 1) return;
    try {
      collectives_.abort(reason);
    } catch (...) {
      // The peers' own deadlines end their waits.
    }
  }

  void gather(std::span<const TensorView> sources, std::span<const TensorView> destinations,
              const ExchangeTable& table, const Step& /*step*/, Queue /*queue*/) override {
    check_gather(sources, destinations, table, rank(), size());
    const std::vector<RowView> from = row_views(sources);
    const std::vector<RowView> to = row_views(destinations);
    gather_own(sources, destinations, table, rank());
    if (size() == 1) return;
    const std::int64_t row_bytes = sum_row_bytes(from);
    const Rounds rounds = make_rounds(table, row_bytes, 2 * std::int64_t{size()});
    for (std::int64_t t = 0; t < rounds.count; ++t) {
      const std::int64_t begin = rounds.begin(t);
      const std::int64_t end = rounds.end(t);
      exchange(table.sends, table.receives, row_bytes, begin, end, [&](int peer, std::byte* out) {
        for (const RowView& view : from) {
          out += pack_rows(view, Side::kSource, of(table.sends, peer), begin, end, out);
        }
      });
      std::byte* in = receive_.data();
      for (int peer = 0; peer < size(); ++peer) {
        if (peer == rank()) continue;
        for (const RowView& view : to) {
          in += unpack_rows(view, Side::kDestination, of(table.receives, peer), begin, end, in);
        }
      }
    }
  }

  void reduce(std::span<const TensorView> partials, std::span<const TensorView> destinations,
              const ExchangeTable& table, const Step& /*step*/, Queue /*queue*/) override {
    check_reduce(partials, destinations, table, rank(), size());
    const std::vector<RowView> from = row_views(partials);
    row_views(destinations);
    const std::int64_t row_bytes = sum_row_bytes(from);
    const Rounds rounds = make_rounds(table, row_bytes, 2 * std::int64_t{size()});
    for (std::int64_t t = 0; t < rounds.count; ++t) {
      const std::int64_t begin = rounds.begin(t);
      const std::int64_t end = rounds.end(t);
      if (size() > 1) {
        exchange(table.receives, table.sends, row_bytes, begin, end, [&](int peer, std::byte* out) {
          for (const RowView& view : from) {
            out += pack_rows(view, Side::kDestination, of(table.receives, peer), begin, end, out);
          }
        });
      }
      sum_round(partials, destinations, table, begin, end);
    }
  }

 private:
  using PerRank = std::vector<std::vector<Segment>>;

  static std::span<const Segment> of(const PerRank& segments, int peer) {
    return segments[static_cast<std::size_t>(peer)];
  }

  // One all_to_all of the rows [begin, end) of every shard; `pack` fills a peer's message.
  template <typename Pack>
  void exchange(const PerRank& given, const PerRank& taken, std::int64_t row_bytes,
                std::int64_t begin, std::int64_t end, Pack&& pack) {
    std::vector<std::int64_t> send_bytes(static_cast<std::size_t>(size()), 0);
    std::vector<std::int64_t> receive_bytes(static_cast<std::size_t>(size()), 0);
    std::int64_t send_total = 0;
    std::int64_t receive_total = 0;
    for (int peer = 0; peer < size(); ++peer) {
      if (peer == rank()) continue;
      const auto p = static_cast<std::size_t>(peer);
      send_bytes[p] = count_rows(given[p], begin, end) * row_bytes;
      receive_bytes[p] = count_rows(taken[p], begin, end) * row_bytes;
      send_total += send_bytes[p];
      receive_total += receive_bytes[p];
    }
    grow(send_, send_total);
    grow(receive_, receive_total);
    std::byte* out = send_.data();
    for (int peer = 0; peer < size(); ++peer) {
      if (peer == rank()) continue;
      pack(peer, out);
      out += send_bytes[static_cast<std::size_t>(peer)];
    }
    collectives_.all_to_all(send_.data(), send_bytes, receive_.data(), receive_bytes);
  }

  // Adds the round's rows: the peers' from the message, this rank's own from where they are.
  void sum_round(std::span<const TensorView> partials, std::span<const TensorView> destinations,
                 const ExchangeTable& table, std::int64_t begin, std::int64_t end) const {
    const auto ranks = static_cast<std::size_t>(size());
    std::vector<std::vector<Segment>> packed(ranks);
    std::vector<const float*> next(ranks, nullptr);
    const auto* in = reinterpret_cast<const float*>(receive_.data());
    std::int64_t width = 0;
    for (const TensorView& view : partials) width += view.row_elements();
    for (std::size_t p = 0; p < ranks; ++p) {
      if (static_cast<int>(p) == rank()) continue;
      packed[p] = packed_segments(table.sends[p], begin, end);
      next[p] = in;
      in += count_rows(table.sends[p], begin, end) * width;
    }
    std::vector<Contribution> contributions(ranks);
    const std::int64_t last = std::min(end, table.local_tokens);
    for (std::size_t t = 0; t < partials.size(); ++t) {
      for (std::size_t p = 0; p < ranks; ++p) {
        if (static_cast<int>(p) == rank()) {
          contributions[p] = {table.sends[p], partials[t].as<const float>()};
          continue;
        }
        contributions[p] = {packed[p], next[p]};
        next[p] += count_rows(packed[p], begin, end) * partials[t].row_elements();
      }
      sum_rows(destinations[t], begin, last, contributions);
    }
  }

  static void grow(std::vector<std::byte>& buffer, std::int64_t bytes) {
    // At least one byte, so that callers never see a null pointer.
    const auto needed = static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1));
    if (buffer.size() < needed) buffer.resize(needed);
  }

  CallbackCollectives collectives_;
  std::vector<std::byte> send_;
  std::vector<std::byte> receive_;
};

}  // namespace

std::shared_ptr<Transport> make_callback_transport(CallbackCollectives collectives) {
  if (collectives.size < 1 || collectives.rank < 0 || collectives.rank >= collectives.size) {
    throw InvalidArgument(
        fmt::format("a callback group was given rank {} of {}; the size must be "
                    "at least 1 and the rank 0 to size - 1",
                    collectives.rank, collectives.size));
  }
  if (!collectives.all_gather || !collectives.all_to_all) {
    throw InvalidArgument(fmt::format("a callback group was given no {}; both functions are needed",
                                      collectives.all_gather ? "all_to_all" : "all_gather"));
  }
  return std::make_shared<CallbackTransport>(std::move(collectives));
}

}  // namespace zigzag::comm
