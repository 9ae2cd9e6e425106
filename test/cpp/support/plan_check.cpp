#include "support/plan_check.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

namespace zigzag::test {

namespace {

using std::int64_t;

std::size_t at(int64_t i) { return static_cast<std::size_t>(i); }

std::string broken(const char* rule, int line, const Plan& plan, const Lengths& lengths,
                   const std::string& more = {}) {
  return fmt::format("`{}` is false (plan_check.cpp:{}) for {} ranks, lengths {} {}", rule, line,
                     plan.world_size(), lengths_text(lengths), more);
}

#define HOLDS(rule)                                             \
  do {                                                          \
    if (!(rule)) return broken(#rule, __LINE__, plan, lengths); \
  } while (false)
#define HOLDS_FOR(rule, mask)                                                    \
  do {                                                                           \
    if (!(rule)) return broken(#rule, __LINE__, plan, lengths, mask_text(mask)); \
  } while (false)

std::string check_chunks(const Plan& plan, const Lengths& lengths) {
  const int64_t chunks = 2 * plan.world_size();
  HOLDS(plan.num_chunks() == chunks);
  for (int64_t index = 0; index < chunks; ++index) {
    const int64_t owner = plan.chunk_owner(index);
    HOLDS(owner == std::min(index, chunks - 1 - index));
    const auto [early, late] = plan.chunk_indices(owner);
    HOLDS(early == owner && late == chunks - 1 - owner && (index == early || index == late));
  }
  for (int64_t d = 0; d < plan.num_documents(); ++d) {
    const int64_t length = lengths[at(d)];
    HOLDS(plan.document_length(d) == length);
    int64_t end = 0;
    for (int64_t index = 0; index < chunks; ++index) {
      const Chunk chunk = plan.chunk(d, index);
      HOLDS(chunk.document == d && chunk.index == index && chunk.begin == end);
      const int64_t size = chunk.end - chunk.begin;
      HOLDS(size == length / chunks || size == length / chunks + 1);
      if (length % chunks == 0) HOLDS(size == length / chunks);
      end = chunk.end;
    }
    HOLDS(end == length);
  }
  return {};
}

/// Key ranges of one query row in document positions.
using Ranges = std::vector<std::pair<int64_t, int64_t>>;

bool tiles(Ranges& ranges, int64_t begin, int64_t end) {
  std::sort(ranges.begin(), ranges.end());
  for (const auto& [first, last] : ranges) {
    if (first != begin || last <= first) return false;
    begin = last;
  }
  return begin == end;
}

}  // namespace

const std::vector<Mask>& all_masks() {
  static const std::vector<Mask> masks{{true, -1, -1}, {false, -1, -1}, {true, 3, -1},
                                       {true, 0, 0},   {false, 2, 1},   {false, -1, 4},
                                       {false, 5, -1}, {true, 20, 7}};
  return masks;
}

std::string mask_text(const Mask& mask) {
  return fmt::format("causal {}, window {},{}", mask.causal, mask.window_left, mask.window_right);
}

bool sees(const Mask& mask, int64_t i, int64_t j) {
  if (mask.causal && j > i) return false;
  if (mask.window_left >= 0 && j < i - mask.window_left) return false;
  return mask.window_right < 0 || mask.causal || j <= i + mask.window_right;
}

std::string check_layout(const Plan& plan, const Lengths& lengths) {
  const int64_t world = plan.world_size();
  HOLDS(plan.num_documents() == static_cast<int64_t>(lengths.size()));
  HOLDS(plan.total_tokens() == total(lengths));
  if (std::string problem = check_chunks(plan, lengths); !problem.empty()) return problem;

  std::vector<char> seen(at(plan.total_tokens()), 0);
  int64_t fewest = plan.total_tokens();
  int64_t most = 0;
  for (int64_t r = 0; r < world; ++r) {
    const int64_t rows = plan.local_tokens(r);
    fewest = std::min(fewest, rows);
    most = std::max(most, rows);
    const std::vector<int64_t> tokens = plan.token_indices(r);
    const std::vector<int64_t> positions = plan.position_ids(r);
    const std::vector<int64_t> local = plan.local_cu_seqlens(r);
    HOLDS(static_cast<int64_t>(tokens.size()) == rows && tokens.size() == positions.size());
    HOLDS(local.size() == lengths.size() + 1 && local.front() == 0 && local.back() == rows);
    const auto [early, late] = plan.chunk_indices(r);
    for (int64_t d = 0; d < plan.num_documents(); ++d) {
      // Document after document, its early chunk and then its late one.
      int64_t row = local[at(d)];
      for (const int64_t index : {early, late}) {
        const Chunk chunk = plan.chunk(d, index);
        HOLDS(chunk.local_row == row);
        for (int64_t position = chunk.begin; position < chunk.end; ++position, ++row) {
          HOLDS(positions[at(row)] == position);
          HOLDS(tokens[at(row)] == plan.cu_seqlens()[at(d)] + position);
        }
      }
      HOLDS(row == local[at(d + 1)]);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = tokens[at(row)];
      HOLDS(seen[at(token)] == 0);
      seen[at(token)] = 1;
      HOLDS(plan.global_token(r, row) == token);
      HOLDS((plan.local_row(token) == LocalRow{r, row}));
      if (world == 1) HOLDS(token == row);
    }
  }
  HOLDS(most - fewest <= 1);
  HOLDS(std::count(seen.begin(), seen.end(), 1) == plan.total_tokens());
  return {};
}

std::string check_work(const Plan& plan, const Lengths& lengths, const Mask& mask) {
  const std::vector<double> pairs_all = plan.visible_pairs_all(mask);
  const std::vector<int64_t> gathered_all = plan.gathered_tokens_all(mask);
  const std::vector<double> bytes_all = plan.gathered_bytes_all(2, 8, 4, mask);
  HOLDS_FOR(std::ssize(pairs_all) == plan.world_size(), mask);
  for (int64_t r = 0; r < plan.world_size(); ++r) {
    const std::vector<int64_t> tokens = plan.token_indices(r);
    const std::vector<int64_t> positions = plan.position_ids(r);
    const int64_t gathered = plan.gathered_tokens(r, mask);
    HOLDS_FOR(gathered_all[at(r)] == gathered, mask);
    HOLDS_FOR(
        bytes_all[at(r)] == 2.0 * 2 * 8 * 4 * static_cast<double>(gathered - plan.local_tokens(r)),
        mask);
    HOLDS_FOR(plan.gathered_bytes(r, 2, 8, 4, mask) == bytes_all[at(r)], mask);

    // Segments fill the gathered buffer exactly once, with the tokens that the ranges name.
    std::vector<int64_t> buffer(at(gathered), -1);
    int64_t source = 0;
    for (const Segment& segment : plan.gather_segments(r, mask)) {
      HOLDS_FOR(segment.source >= source && segment.rows > 0, mask);
      source = segment.source;
      for (int64_t i = 0; i < segment.rows; ++i) {
        HOLDS_FOR(buffer[at(segment.destination_row + i)] == -1, mask);
        buffer[at(segment.destination_row + i)] = plan.global_token(source, segment.source_row + i);
      }
    }
    int64_t row = 0;
    for (const KeyRange& range : plan.gathered_ranges(r, mask)) {
      HOLDS_FOR(range.row == row && range.begin < range.end, mask);
      for (int64_t p = range.begin; p < range.end; ++p, ++row) {
        HOLDS_FOR(buffer[at(row)] == plan.cu_seqlens()[at(range.document)] + p, mask);
      }
    }
    HOLDS_FOR(row == gathered, mask);

    // Every row is in exactly one item, whose keys hold exactly what the row sees by definition.
    std::vector<char> covered(tokens.size(), 0);
    double pairs = 0;
    double last_weight = -1;
    for (const WorkItem& item : plan.work_items(r, mask)) {
      HOLDS_FOR(item.document_length == lengths[at(item.document)] && item.q_count > 0, mask);
      double weight = 0;
      for (int64_t i = 0; i < item.q_count; ++i) {
        const int64_t q = item.q_begin + i;
        const int64_t position = item.q_position + i;
        HOLDS_FOR(covered[at(q)] == 0 && positions[at(q)] == position, mask);
        covered[at(q)] = 1;
        const int64_t begin = plan.cu_seqlens()[at(item.document)];
        HOLDS_FOR(tokens[at(q)] == begin + position, mask);
        for (int64_t j = 0; j < item.document_length; ++j) {
          if (!sees(mask, position, j)) continue;
          HOLDS_FOR(j >= item.k_position && j < item.k_position + item.k_count, mask);
          HOLDS_FOR(buffer[at(item.k_begin + j - item.k_position)] == begin + j, mask);
          weight += 1;
        }
      }
      if (mask.causal) {
        HOLDS_FOR(item.k_position + item.k_count == item.q_position + item.q_count, mask);
      }
      HOLDS_FOR(last_weight < 0 || weight <= last_weight, mask);
      last_weight = weight;
      pairs += weight;
    }
    HOLDS_FOR(std::count(covered.begin(), covered.end(), 0) == 0, mask);
    HOLDS_FOR(plan.visible_pairs(r, mask) == pairs && pairs_all[at(r)] == pairs, mask);
    HOLDS_FOR(plan.flops(r, 3, 5, mask) == 4 * 3 * 5 * pairs, mask);
  }
  return {};
}

std::string check_pieces(const Plan& plan, const Lengths& lengths) {
  for (int64_t r = 0; r < plan.world_size(); ++r) {
    const std::vector<int64_t> positions = plan.position_ids(r);
    const std::vector<int64_t> local = plan.local_cu_seqlens(r);
    std::vector<int64_t> first_key(lengths.size(), 0);
    for (const KeyRange& range : plan.gathered_ranges(r)) first_key[at(range.document)] = range.row;
    std::vector<Ranges> seen(positions.size());
    for (const Piece& piece : plan.pieces(r)) {
      if (piece.causal) HOLDS(piece.q_count == piece.k_count);
      HOLDS(piece.q_begin >= local[at(piece.document)]);
      HOLDS(piece.q_begin + piece.q_count <= local[at(piece.document + 1)]);
      const int64_t k = piece.k_begin - first_key[at(piece.document)];
      for (int64_t i = 0; i < piece.q_count; ++i) {
        seen[at(piece.q_begin + i)].emplace_back(k, k + (piece.causal ? i + 1 : piece.k_count));
      }
    }
    for (std::size_t row = 0; row < seen.size(); ++row) {
      HOLDS(tiles(seen[row], 0, positions[row] + 1));
    }
  }
  return {};
}

std::string check_balance(const Plan& plan, const Lengths& lengths) {
  const std::vector<double> pairs = plan.visible_pairs_all();
  double uneven = 0;
  for (const int64_t length : lengths) {
    if (length % plan.num_chunks() != 0) uneven += static_cast<double>(length);
  }
  const auto [least, most] = std::minmax_element(pairs.begin(), pairs.end());
  HOLDS(*most - *least <= 2 * uneven);
  return {};
}

}  // namespace zigzag::test
