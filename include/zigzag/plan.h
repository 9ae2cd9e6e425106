#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace zigzag {

/// Which keys a query sees inside its document. Query position i sees key position j when
/// `j <= i` (causal), `j >= i - window_left` (window_left >= 0) and `j <= i + window_right`
/// (window_right >= 0); -1 means unbounded. A causal mask makes window_right 0.
struct Mask {
  bool causal = true;
  std::int64_t window_left = -1;
  std::int64_t window_right = -1;
  bool operator==(const Mask&) const = default;

  /// The first key position that query position i sees, at least 0.
  std::int64_t first_key(std::int64_t i) const;
  /// One past the last key position that query position i sees in a document of `length` tokens.
  std::int64_t end_key(std::int64_t i, std::int64_t length) const;
};

/// One of the 2W chunks of a document: positions [begin, end) inside the document, whose rows
/// start at `local_row` of the owning rank's shard.
struct Chunk {
  std::int64_t document;
  std::int64_t index;
  std::int64_t begin;
  std::int64_t end;
  std::int64_t local_row;
};

/// A rectangle of attention: query rows [q_begin, q_begin + q_count) of the local shard against
/// key rows [k_begin, k_begin + k_count) of the rank's gathered buffer. The positions are those of
/// the first query and first key row inside the document, so masks need no alignment rule; with a
/// causal mask and no right window the last query row sees exactly the last key row.
struct WorkItem {
  std::int64_t document;
  std::int64_t q_begin;
  std::int64_t q_count;
  std::int64_t k_begin;
  std::int64_t k_count;
  std::int64_t q_position;
  std::int64_t k_position;
  std::int64_t document_length;
};

/// A part of the causal backward for engines that cannot skip masked tiles: either an unmasked
/// rectangle or (`causal`) a square diagonal block, whose gradients add up to the work items'.
struct Piece {
  std::int64_t document;
  std::int64_t q_begin;
  std::int64_t q_count;
  std::int64_t k_begin;
  std::int64_t k_count;
  bool causal;
};

/// Key positions [begin, end) of a document that stand at `row` of a rank's gathered buffer.
struct KeyRange {
  std::int64_t document;
  std::int64_t begin;
  std::int64_t end;
  std::int64_t row;
};

/// Rows that travel from `source` to `destination` in a gather: source_row counts rows of the
/// source's shard, destination_row rows of the destination's gathered buffer. The gradient
/// reduction moves the same rows the other way.
struct Segment {
  std::int64_t source;
  std::int64_t source_row;
  std::int64_t destination_row;
  std::int64_t rows;
};

/// The rank and local row that hold a global token.
struct LocalRow {
  std::int64_t rank;
  std::int64_t row;
  bool operator==(const LocalRow&) const = default;
};

/// The zigzag layout of one pack over W ranks: pure integer arithmetic, immutable, cheap to copy
/// (copies share their data) and safe to read from many threads.
///
/// Every document of L tokens is cut into 2W chunks of L/(2W) tokens, some one longer; rank r owns
/// chunks r and 2W-1-r. Any length works. The extra tokens go round the ranks so that local token
/// counts differ by at most one over the whole pack. A rank's rows are, document after document,
/// its early chunk and then its late chunk. docs/layout.md derives the formulas.
class Plan {
 public:
  /// The most ranks.
  static constexpr std::int64_t kMaxWorldSize = std::int64_t{1} << 20;
  /// The most tokens of a pack.
  static constexpr std::int64_t kMaxTokens = std::int64_t{1} << 56;

  /// cu_seqlens [documents + 1]: 0, then the end of each document, of the WHOLE pack. Throws
  /// InvalidArgument when it is empty, does not start at 0 or decreases, or world_size < 1.
  Plan(std::span<const std::int64_t> cu_seqlens, std::int64_t world_size);
  /// The same from int32.
  Plan(std::span<const std::int32_t> cu_seqlens, std::int64_t world_size);

  /// The plan of documents of these lengths.
  static Plan from_lengths(std::span<const std::int64_t> lengths, std::int64_t world_size);

  /// Number of ranks, W.
  std::int64_t world_size() const;
  /// Tokens of the whole pack.
  std::int64_t total_tokens() const;
  /// Documents of the pack, empty ones included.
  std::int64_t num_documents() const;
  /// The global cu_seqlens [documents + 1].
  std::span<const std::int64_t> cu_seqlens() const;
  /// Tokens of one document.
  std::int64_t document_length(std::int64_t document) const;
  /// Chunks of every document, 2W.
  std::int64_t num_chunks() const;
  /// Chunk `index` in 0..2W-1 of a document.
  Chunk chunk(std::int64_t document, std::int64_t index) const;
  /// The two chunk indices that a rank owns of every document: {early, late}.
  std::pair<std::int64_t, std::int64_t> chunk_indices(std::int64_t rank) const;
  /// The rank that owns chunk `index` of every document.
  std::int64_t chunk_owner(std::int64_t index) const;

