#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "backend.h"
#include "zigzag/plan.h"
#include "zigzag/tensor.h"

namespace zigzag::comm {

/// Who sends which rows to whom in a gather, seen from one rank. A reduction uses the same table
/// the other way.
struct ExchangeTable {
  /// What this rank's gathered buffer is made of, by source rank, each in rising source_row.
  std::vector<std::vector<Segment>> receives;  // [world_size]
  /// What this rank's shard gives to each destination rank, each in rising source_row.
  std::vector<std::vector<Segment>> sends;  // [world_size]
  std::int64_t local_tokens = 0;
  std::int64_t gathered_tokens = 0;
  /// The largest shard of any rank: all ranks derive the same number of rounds from it.
  std::int64_t max_local_tokens = 0;
  /// Names the plan, rank and mask, so that copies of the table on a device can be kept; 0: none.
  std::uint64_t key = 0;
};

/// The table of one rank, which only asks the plan. O(documents x W).
ExchangeTable make_exchange_table(const Plan& plan, std::int64_t rank, const Mask& mask);

/// Where an exchange stands, for messages: "gather of K and V, stage 2 of 4".
struct Step {
  std::string_view name;
  int stage = 0;
  int stages = 1;
};

/// Tensors that ranks of one process let each other read and write, until every rank has ended its
/// loan: nobody's memory changes or goes away under a peer.
class Loan {
 public:
  /// Ends the loan, if end() has not, and tells nobody of a failure.
  virtual ~Loan() = default;
  /// What a rank has lent.
  virtual std::span<const TensorView> views(int rank) const = 0;
  /// Waits until all ranks have come to the end. Throws CommunicationError on the others when one
  /// of them aborted before.
  virtual void end() = 0;
};

/// How ranks exchange rows. One implementation a file of src/comm. All calls are collective.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string_view name() const = 0;

  /// Bytes of every rank in rank order; the control plane, always on the host.
  virtual void all_gather(std::span<const std::byte> in, std::span<std::byte> out) = 0;
  virtual void barrier() = 0;
  /// Ends the peers' waits with a CommunicationError that carries the reason.
  virtual void abort(std::string_view reason) noexcept = 0;

  /// Every rank is about to throw for a reason that all know. Waits until all know it; never
  /// throws. An abort before the next exchange is then told to nobody.
  virtual void settle() noexcept {}

  /// sources[i] [local_tokens, heads, head_dim] of every rank -> destinations[i] [gathered_tokens,
  /// heads, head_dim] contiguous, in sequence order, own rows included. When it returns (on a
  /// device: in the order of `queue`) the destinations are complete and no rank reads this rank's
  /// sources any more.
  virtual void gather(std::span<const TensorView> sources, std::span<const TensorView> destinations,
                      const ExchangeTable& table, const Step& step, Queue queue) = 0;

  /// True when a gather can be left open, for attention to fetch its rows itself.
  virtual bool opens_gather() const { return false; }
  /// A gather without its copies: from here on, in the order of `queue` and until close_gather,
  /// every rank's rows can be read. Ranks of one exchange may choose differently: what they show
  /// each other is the same.
  virtual OpenGather open_gather(const TensorView& /*k*/, const TensorView& /*v*/,
                                 const ExchangeTable& /*table*/, const Step& /*step*/,
                                 Queue /*queue*/) {
    return {};
  }
  /// The work given to `queue` so far has read what it wanted.
  virtual void close_gather(Queue /*queue*/) {}

  /// True when ranks share memory on the host, so that one of them can compute for all.
  virtual bool lends() const { return false; }
  /// Lends tensors, as many, of the same types and row sizes on every rank. Until the end of the
  /// loan no other exchange is made. Null unless lends().
  virtual std::unique_ptr<Loan> lend(std::span<const TensorView> /*tensors*/,
                                     const Step& /*step*/) {
    return nullptr;
  }

  /// The reverse: partials[i] [gathered_tokens, heads, head_dim] float32 contiguous of every rank
  /// -> destinations[i] [local_tokens, heads, head_dim]: for every local row the sum of the
  /// partials of all ranks that hold it, in float32 and in rank order, rounded once to the
  /// destination's type. Rows that no rank sees become 0. On return no rank reads this rank's
  /// partials any more.
  virtual void reduce(std::span<const TensorView> partials,
                      std::span<const TensorView> destinations, const ExchangeTable& table,
                      const Step& step, Queue queue) = 0;

  /// True when the reductions of a call whose gathers were made may be made in two parts, the first
  /// while this rank still works on the gradients of its own rows. Ranks of one exchange may choose
  /// differently: what they send each other is the same.
  virtual bool reduces_in_parts(Queue /*queue*/) const { return false; }
  /// The first part: partials as in reduce, of which the rows that other ranks own are complete ->
  /// fetched[i] [(world_size - 1) x local_tokens, heads, head_dim] float32 contiguous: the other
  /// ranks' partials of this rank's rows, rank after rank. Rows that a rank does not hold are not
  /// written.
  virtual void fetch_partials(std::span<const TensorView> /*partials*/,
                              std::span<const TensorView> /*fetched*/,
                              const ExchangeTable& /*table*/, const Step& /*step*/,
                              Queue /*queue*/) {}
  /// The second: what reduce gives, bit for bit. Exchanges nothing.
  virtual void add_up(std::span<const TensorView> /*partials*/,
                      std::span<const TensorView> /*fetched*/,
                      std::span<const TensorView> /*destinations*/, const ExchangeTable& /*table*/,
                      Queue /*queue*/) {}
};

/// A value of plain bytes from every rank, in rank order.
template <typename T>
std::vector<T> all_gather(Transport& transport, const T& mine) {
  std::vector<T> all(static_cast<std::size_t>(transport.size()));
  transport.all_gather(std::as_bytes(std::span<const T>(&mine, 1)),
                       std::as_writable_bytes(std::span<T>(all)));
  return all;
}

}  // namespace zigzag::comm
