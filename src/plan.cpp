#include "zigzag/plan.h"

#include <algorithm>
#include <array>
#include <limits>
#include <string>

#include "plan_data.h"
#include "zigzag/error.h"

namespace zigzag {

namespace {

using std::int64_t;

std::string text(int64_t value) { return std::to_string(value); }

template <typename Integer>
std::vector<int64_t> widen(std::span<const Integer> values) {
  return {values.begin(), values.end()};
}

void check_world_size(int64_t world_size) {
  if (world_size < 1 || world_size > Plan::kMaxWorldSize) {
    throw InvalidArgument("world_size is " + text(world_size) + "; it must be 1 to " +
                          text(Plan::kMaxWorldSize));
  }
}

void check_cu_seqlens(std::span<const int64_t> cu_seqlens) {
  if (cu_seqlens.empty()) {
    throw InvalidArgument("cu_seqlens is empty; it must hold 0 and then the end of each document");
  }
  if (cu_seqlens.front() != 0) {
    throw InvalidArgument("cu_seqlens starts at " + text(cu_seqlens.front()) +
                          "; it must start at 0");
  }
  for (std::size_t i = 1; i < cu_seqlens.size(); ++i) {
    if (cu_seqlens[i] < cu_seqlens[i - 1]) {
      throw InvalidArgument("cu_seqlens decreases from " + text(cu_seqlens[i - 1]) + " to " +
                            text(cu_seqlens[i]) + " at index " + text(static_cast<int64_t>(i)) +
                            "; it must never decrease");
    }
  }
  if (cu_seqlens.back() > Plan::kMaxTokens) {
    throw InvalidArgument("cu_seqlens ends at " + text(cu_seqlens.back()) +
                          "; a pack holds at most 2^56 tokens");
  }
}

}  // namespace

void check_mask(const Mask& mask) {
  const auto check = [](const char* name, int64_t value) {
    if (value < -1) {
      throw InvalidArgument(std::string(name) + " is " + text(value) +
                            "; it must be -1 (unbounded) or a number of tokens");
    }
  };
  check("window_left", mask.window_left);
  check("window_right", mask.window_right);
}

int64_t Mask::first_key(int64_t i) const {
  return window_left < 0 ? 0 : std::max<int64_t>(0, i - window_left);
}

int64_t Mask::end_key(int64_t i, int64_t length) const {
  if (causal) return std::min(i + 1, length);
  // Written so that a huge window does not overflow.
  return window_right < 0 || window_right >= length - i ? length : i + 1 + window_right;
}

Plan::Plan(std::span<const int64_t> cu_seqlens, int64_t world_size) {
  check_world_size(world_size);
  check_cu_seqlens(cu_seqlens);
  data_ = std::make_shared<const Data>(std::vector<int64_t>(cu_seqlens.begin(), cu_seqlens.end()),
                                       world_size);
}

Plan::Plan(std::span<const std::int32_t> cu_seqlens, int64_t world_size)
    : Plan(std::span<const int64_t>(widen(cu_seqlens)), world_size) {}

Plan Plan::from_lengths(std::span<const int64_t> lengths, int64_t world_size) {
  std::vector<int64_t> cu_seqlens(lengths.size() + 1, 0);
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 0) {
      throw InvalidArgument("length " + text(static_cast<int64_t>(i)) + " is " + text(lengths[i]) +
                            "; a document has 0 or more tokens");
    }
    if (lengths[i] > kMaxTokens - cu_seqlens[i]) {
      throw InvalidArgument("the lengths add up to more than 2^56 tokens at document " +
                            text(static_cast<int64_t>(i)) + "; a pack holds at most 2^56");
    }
    cu_seqlens[i + 1] = cu_seqlens[i] + lengths[i];
  }
  return {std::span<const int64_t>(cu_seqlens), world_size};
}

// ---- The layout -------------------------------------------------------------------------------

