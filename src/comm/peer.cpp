#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "comm/device_rows.h"
#include "comm/factories.h"
#include "comm/peer_group.h"
#include "cuda/check.h"
#include "cuda/layout.h"
#include "cuda/sum_rows.h"
#include "cuda/timeline.h"
#include "zigzag/communicator.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

using cuda::as_stream;
using cuda::check;

enum List : std::uint64_t { kOwn = 1, kPull, kPackPartials, kSum, kAddUp };

/// Copies shorter than this on average go through a kernel, longer ones through the copy engines,
/// which take no multiprocessor. With copies of 0.2 to 8 MiB the kernel was 1-4% faster end to end
/// (docs/gpu.md; ZIGZAG_PEER_COPY decides otherwise).
constexpr std::int64_t kEngineBytes = std::int64_t{16} << 20;
constexpr std::int64_t kMaxEngineCopies = 256;

/// Partials are fetched while attention goes on where copies are this long on average and take no
/// more memory a tensor than kMostFetched. Shorter ones take longer than what could hide them.
constexpr std::int64_t kEarlyBytes = std::int64_t{5} << 19;
constexpr std::int64_t kMostFetched = std::int64_t{1} << 30;

constexpr std::int64_t kAlignment = 256;

enum class CopyBy : std::uint8_t { kAuto, kEngine, kKernel };

CopyBy copy_by() {
  const char* text = std::getenv("ZIGZAG_PEER_COPY");
  const std::string word = text == nullptr ? "auto" : text;
  if (word == "auto" || word.empty()) return CopyBy::kAuto;
  if (word == "engine") return CopyBy::kEngine;
  if (word == "kernel") return CopyBy::kKernel;
  throw InvalidArgument("ZIGZAG_PEER_COPY is '" + word + "'; it must be auto, engine or kernel");
}

