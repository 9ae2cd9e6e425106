#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "comm/exchange.h"
#include "comm/factories.h"
#include "comm/sum.h"
#include "comm/thread_group.h"
#include "cpu/parallel.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

// Rows of a reduction that one task sums.
constexpr std::int64_t kReduceRows = 256;

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

  std::unique_ptr<Loan> lend(std::span<const TensorView> tensors, const Step& step) override {
    return std::make_unique<ThreadsLoan>(*this, tensors, step);
  }

  void reduce(std::span<const TensorView> partials, std::span<const TensorView> destinations,
              const ExchangeTable& table, const Step& step, Queue /*queue*/) override {
    check_reduce(partials, destinations, table, rank_, size());
    row_views(partials);
    row_views(destinations);
    const Meeting meeting(
        *this, {.kind = Offer::Kind::kReduce, .step = step, .bytes = {}, .views = partials});
    for (std::size_t t = 0; t < destinations.size(); ++t) {
      std::vector<Contribution> contributions(static_cast<std::size_t>(size()));
      for (int r = 0; r < size(); ++r) {
        const auto peer = static_cast<std::size_t>(r);
        contributions[peer] = {table.sends[peer], group_->offer(r).views[t].as<const float>()};
      }
      cpu::parallel_ranges(table.local_tokens, kReduceRows,
                           [&](std::int64_t begin, std::int64_t end) {
                             sum_rows(destinations[t], begin, end, contributions);
                           });
    }
  }

 private:
  // Between construction and destruction the peers' offers can be read.
  class Meeting {
   public:
    Meeting(const ThreadsTransport& transport, const Offer& offer)
        : group_(*transport.group_), rank_(transport.rank_) {
      group_.meet(rank_, offer);
      try {
        transport.check_offers(offer);
      } catch (...) {
        group_.part(rank_);
        throw;
      }
    }
    ~Meeting() {
      if (!parted_) group_.part(rank_);
    }
    void part_or_throw() {
      parted_ = true;
      group_.part_or_throw(rank_);
    }
    Meeting(const Meeting&) = delete;
    Meeting& operator=(const Meeting&) = delete;

   private:
    ThreadGroup& group_;
    const int rank_;
    bool parted_ = false;
  };

  class ThreadsLoan final : public Loan {
   public:
    ThreadsLoan(const ThreadsTransport& transport, std::span<const TensorView> tensors,
                const Step& step)
        : transport_(transport),
          tensors_(tensors.begin(), tensors.end()),
          meeting_(transport,
                   {.kind = Offer::Kind::kLoan, .step = step, .bytes = {}, .views = tensors_}) {}
    std::span<const TensorView> views(int rank) const override {
      return transport_.group_->offer(rank).views;
    }
    void end() override { meeting_.part_or_throw(); }

   private:
    const ThreadsTransport& transport_;
    const std::vector<TensorView> tensors_;  // peers look at them until the meeting ends
    Meeting meeting_;
  };

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