  /// Rows of a rank's shard.
  std::int64_t local_tokens(std::int64_t rank) const;
  /// Row ranges of the documents in a rank's shard [documents + 1].
  std::vector<std::int64_t> local_cu_seqlens(std::int64_t rank) const;
  /// The global token of each local row [local_tokens].
  std::vector<std::int64_t> token_indices(std::int64_t rank) const;
  /// The position inside its document of each local row (for RoPE) [local_tokens].
  std::vector<std::int64_t> position_ids(std::int64_t rank) const;
  /// The global token of a local row.
  std::int64_t global_token(std::int64_t rank, std::int64_t row) const;
  /// The rank and row of a global token.
  LocalRow local_row(std::int64_t token) const;

  /// A rank's work, heaviest first (ties in document order); items without query rows are left out.
  std::vector<WorkItem> work_items(std::int64_t rank, const Mask& mask = {}) const;
  /// The causal work of a rank as rectangles and diagonal blocks, in document order.
  std::vector<Piece> pieces(std::int64_t rank) const;
  /// Rows of a rank's gathered buffer: of each document, in pack order, the key rows that the
  /// rank's queries see (a causal prefix, the whole document, or a window's halo).
  std::int64_t gathered_tokens(std::int64_t rank, const Mask& mask = {}) const;
  /// The same for every rank at once [W]: O((documents + W) log W).
  std::vector<std::int64_t> gathered_tokens_all(const Mask& mask = {}) const;
  /// What the gathered buffer holds, row after row: one range of key positions a document, or two
  /// where a window leaves a gap between what the early and the late chunk see.
  std::vector<KeyRange> gathered_ranges(std::int64_t rank, const Mask& mask = {}) const;
  /// All rows that a rank's gathered buffer is made of, its own included, by source rank and then
  /// in document order. They fill the buffer exactly once.
  std::vector<Segment> gather_segments(std::int64_t destination, const Mask& mask = {}) const;
  /// The part of the above that comes from one source.
  std::vector<Segment> gather_segments(std::int64_t destination, std::int64_t source,
                                       const Mask& mask = {}) const;

  /// Where a source's rows go when the first prefix_chunks[d] chunks of each document d are laid
  /// end to end (the seed's extract): source_row counts rows of the source's shard. The caller has
  /// checked prefix_chunks with prefix_tokens.
  std::vector<Segment> prefix_segments(std::int64_t source,
                                       std::span<const std::int64_t> prefix_chunks) const;
  /// Rows of those prefixes. Throws InvalidArgument unless prefix_chunks [documents] is 0..2W.
  std::int64_t prefix_tokens(std::span<const std::int64_t> prefix_chunks) const;

  /// Visible (query, key) pairs of a rank's queries. Exact below 2^53.
  double visible_pairs(std::int64_t rank, const Mask& mask = {}) const;
  /// The same for every rank at once [W]: O((documents + W) log W).
  std::vector<double> visible_pairs_all(const Mask& mask = {}) const;
  /// FLOPs of a rank's forward: 4 x heads x head_dim x visible pairs (two matrix products of two
  /// operations a multiply-add each). A backward counts 2.5 times as many (five products).
  double flops(std::int64_t rank, std::int64_t heads = 1, std::int64_t head_dim = 1,
               const Mask& mask = {}) const;
  /// Mean over ranks of the FLOPs divided by their maximum; 1 is perfect; 1 for an empty pack.
  double balance(const Mask& mask = {}) const;
  /// Bytes of K and V that a rank receives from other ranks in one forward. Throws InvalidArgument
  /// when kv_heads, head_dim or item_size (bytes of an element) is below 1.
  double gathered_bytes(std::int64_t rank, std::int64_t kv_heads, std::int64_t head_dim,
                        std::int64_t item_size, const Mask& mask = {}) const;

  /// The same for every rank at once [W]: O((documents + W) log W).
  std::vector<double> gathered_bytes_all(std::int64_t kv_heads, std::int64_t head_dim,
                                         std::int64_t item_size, const Mask& mask = {}) const;

  /// True when both lay out the same documents over as many ranks.
  bool operator==(const Plan& other) const;

  /// A 64-bit hash of cu_seqlens and W that ranks compare before the first exchange.
  std::uint64_t fingerprint() const;

 private:
  struct Data;
  struct DocumentLayout;
  struct RankChunks;
  struct KeyRanges;
  std::shared_ptr<const Data> data_;
};

/// Forward and backward time predicted from a plan; docs/cost-model.md derives the formulas.
struct CostModel {
  double tflops = 0;  ///< sustained attention rate of one rank, in 10^12 FLOP/s
  double gbps = 0;    ///< rate at which one rank receives, in 10^9 byte/s
};

/// Predicted seconds of the slowest rank.
struct PredictedTime {
  double forward = 0;            ///< gather hidden under attention as far as it goes
  double backward = 0;           ///< likewise, with the gradient reduction
  double forward_compute = 0;    ///< attention alone
  double forward_exchange = 0;   ///< gather alone
  double backward_compute = 0;   ///< attention backward alone
  double backward_exchange = 0;  ///< gather and reduction alone
};

/// The time of one call with q heads `heads`. Throws InvalidArgument unless both rates are > 0.
PredictedTime predict(const Plan& plan, const CostModel& model, std::int64_t heads,
                      std::int64_t kv_heads, std::int64_t head_dim, std::int64_t item_size,
                      const Mask& mask = {});

}  // namespace zigzag
