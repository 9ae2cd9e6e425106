#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "comm/exchange.h"
#include "comm/factories.h"
#include "comm/sum.h"
#include "comm/thread_group.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

// One rank of a group of threads: peers' rows are read straight from their memory, in one copy.
class ThreadsTransport final : public Transport {
 public:
  ThreadsTransport(std::shared_ptr<ThreadGroup> group, int rank)
      : group_(std::move(group)), rank_(rank) {}
  ~ThreadsTransport() override { group_->leave(rank_); }
  ThreadsTransport(const ThreadsTransport&) = delete;
  ThreadsTransport& operator=(const ThreadsTransport&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }
  std::string_view name() const override { return "threads"; }

  void all_gather(std::span<const std::byte> in, std::span<std::byte> out) override {
    const Meeting meeting(*this, {.kind = Offer::Kind::kAllGather,
                                  .step = {.name = "the exchange of a few bytes"},
                                  .bytes = in,
                                  .views = {}});
    for (int r = 0; r < size(); ++r) {
      const auto bytes = group_->offer(r).bytes;
      std::copy(bytes.begin(), bytes.end(),
                out.begin() + static_cast<std::ptrdiff_t>(in.size()) * r);
    }
  }

  void barrier() override {
    const Meeting meeting(
        *this,
        {.kind = Offer::Kind::kBarrier, .step = {.name = "barrier"}, .bytes = {}, .views = {}});
  }

  void abort(std::string_view reason) noexcept override { group_->fail(rank_, reason); }

  void gather(std::span<const TensorView> sources, std::span<const TensorView> destinations,
              const ExchangeTable& table, const Step& step, Queue /*queue*/) override {
    check_gather(sources, destinations, table, rank_, size());
    const std::vector<RowView> to = row_views(destinations);
    row_views(sources);  // refuses what peers could not read, before they come
    const Meeting meeting(
        *this, {.kind = Offer::Kind::kGather, .step = step, .bytes = {}, .views = sources});
    // Ranks start at their own rows and go round, so that they do not all read one memory at once.
    for (int i = 0; i < size(); ++i) {
      const int peer = (rank_ + i) % size();
      const std::vector<RowView> from = row_views(group_->offer(peer).views);
      for (const Segment& s : table.receives[static_cast<std::size_t>(peer)]) {
        for (std::size_t t = 0; t < to.size(); ++t) {
          copy_rows(to[t], s.destination_row, from[t], s.source_row, s.rows);
        }
      }
    }
  }

  bool lends() const override { return true; }

  std::unique_ptr<Loan> lend(std::span<const TensorView> sources, const ExchangeTable& table,
                             const Step& step) override {
    check_loan(sources, table, rank_, size());
    row_views(sources);  // refuses what peers could not read, before they come
    return std::make_unique<ThreadsLoan>(*this, sources, step);
  }

  void reduce(std::span<const TensorView> partials, std::span<const TensorView> destinations,
              const ExchangeTable& table, const Step& step, Queue /*queue*/) override {
    check_reduce(partials, destinations, table, rank_, size(), true);
    row_views(partials);
    row_views(destinations);
    const Meeting meeting(
        *this, {.kind = Offer::Kind::kReduce, .step = step, .bytes = {}, .views = partials});
    for (std::size_t t = 0; t < destinations.size(); ++t) {
      // Partials of one row are both: all ranks' together say which it is.
      bool contiguous = true;
      for (int r = 0; r < size(); ++r) contiguous &= group_->offer(r).views[t].is_contiguous();
      if (contiguous) {
        sum(destinations[t], t, table, 0);
        continue;
      }
      for (std::int64_t head = 0; head < destinations[t].shape[1]; ++head) {
        sum(destinations[t].slice(1, head, 1), t, table, head);
      }
    }
  }