Plan::Data::Data(std::vector<int64_t> cu, int64_t world) : cu_seqlens(std::move(cu)), ranks(world) {
  extras.resize(cu_seqlens.size());
  for (std::size_t d = 0; d + 1 < cu_seqlens.size(); ++d) {
    extras[d + 1] = extras[d] + (cu_seqlens[d + 1] - cu_seqlens[d]) % (2 * ranks);
  }
}

Plan::DocumentLayout::DocumentLayout(const Data& data, int64_t document) : ranks(data.ranks) {
  const auto d = static_cast<std::size_t>(document);
  length = data.cu_seqlens[d + 1] - data.cu_seqlens[d];
  base = length / (2 * ranks);
  cursor = data.extras[d] % ranks;
  const int64_t rest = length % (2 * ranks);
  const int64_t once = std::min(rest, ranks);
  const int64_t twice = rest - once;
  // A rank that gets one extra token gets it early in one document and late in the next: always
  // early would give the first ranks the cheap rows of every short document.
  const bool early = document % 2 == 0;
  early_extras = early ? once : twice;
  late_extras = early ? twice : once;
}

int64_t Plan::DocumentLayout::extras_below(int64_t rank, int64_t extras) const {
  const int64_t wrapped = std::max<int64_t>(0, cursor + extras - ranks);
  return std::min(rank, wrapped) + std::clamp<int64_t>(rank - cursor, 0, extras - wrapped);
}

int64_t Plan::DocumentLayout::begin(int64_t index) const {
  if (index <= ranks) return index * base + extras_below(index, early_extras);
  return index * base + early_extras + late_extras - extras_below(2 * ranks - index, late_extras);
}

int64_t Plan::DocumentLayout::chunk_at(int64_t position) const {
  int64_t low = 0;
  int64_t high = 2 * ranks;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (begin(middle) <= position ? low : high) = middle;
  }
  return low;
}

int64_t Plan::DocumentLayout::owner(int64_t index) const {
  return std::min(index, 2 * ranks - 1 - index);
}

Plan::RankChunks Plan::DocumentLayout::chunks(int64_t rank) const {
  const int64_t late = 2 * ranks - 1 - rank;
  return {begin(rank), begin(rank + 1), begin(late), begin(late + 1)};
}

int64_t Plan::Data::local_begin(int64_t document, int64_t rank) const {
  const auto d = static_cast<std::size_t>(document);
  return (cu_seqlens[d] - extras[d]) / ranks + (extras[d] + ranks - 1 - rank) / ranks;
}

int64_t Plan::Data::documents() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }

void Plan::Data::check_rank(int64_t rank) const {
  if (rank < 0 || rank >= ranks) {
    throw InvalidArgument("rank is " + text(rank) + "; it must be 0 to " + text(ranks - 1));
  }
}

// ---- What it answers --------------------------------------------------------------------------

int64_t Plan::world_size() const { return data_->ranks; }

int64_t Plan::total_tokens() const { return data_->cu_seqlens.back(); }

int64_t Plan::num_documents() const { return data_->documents(); }

std::span<const int64_t> Plan::cu_seqlens() const { return data_->cu_seqlens; }

int64_t Plan::document_length(int64_t document) const {
  if (document < 0 || document >= data_->documents()) {
    throw InvalidArgument("document is " + text(document) + "; the pack has " +
                          text(data_->documents()));
  }
  const auto d = static_cast<std::size_t>(document);
  return data_->cu_seqlens[d + 1] - data_->cu_seqlens[d];
}

int64_t Plan::num_chunks() const { return 2 * data_->ranks; }

Chunk Plan::chunk(int64_t document, int64_t index) const {
  document_length(document);
  const int64_t rank = chunk_owner(index);
  const DocumentLayout layout(*data_, document);
  const RankChunks own = layout.chunks(rank);
  const int64_t row = data_->local_begin(document, rank);
  if (index == rank) return {document, index, own.early_begin, own.early_end, row};
  return {document, index, own.late_begin, own.late_end, row + own.early_end - own.early_begin};
}