std::int64_t align(std::int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

/// Ranks whose GPUs read each other's memory. A rank packs its rows into memory that peers may
/// read, says so, and pulls what it needs; nothing waits for a GPU.
class PeerTransport final : public Transport {
 public:
  PeerTransport(std::shared_ptr<Transport> bootstrap, int device)
      : group_(std::move(bootstrap), device), copy_by_(copy_by()) {}

  int rank() const override { return group_.rank(); }
  int size() const override { return group_.size(); }
  std::string_view name() const override { return "peer"; }

  void all_gather(std::span<const std::byte> in, std::span<std::byte> out) override {
    group_.bootstrap().all_gather(in, out);
  }
  void barrier() override { group_.bootstrap().barrier(); }
  void abort(std::string_view reason) noexcept override { group_.bootstrap().abort(reason); }

  void gather(std::span<const TensorView> sources, std::span<const TensorView> destinations,
              const ExchangeTable& table, const Step& step, Queue queue) override {
    check_device(sources, group_.device(), rank());
    check_device(destinations, group_.device(), rank());
    cuda::DeviceGuard guard(group_.device());
    const cudaStream_t stream = as_stream(queue.stream);
    const std::vector<std::int64_t> offsets = show_rows(sources, table, step, stream);
    {
      const auto scope = span("pull rows from peers", stream);
      pull(sources.size(), offsets, destinations, table, stream);
    }
    group_.end(stream);
  }

  // Whoever chooses how rows are copied wants them copied.
  bool opens_gather() const override { return copy_by_ == CopyBy::kAuto; }

  OpenGather open_gather(const TensorView& k, const TensorView& v, const ExchangeTable& table,
                         const Step& step, Queue queue) override {
    const TensorView sources[] = {k, v};
    check_device(sources, group_.device(), rank());
    cuda::DeviceGuard guard(group_.device());
    const std::vector<std::int64_t> offsets =
        show_rows(sources, table, step, as_stream(queue.stream));
    OpenGather open{k, v, {}, {}, table.receives};
    for (int r = 0; r < size(); ++r) {
      const auto* memory = static_cast<const std::byte*>(group_.memory(r));
      open.k.push_back(memory + offsets[static_cast<std::size_t>(2 * r)]);
      open.v.push_back(memory + offsets[static_cast<std::size_t>(2 * r) + 1]);
    }
    return open;
  }

  void close_gather(Queue queue) override {
    cuda::DeviceGuard guard(group_.device());
    group_.end(as_stream(queue.stream));
  }

  void reduce(std::span<const TensorView> partials, std::span<const TensorView> destinations,
              const ExchangeTable& table, const Step& step, Queue queue) override {
    check_device(partials, group_.device(), rank());
    check_device(destinations, group_.device(), rank());
    cuda::DeviceGuard guard(group_.device());
    const cudaStream_t stream = as_stream(queue.stream);
    const Published shown = show_partials(partials, table, step, stream);
    {
      const auto scope = span("sum partials", stream);
      const cuda::TableKey key{list_key(table, kSum), 0, shown.packed ? 31u : 30u};
      for (std::size_t t = 0; t < partials.size(); ++t) {
        std::vector<const void*> sources;
        for (int r = 0; r < size(); ++r) {
          sources.push_back(r == rank() ? partials[t].data : shown.rows_of(r, t));
        }
        cuda::sum_rows(
            sources, partials[t].dtype, 1, destinations[t], key,
            [&] {
              return sum_table(table, [&](int, std::int64_t packed_row, const Segment& segment) {
                return shown.packed ? packed_row : segment.destination_row;
              });
            },
            stream);
      }
    }
    hide_partials(shown, step, stream);
  }

  bool reduces_in_parts(Queue queue) const override {
    // A graph keeps to the path that is tested in one.
    return all_want_parts_ && !is_capturing(as_stream(queue.stream));
  }

  void fetch_partials(std::span<const TensorView> partials, std::span<const TensorView> fetched,
                      const ExchangeTable& table, const Step& step, Queue queue) override {
    check_device(partials, group_.device(), rank());
    check_device(fetched, group_.device(), rank());
    cuda::DeviceGuard guard(group_.device());
    const cudaStream_t stream = as_stream(queue.stream);
    const Published shown = show_partials(partials, table, step, stream);
    {
      const auto scope = span("fetch partials", stream);
      for (std::size_t t = 0; t < partials.size(); ++t) {
        const std::int64_t bytes = partials[t].row_bytes();
        for (int i = 0; i + 1 < size(); ++i) {
          const int r = ring_peer(i);
          std::int64_t row = 0;
          for (const Segment& segment : table.sends[static_cast<std::size_t>(r)]) {
            const std::int64_t from = shown.packed ? row : segment.destination_row;
            const std::int64_t to = fetched_row(r, table) + segment.source_row;
            row += segment.rows;
            // By the copy engines: attention has the multiprocessors.
            check(cudaMemcpyAsync(fetched[t].as<std::byte>() + to * bytes,
                                  static_cast<const std::byte*>(shown.rows_of(r, t)) + from * bytes,
                                  static_cast<std::size_t>(segment.rows * bytes), cudaMemcpyDefault,
                                  stream),
                  "cudaMemcpyAsync");
          }
        }
      }
    }
    hide_partials(shown, step, stream);
  }

  void add_up(std::span<const TensorView> partials, std::span<const TensorView> fetched,
              std::span<const TensorView> destinations, const ExchangeTable& table,
              Queue queue) override {
    cuda::DeviceGuard guard(group_.device());
    const auto scope = span("add up partials", as_stream(queue.stream));
    const cuda::TableKey key{list_key(table, kAddUp), 0, 32};
    const auto build = [&] {
      return sum_table(table, [&](int r, std::int64_t, const Segment& segment) {
        return fetched_row(r, table) + segment.source_row;
      });
    };
    for (std::size_t t = 0; t < partials.size(); ++t) {
      std::vector<const void*> sources(static_cast<std::size_t>(size()), fetched[t].data);
      sources[static_cast<std::size_t>(rank())] = partials[t].data;
      cuda::sum_rows(sources, partials[t].dtype, 1, destinations[t], key, build, queue.stream);
    }
  }

 private:
  cuda::TimelineScope span(std::string_view name, cudaStream_t stream) const {
    return {name, group_.rank(), group_.device(), cuda::Lane::kExchange, stream};
  }

  /// Whether this rank would fetch partials with rows of `row_bytes` while attention goes on.
  bool wants_parts(const ExchangeTable& table, std::int64_t row_bytes) const {
    std::int64_t segments = 0;
    std::int64_t rows = 0;
    for (int r = 0; r < size(); ++r) {
      if (r == rank()) continue;
      const std::vector<Segment>& from = table.sends[static_cast<std::size_t>(r)];
      segments += static_cast<std::int64_t>(from.size());
      rows += count_rows(from);
    }
    // Where there is nothing to fetch either way is right.
    return segments <= kMaxEngineCopies && rows * row_bytes >= segments * kEarlyBytes &&
           (size() - 1) * table.local_tokens * row_bytes <= kMostFetched;
  }

  /// Packs this rank's rows and lets peers read them; from here on `stream` may read theirs. Gives
  /// where in its memory every rank has put every tensor's: [size, tensors].
  std::vector<std::int64_t> show_rows(std::span<const TensorView> sources,
                                      const ExchangeTable& table, const Step& step,
                                      cudaStream_t stream) {
    // Every rank places tensor t behind the tensors before it, by its own number of rows.
    std::vector<std::int64_t> offsets;
    std::int64_t bytes = 0;
    for (const TensorView& source : sources) {
      offsets.push_back(bytes);
      bytes = align(bytes + source.shape[0] * source.row_bytes());
    }
    auto* packed =
        static_cast<std::byte*>(group_.begin(std::max<std::int64_t>(bytes, 1), step, stream));
    std::vector<TensorView> copies;
    for (std::size_t t = 0; t < sources.size(); ++t) {
      copies.push_back(packed_like(sources[t], packed + offsets[t], table.local_tokens));
    }
    {
      const auto scope = span("pack rows for peers", stream);
      const Segment whole[] = {{0, 0, 0, table.local_tokens}};
      if (sources.size() == 2) {
        cuda::copy_rows_twice(sources.first(1), copies[0], sources.last(1), copies[1], whole, 0,
                              stream);
      } else {
        for (std::size_t t = 0; t < sources.size(); ++t) {
          cuda::copy_rows(sources[t], copies[t], whole, 0, stream);
        }
      }
    }
    group_.packed(stream);
    // A rank that fetches early waits for the others' partials: it gains where all show theirs
    // early.
    std::vector<std::int64_t> values = offsets;
    const std::int64_t partial_bytes =
        sources[0].row_elements() * static_cast<std::int64_t>(sizeof(float));
    values.push_back(wants_parts(table, partial_bytes) ? 1 : 0);
    const std::vector<std::int64_t> all = group_.publish(values, step, stream);
    all_want_parts_ = true;
    std::vector<std::int64_t> all_offsets;
    for (std::size_t at = 0; at < all.size(); at += values.size()) {
      const auto rank_values = std::span(all).subspan(at, values.size());
      all_offsets.insert(all_offsets.end(), rank_values.begin(), rank_values.end() - 1);
      all_want_parts_ = all_want_parts_ && rank_values.back() != 0;
    }
    return all_offsets;
  }

  /// Fetches the rows of every tensor from all ranks, this one's own among them.
  void pull(std::size_t tensors, const std::vector<std::int64_t>& offsets,
            std::span<const TensorView> destinations, const ExchangeTable& table,
            cudaStream_t stream) {
    std::vector<Segment> remote;
    std::vector<Segment> own;
    for (int i = 0; i < size(); ++i) {
      const auto at = static_cast<std::size_t>(ring_peer(i));
      for (Segment segment : table.receives[at]) {
        segment.source = i;
        (i + 1 < size() ? remote : own).push_back(segment);
      }
    }
    std::vector<std::vector<TensorView>> sources(tensors);
    for (std::size_t t = 0; t < tensors; ++t) {
      for (int i = 0; i < size(); ++i) {
        const auto at = static_cast<std::size_t>(ring_peer(i));
        const auto* memory = static_cast<const std::byte*>(group_.memory(ring_peer(i)));
        sources[t].push_back(packed_like(destinations[t], memory + offsets[at * tensors + t],
                                         destinations[t].shape[0]));
      }
    }
    const std::int64_t bytes = destinations[0].row_bytes();
    const auto count = static_cast<std::int64_t>(remote.size());
    const bool engine = copy_by_ == CopyBy::kEngine ||
                        (copy_by_ == CopyBy::kAuto && count <= kMaxEngineCopies && count > 0 &&
                         count_rows(remote) * bytes / count >= kEngineBytes);
    std::vector<Segment> segments = engine ? own : interleave(remote, own);
    const std::uint64_t key = list_key(table, engine ? kOwn : kPull);
    if (tensors == 2) {
      cuda::copy_rows_twice(sources[0], destinations[0], sources[1], destinations[1], segments, key,
                            stream);
    } else {
      for (std::size_t t = 0; t < tensors; ++t) {
        cuda::copy_rows(sources[t], destinations[t], segments, key, stream);
      }
    }
    for (std::size_t t = 0; engine && t < tensors; ++t) {
      for (const Segment& segment : remote) {
        const auto* from = sources[t][static_cast<std::size_t>(segment.source)].as<std::byte>() +
                           segment.source_row * destinations[t].row_bytes();
        check(cudaMemcpyAsync(destinations[t].as<std::byte>() +
                                  segment.destination_row * destinations[t].row_bytes(),
                              from,
                              static_cast<std::size_t>(segment.rows * destinations[t].row_bytes()),
                              cudaMemcpyDefault, stream),
              "cudaMemcpyAsync");
      }
    }
  }

  /// The ranks in the order in which this one reads them, itself last: not all read one GPU at
  /// once.
  int ring_peer(int i) const { return (rank() + 1 + i) % size(); }

  /// Remote rows, which come over a link, among the rank's own, which do not, so that a launch that
  /// goes through them in order uses the link from first to last.
  static std::vector<Segment> interleave(const std::vector<Segment>& remote,
                                         const std::vector<Segment>& own) {
    constexpr std::int64_t kParts = 16;
    constexpr std::int64_t kFewestRows = 128;
    const std::int64_t remote_rows = count_rows(remote);
    const std::int64_t own_rows = count_rows(own);
    const std::int64_t step = std::max(kFewestRows, (remote_rows + own_rows) / kParts);
    const auto cut = [&](const std::vector<Segment>& list) {
      std::vector<Segment> parts;
      for (const Segment& segment : list) {
        for (std::int64_t row = 0; row < segment.rows; row += step) {
          parts.push_back({segment.source, segment.source_row + row, segment.destination_row + row,
                           std::min(step, segment.rows - row)});
        }
      }
      return parts;
    };
    const std::vector<Segment> own_parts = cut(own);
    std::vector<Segment> all;
    std::size_t next = 0;
    std::int64_t remote_done = 0;
    std::int64_t own_done = 0;
    for (const Segment& part : cut(remote)) {
      all.push_back(part);
      remote_done += part.rows;
      while (next < own_parts.size() && own_done * remote_rows < remote_done * own_rows) {
        own_done += own_parts[next].rows;
        all.push_back(own_parts[next++]);
      }
    }
    for (; next < own_parts.size(); ++next) all.push_back(own_parts[next]);
    return all;
  }

  /// Where every rank's partials can be read: in place, or packed for this rank.
  struct Published {
    bool packed = false;
    std::size_t tensors = 0;
    std::vector<const void*> rows;  // [size, tensors]
    const void* rows_of(int rank, std::size_t tensor) const {
      return rows[static_cast<std::size_t>(rank) * tensors + tensor];
    }
  };

  /// Lets peers read the partials of their rows, in place where all ranks share this process and
  /// its addresses; from here on `stream` may read theirs.
  Published show_partials(std::span<const TensorView> partials, const ExchangeTable& table,
                          const Step& step, cudaStream_t stream) {
    Published shown;
    shown.tensors = partials.size();
    if (group_.shares_addresses(stream)) {
      (void)group_.begin(1, step, stream);
      group_.packed(stream);
      std::vector<std::int64_t> addresses;
      for (const TensorView& partial : partials) {
        addresses.push_back(
            static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(partial.data)));
      }
      for (const std::int64_t address : group_.publish(addresses, step, stream)) {
        shown.rows.push_back(reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address)));
      }
      return shown;
    }
    // Peers see only this transport's own memory.
    shown.packed = true;
    std::vector<Segment> packing;
    std::vector<std::int64_t> first_rows(static_cast<std::size_t>(size()), 0);
    std::int64_t rows = 0;
    for (int r = 0; r < size(); ++r) {
      const auto at = static_cast<std::size_t>(r);
      first_rows[at] = rows;
      if (r == rank()) continue;
      for (const Segment& segment : table.receives[at]) {
        packing.push_back({0, segment.destination_row, rows, segment.rows});
        rows += segment.rows;
      }
    }
    std::vector<std::int64_t> offsets;
    std::int64_t bytes = 0;
    for (const TensorView& partial : partials) {
      offsets.push_back(bytes);
      bytes = align(bytes + rows * partial.row_bytes());
    }
    auto* packed =
        static_cast<std::byte*>(group_.begin(std::max<std::int64_t>(bytes, 1), step, stream));
    {
      const auto scope = span("pack partials for peers", stream);
      for (std::size_t t = 0; t < partials.size(); ++t) {
        const TensorView copy = packed_like(partials[t], packed + offsets[t], rows);
        cuda::copy_rows(partials[t], copy, packing, list_key(table, kPackPartials), stream);
      }
    }
    group_.packed(stream);
    std::vector<std::int64_t> values = offsets;
    values.insert(values.end(), first_rows.begin(), first_rows.end());
    const std::vector<std::int64_t> all = group_.publish(values, step, stream);
    for (int r = 0; r < size(); ++r) {
      const std::int64_t* theirs = all.data() + static_cast<std::size_t>(r) * values.size();
      const std::int64_t first_row = theirs[partials.size() + static_cast<std::size_t>(rank())];
      for (std::size_t t = 0; t < partials.size(); ++t) {
        const auto* memory = static_cast<const std::byte*>(group_.memory(r));
        shown.rows.push_back(memory + theirs[t] + first_row * partials[t].row_bytes());
      }
    }
    return shown;
  }

  /// The work given to `stream` so far has read what it wanted; after it nobody reads this rank's.
  void hide_partials(const Published& shown, const Step& step, cudaStream_t stream) {
    group_.end(stream);
    if (!shown.packed) group_.wait_for_readers(step, stream);
  }

  /// The first row of a rank in what fetch_partials fetches.
  std::int64_t fetched_row(int peer, const ExchangeTable& table) const {
    return (peer - (peer > rank() ? 1 : 0)) * table.local_tokens;
  }

  /// Where the rows that add up to a local row lie: in this rank's own partials, and where
  /// `row_of(rank, row in the order of that rank's list, segment)` says for the others'.
  template <typename RowOf>
  cuda::SumTable sum_table(const ExchangeTable& table, const RowOf& row_of) const {
    std::vector<cuda::SumPart> parts;
    for (int r = 0; r < size(); ++r) {
      std::int64_t row = 0;
      for (const Segment& segment : table.sends[static_cast<std::size_t>(r)]) {
        const std::int64_t from = r == rank() ? segment.destination_row : row_of(r, row, segment);
        parts.push_back({r, segment.source_row, from, segment.rows});
        row += segment.rows;
      }
    }
    return cuda::make_sum_table(parts, size(), table.local_tokens);
  }

  PeerGroup group_;
  CopyBy copy_by_;
  bool all_want_parts_ = false;  // as the last gather found
};

}  // namespace
}  // namespace zigzag::comm

namespace zigzag {

Communicator Communicator::peer(const Communicator& bootstrap, int device) {
  return Communicator(std::make_shared<comm::PeerTransport>(bootstrap.transport_, device));
}

}  // namespace zigzag