 private:
  // Between construction and destruction the peers' offers can be read.
  class Meeting {
   public:
    Meeting(const ThreadsTransport& transport, const Offer& offer) : group_(*transport.group_) {
      group_.meet(transport.rank_, offer);
      try {
        transport.check_offers(offer);
      } catch (...) {
        group_.part();
        throw;
      }
    }
    ~Meeting() { group_.part(); }
    Meeting(const Meeting&) = delete;
    Meeting& operator=(const Meeting&) = delete;

   private:
    ThreadGroup& group_;
  };

  class ThreadsLoan final : public Loan {
   public:
    ThreadsLoan(const ThreadsTransport& transport, std::span<const TensorView> sources,
                const Step& step)
        : group_(*transport.group_),
          sources_(sources.begin(), sources.end()),
          meeting_(transport,
                   {.kind = Offer::Kind::kLoan, .step = step, .bytes = {}, .views = sources_}) {}
    std::span<const TensorView> views(int rank) const override { return group_.offer(rank).views; }

   private:
    ThreadGroup& group_;
    const std::vector<TensorView> sources_;  // peers look at them until the meeting ends
    const Meeting meeting_;
  };

  // Sums the ranks' partials number `tensor`, from `head` on where they are head-major.
  void sum(const TensorView& destination, std::size_t tensor, const ExchangeTable& table,
           std::int64_t head) const {
    std::vector<Contribution> contributions(static_cast<std::size_t>(size()));
    for (int r = 0; r < size(); ++r) {
      const TensorView& partial = group_->offer(r).views[tensor];
      const auto peer = static_cast<std::size_t>(r);
      contributions[peer] = {table.sends[peer],
                             partial.as<const float>() + head * partial.strides[1]};
    }
    sum_rows(destination, 0, table.local_tokens, contributions);
  }

  // Every rank compares all offers with rank 0's, so that all throw or none.
  void check_offers(const Offer& mine) const {
    const Offer& first = group_->offer(0);
    for (int r = 1; r < size(); ++r) {
      const Offer& other = group_->offer(r);
      if (const std::string difference = compare(first, other); !difference.empty()) {
        throw CommunicationError(
            fmt::format("rank {} stopped in {}: rank {} {}; all ranks must make the same calls",
                        rank_, mine.step.name, r, difference));
      }
    }
  }

  static std::string compare(const Offer& first, const Offer& other) {
    if (first.kind != other.kind) {
      return fmt::format("came to {} while rank 0 came to {}", other.step.name, first.step.name);
    }
    if (first.step.stage != other.step.stage || first.step.stages != other.step.stages) {
      return fmt::format("came to stage {} of {} while rank 0 came to stage {} of {}",
                         other.step.stage + 1, other.step.stages, first.step.stage + 1,
                         first.step.stages);
    }
    if (first.bytes.size() != other.bytes.size()) {
      return fmt::format("gave {} bytes while rank 0 gave {}", other.bytes.size(),
                         first.bytes.size());
    }
    if (first.views.size() != other.views.size()) {
      return fmt::format("gave {} tensors while rank 0 gave {}", other.views.size(),
                         first.views.size());
    }
    for (std::size_t t = 0; t < first.views.size(); ++t) {
      const TensorView& a = first.views[t];
      const TensorView& b = other.views[t];
      if (a.dtype != b.dtype || a.row_elements() != b.row_elements()) {
        return fmt::format("gave {} {} while rank 0 gave {} {}", dtype_name(b.dtype),
                           shape_text(b.shape), dtype_name(a.dtype), shape_text(a.shape));
      }
    }
    return {};
  }

  std::shared_ptr<ThreadGroup> group_;
  int rank_;
};

}  // namespace

std::vector<std::shared_ptr<Transport>> make_threads_transports(int size, double timeout) {
  const auto group = std::make_shared<ThreadGroup>(size, timeout);
  std::vector<std::shared_ptr<Transport>> result;
  result.reserve(static_cast<std::size_t>(size));
  for (int r = 0; r < size; ++r) result.push_back(std::make_shared<ThreadsTransport>(group, r));
  return result;
}

}  // namespace zigzag::comm