std::pair<int64_t, int64_t> Plan::chunk_indices(int64_t rank) const {
  data_->check_rank(rank);
  return {rank, 2 * data_->ranks - 1 - rank};
}

int64_t Plan::chunk_owner(int64_t index) const {
  if (index < 0 || index >= 2 * data_->ranks) {
    throw InvalidArgument("chunk index is " + text(index) + "; it must be 0 to " +
                          text(2 * data_->ranks - 1));
  }
  return std::min(index, 2 * data_->ranks - 1 - index);
}

int64_t Plan::local_tokens(int64_t rank) const {
  data_->check_rank(rank);
  return data_->local_begin(data_->documents(), rank);
}

std::vector<int64_t> Plan::local_cu_seqlens(int64_t rank) const {
  data_->check_rank(rank);
  std::vector<int64_t> result(data_->cu_seqlens.size());
  for (std::size_t d = 0; d < result.size(); ++d) {
    result[d] = data_->local_begin(static_cast<int64_t>(d), rank);
  }
  return result;
}

std::vector<int64_t> Plan::token_indices(int64_t rank) const {
  std::vector<int64_t> result = position_ids(rank);
  for (int64_t d = 0; d < data_->documents(); ++d) {
    const int64_t end = data_->local_begin(d + 1, rank);
    for (int64_t row = data_->local_begin(d, rank); row < end; ++row) {
      result[static_cast<std::size_t>(row)] += data_->cu_seqlens[static_cast<std::size_t>(d)];
    }
  }
  return result;
}

std::vector<int64_t> Plan::position_ids(int64_t rank) const {
  std::vector<int64_t> result;
  result.reserve(static_cast<std::size_t>(local_tokens(rank)));
  for (int64_t d = 0; d < data_->documents(); ++d) {
    const RankChunks own = DocumentLayout(*data_, d).chunks(rank);
    for (int64_t i = own.early_begin; i < own.early_end; ++i) result.push_back(i);
    for (int64_t i = own.late_begin; i < own.late_end; ++i) result.push_back(i);
  }
  return result;
}

int64_t Plan::global_token(int64_t rank, int64_t row) const {
  if (row < 0 || row >= local_tokens(rank)) {
    throw InvalidArgument("row is " + text(row) + "; rank " + text(rank) + " holds " +
                          text(local_tokens(rank)) + " rows");
  }
  int64_t low = 0;
  int64_t high = data_->documents();
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (data_->local_begin(middle, rank) <= row ? low : high) = middle;
  }
  // `low` is the last document that starts at or before the row, so it is not empty here.
  const RankChunks own = DocumentLayout(*data_, low).chunks(rank);
  const int64_t offset = row - data_->local_begin(low, rank);
  const int64_t early = own.early_end - own.early_begin;
  return data_->cu_seqlens[static_cast<std::size_t>(low)] +
         (offset < early ? own.early_begin + offset : own.late_begin + offset - early);
}

LocalRow Plan::local_row(int64_t token) const {
  if (token < 0 || token >= total_tokens()) {
    throw InvalidArgument("token is " + text(token) + "; the pack has " + text(total_tokens()) +
                          " tokens");
  }
  const auto& cu = data_->cu_seqlens;
  const auto document = std::upper_bound(cu.begin(), cu.end(), token) - cu.begin() - 1;
  const int64_t position = token - cu[static_cast<std::size_t>(document)];
  const Chunk found = chunk(document, DocumentLayout(*data_, document).chunk_at(position));
  return {chunk_owner(found.index), found.local_row + position - found.begin};
}

bool Plan::operator==(const Plan& other) const {
  return data_ == other.data_ ||
         (data_->ranks == other.data_->ranks && data_->cu_seqlens == other.data_->cu_seqlens);
}

std::uint64_t Plan::fingerprint() const {
  // FNV-1a over 64-bit words, with a final avalanche so that low bits depend on every word.
  std::uint64_t hash = 0xcbf29ce484222325U;
  const auto mix = [&hash](std::uint64_t word) { hash = (hash ^ word) * 0x100000001b3U; };
  mix(static_cast<std::uint64_t>(data_->ranks));
  for (const int64_t value : data_->cu_seqlens) mix(static_cast<std::uint64_t>(value));
  hash = (hash ^ (hash >> 33U)) * 0xff51afd7ed558ccdU;
  return hash ^ (hash >> 33U);
}

// ---- Work, gather and reduction ---------------------------------------------------------------

Plan::KeyRanges Plan::DocumentLayout::keys(const RankChunks& own, const Mask& mask) const {
  // Every query sees its own key, so a chunk that has rows has keys.
  const auto seen = [&](int64_t begin, int64_t end) -> std::pair<int64_t, int64_t> {
    return {mask.first_key(begin), mask.end_key(end - 1, length)};
  };
  KeyRanges result;
  if (own.early_begin < own.early_end) {
    const auto [begin, end] = seen(own.early_begin, own.early_end);
    result.ranges[result.count++] = {begin, end};
  }
  if (own.late_begin < own.late_end) {
    const auto [begin, end] = seen(own.late_begin, own.late_end);
    if (result.count == 1 && begin <= result.ranges[0].second) {
      result.ranges[0].first = std::min(result.ranges[0].first, begin);
      result.ranges[0].second = std::max(result.ranges[0].second, end);
    } else {
      result.ranges[result.count++] = {begin, end};
    }
  }
  return result;
}

std::vector<KeyRange> Plan::gathered_ranges(int64_t rank, const Mask& mask) const {
  data_->check_rank(rank);
  check_mask(mask);
  std::vector<KeyRange> result;
  int64_t row = 0;
  for (int64_t d = 0; d < data_->documents(); ++d) {
    const DocumentLayout layout(*data_, d);
    const KeyRanges keys = layout.keys(layout.chunks(rank), mask);
    for (std::size_t i = 0; i < keys.count; ++i) {
      const auto [begin, end] = keys.ranges[i];
      result.push_back({d, begin, end, row});
      row += end - begin;
    }
  }
  return result;
}

std::vector<WorkItem> Plan::work_items(int64_t rank, const Mask& mask) const {
  std::vector<WorkItem> items;
  for (const KeyRange& keys : gathered_ranges(rank, mask)) {
    const DocumentLayout layout(*data_, keys.document);
    const RankChunks own = layout.chunks(rank);
    const auto add = [&](int64_t begin, int64_t end, int64_t row) {
      if (begin == end) return;
      const int64_t first = mask.first_key(begin);
      const int64_t last = mask.end_key(end - 1, layout.length);
      if (first < keys.begin || last > keys.end) return;  // belongs to the other range
      items.push_back({keys.document, row, end - begin, keys.row + first - keys.begin, last - first,
                       begin, first, layout.length});
    };
    const int64_t row = data_->local_begin(keys.document, rank);
    add(own.early_begin, own.early_end, row);
    add(own.late_begin, own.late_end, row + own.early_end - own.early_begin);
  }
  const auto weight = [&mask](const WorkItem& item) {
    return DocumentLayout::pairs(item.q_position, item.q_position + item.q_count,
                                 item.document_length, mask);
  };
  std::stable_sort(items.begin(), items.end(),
                   [&](const WorkItem& a, const WorkItem& b) { return weight(a) > weight(b); });
  return items;
}

std::vector<Piece> Plan::pieces(int64_t rank) const {
  std::vector<Piece> result;
  for (const KeyRange& keys : gathered_ranges(rank)) {
    const RankChunks own = DocumentLayout(*data_, keys.document).chunks(rank);
    const int64_t early = own.early_end - own.early_begin;
    const int64_t late = own.late_end - own.late_begin;
    const int64_t row = data_->local_begin(keys.document, rank);
    const auto add = [&](int64_t q, int64_t q_count, int64_t k_first, int64_t k_end, bool causal) {
      if (q_count == 0 || k_end == k_first) return;
      result.push_back({keys.document, q, q_count, keys.row + k_first, k_end - k_first, causal});
    };
    // Early and late rows stand side by side in the shard: one rectangle serves both.
    add(row, early + late, 0, own.early_begin, false);
    add(row + early, late, own.early_begin, own.late_begin, false);
    add(row, early, own.early_begin, own.early_end, true);
    add(row + early, late, own.late_begin, own.late_end, true);
  }
  return result;
}

int64_t Plan::gathered_tokens(int64_t rank, const Mask& mask) const {
  const std::vector<KeyRange> ranges = gathered_ranges(rank, mask);
  return ranges.empty() ? 0 : ranges.back().row + ranges.back().end - ranges.back().begin;
}

std::vector<Segment> Plan::gather_segments(int64_t destination, int64_t source,
                                           const Mask& mask) const {
  data_->check_rank(source);
  std::vector<Segment> result;
  for (const KeyRange& keys : gathered_ranges(destination, mask)) {
    const RankChunks own = DocumentLayout(*data_, keys.document).chunks(source);
    const int64_t row = data_->local_begin(keys.document, source);
    const auto add = [&](int64_t begin, int64_t end, int64_t source_row) {
      const int64_t first = std::max(begin, keys.begin);
      const int64_t last = std::min(end, keys.end);
      if (first >= last) return;
      const Segment segment{source, source_row + first - begin, keys.row + first - keys.begin,
                            last - first};
      if (!result.empty() && result.back().source_row + result.back().rows == segment.source_row &&
          result.back().destination_row + result.back().rows == segment.destination_row) {
        result.back().rows += segment.rows;
      } else {
        result.push_back(segment);
      }
    };
    add(own.early_begin, own.early_end, row);
    add(own.late_begin, own.late_end, row + own.early_end - own.early_begin);
  }
  return result;
}

std::vector<Segment> Plan::gather_segments(int64_t destination, const Mask& mask) const {
  std::vector<Segment> result;
  for (int64_t source = 0; source < data_->ranks; ++source) {
    const std::vector<Segment> part = gather_segments(destination, source, mask);
    result.insert(result.end(), part.begin(), part.end());
  }
  return result;
}

std::vector<Segment> Plan::prefix_segments(int64_t source,
                                           std::span<const int64_t> prefix_chunks) const {
  data_->check_rank(source);
  std::vector<Segment> result;
  int64_t destination = 0;
  for (int64_t d = 0; d < data_->documents(); ++d) {
    const DocumentLayout layout(*data_, d);
    const int64_t prefix = layout.begin(prefix_chunks[static_cast<std::size_t>(d)]);
    const RankChunks own = layout.chunks(source);
    const int64_t row = data_->local_begin(d, source);
    const auto add = [&](int64_t begin, int64_t end, int64_t source_row) {
      if (begin >= end || end > prefix) return;
      result.push_back({source, source_row, destination + begin, end - begin});
    };
    add(own.early_begin, own.early_end, row);
    add(own.late_begin, own.late_end, row + own.early_end - own.early_begin);
    destination += prefix;
  }
  return result;
}

int64_t Plan::prefix_tokens(std::span<const int64_t> prefix_chunks) const {
  if (static_cast<int64_t>(prefix_chunks.size()) != data_->documents()) {
    throw InvalidArgument("prefix_chunks has " + text(static_cast<int64_t>(prefix_chunks.size())) +
                          " entries; it must have one for each of the " + text(data_->documents()) +
                          " documents");
  }
  int64_t tokens = 0;
  for (int64_t d = 0; d < data_->documents(); ++d) {
    const int64_t chunks = prefix_chunks[static_cast<std::size_t>(d)];
    if (chunks < 0 || chunks > num_chunks()) {
      throw InvalidArgument("prefix_chunks of document " + text(d) + " is " + text(chunks) +
                            "; it must be 0 to " + text(num_chunks()));
    }
    tokens += DocumentLayout(*data_, d).begin(chunks);
  }
  return tokens;
}

}  // namespace zigzag
