// The units of the tensor-core kernels for Hopper GPUs cover exactly what the mask shows: the loops
// of src/cuda/hopper/forward.cuh and backward.cuh are followed unit by unit, without a GPU. Each
// query row collects the runs of keys that it meets, which must be what it sees, once.
#include <algorithm>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "comm/transport.h"
#include "cuda/hopper/work.h"
#include "zigzag/error.h"

namespace zigzag::cuda::hopper {
namespace {

using std::int64_t;

struct Token {
  int64_t document = -1;
  int64_t position = -1;
  bool operator==(const Token&) const = default;
};

/// Gathered rows [begin, end).
struct Run {
  int64_t begin = -1;
  int64_t end = -1;
};

/// A rank's rows as the plan has them.
struct Layout {
  std::vector<Token> local;     // of each row of the shard
  std::vector<Token> gathered;  // of each row of the gathered keys
  std::vector<Run> visible;     // of each row of the shard: the gathered rows that it sees
};

Layout make_layout(const Plan& plan, int64_t rank, const Mask& mask) {
  Layout layout;
  const std::vector<int64_t> positions = plan.position_ids(rank);
  const std::vector<int64_t> begins = plan.local_cu_seqlens(rank);
  layout.local.resize(positions.size());
  layout.visible.resize(positions.size());
  layout.gathered.resize(static_cast<std::size_t>(plan.gathered_tokens(rank, mask)));
  for (int64_t d = 0; d < plan.num_documents(); ++d) {
    for (int64_t i = begins[static_cast<std::size_t>(d)];
         i < begins[static_cast<std::size_t>(d) + 1]; ++i) {
      layout.local[static_cast<std::size_t>(i)] = {d, positions[static_cast<std::size_t>(i)]};
    }
  }
  for (const KeyRange& range : plan.gathered_ranges(rank, mask)) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      layout.gathered.at(static_cast<std::size_t>(range.row + i - range.begin)) = {range.document,
                                                                                   i};
    }
    const auto d = static_cast<std::size_t>(range.document);
    const int64_t length = plan.document_length(range.document);
    for (auto i = static_cast<std::size_t>(begins[d]); i < static_cast<std::size_t>(begins[d + 1]);
         ++i) {
      const int64_t first = mask.first_key(positions[i]);
      const int64_t end = mask.end_key(positions[i], length);
      if (first < range.begin || end > range.end) continue;
      layout.visible[i] = {range.row + first - range.begin, range.row + end - range.begin};
    }
  }
  return layout;
}

/// The runs of each row of the shard, in any order.
using Seen = std::vector<std::vector<Run>>;

void expect_visible(Seen& seen, const Layout& layout) {
  for (std::size_t i = 0; i < seen.size(); ++i) {
    std::vector<Run>& runs = seen[i];
    std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) {
      return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    });
    int64_t at = layout.visible[i].begin;
    ASSERT_GE(at, 0) << "the gathered keys lack some that row " << i << " sees";
    for (const Run& run : runs) {
      ASSERT_EQ(run.begin, at) << "row " << i << " of the shard, gathered row";
      at = run.end;
    }
    ASSERT_EQ(at, layout.visible[i].end) << "row " << i << " of the shard, gathered row";
  }
}

int position_of(const Span& span, int row) {
  return row < span.q_early ? span.early_position + row : span.late_position + row - span.q_early;
}

/// Spans hold the shard's rows one after another.
void check_spans(const Spans& spans, const Layout& layout) {
  std::size_t row = 0;
  ASSERT_EQ(spans.documents.size(), spans.spans.size());
  for (std::size_t s = 0; s < spans.spans.size(); ++s) {
    const Span& span = spans.spans[s];
    ASSERT_EQ(span.q_begin, static_cast<int64_t>(row));
    ASSERT_GT(span.q_count, 0);
    ASSERT_LE(row + static_cast<std::size_t>(span.q_count), layout.local.size());
    for (int i = 0; i < span.q_count; ++i, ++row) {
      ASSERT_EQ(layout.local[row], (Token{spans.documents[s], position_of(span, i)}));
    }
  }
  ASSERT_EQ(row, layout.local.size());
}

/// Tiles are counted through the spans.
void check_tiles(const BackwardWork& work) {
  int64_t tiles = 0;
  for (std::size_t s = 0; s < work.spans.spans.size(); ++s) {
    ASSERT_EQ(work.spans.spans[s].tile_begin, tiles);
    for (int i = 0; i < work.spans.spans[s].q_count; i += work.tile_tokens(), ++tiles) {
      ASSERT_LT(tiles, work.tiles());
      ASSERT_EQ(work.tile_span[static_cast<std::size_t>(tiles)], static_cast<int64_t>(s));
    }
  }
  ASSERT_EQ(tiles, work.tiles());
}

/// What compute_forward does with a unit for the first head of its tiles.
void follow(const ForwardUnit& unit, int tile_tokens, const Span& span, const Reach& reach,
            std::vector<int>& written, Seen& seen) {
  const int live = std::min(tile_tokens, span.q_count - unit.first_row);
  const int end_block = (unit.end_key + kKeyTile - 1) / kKeyTile;
  ASSERT_GE(unit.first_row, 0);
  ASSERT_GT(live, 0);
  ASSERT_GE(unit.first_block, 0);
  ASSERT_LE(unit.end_key, span.k_count);
  ASSERT_GT(end_block, unit.first_block) << "the kernel waits for at least one block of keys";
  const auto key_of = [&](int row) {
    return position_of(span, unit.first_row + std::min(row, live - 1)) - span.k_position;
  };
  const int all_from = key_of(live - 1) - reach.left;
  const int all_to = std::min(span.k_count - 1, key_of(0) + reach.right);
  for (int row = 0; row < live; ++row) {
    const int first_key = key_of(row) - reach.left;
    const int last_key = std::min(span.k_count - 1, key_of(row) + reach.right);
    const auto at = static_cast<std::size_t>(span.q_begin + unit.first_row + row);
    ++written[at];
    for (int block = unit.first_block; block < end_block; ++block) {
      int from = block * kKeyTile;
      int to = from + kKeyTile - 1;
      if (from < all_from || to > all_to) {
        from = std::max(from, first_key);
        to = std::min(to, last_key);
      }
      if (from <= to) seen[at].push_back({span.k_begin + from, span.k_begin + to + 1});
    }
  }
}

/// The blocks of a unit, each once and the last of them first, and where their keys are read.
/// `fetched`: of each gathered row, whether it is there.
void check_runs(const ForwardUnit& unit, std::span<const KeyRun> runs, const Span& span,
                int64_t document, const Layout& layout, const std::vector<int>& fetched) {
  const int end_block = (unit.end_key + kKeyTile - 1) / kKeyTile;
  std::vector<int> met(static_cast<std::size_t>(end_block));
  int count = 0;
  for (const KeyRun& run : runs) {
    for (int block = run.end - 1; block >= run.begin; --block, ++count) {
      if (count == 0) {
        ASSERT_EQ(block, end_block - 1);
      }
      ASSERT_GE(block, unit.first_block);
      ASSERT_LT(block, end_block);
      ++met[static_cast<std::size_t>(block)];
      const int keys = std::min(kKeyTile, span.k_count - block * kKeyTile);
      const std::vector<Token>& read = run.own != 0 ? layout.local : layout.gathered;
      for (int key = 0; key < keys; ++key) {
        const Token want{document, span.k_position + block * kKeyTile + key};
        const auto row = static_cast<std::size_t>(run.row + block * kKeyTile + key);
        ASSERT_EQ(read.at(row), want) << "block " << block << " of span " << unit.span;
        if (run.own == 0) {
          ASSERT_EQ(fetched.at(row), 1) << "row " << row << " is read and not fetched";
        }
      }
    }
  }
  ASSERT_EQ(count, end_block - unit.first_block) << "the kernel counts the blocks so";
  for (int block = unit.first_block; block < end_block; ++block) {
    ASSERT_EQ(met[static_cast<std::size_t>(block)], 1) << "block " << block;
  }
}

/// Pieces bring the right rows, none twice; gives which rows are there in the end.
std::vector<int> check_fetch(const AttendArgs& args, const Spans& spans, const Layout& layout,
                             int64_t row_bytes) {
  const std::vector<std::vector<Segment>> receives =
      comm::make_exchange_table(*args.plan, args.rank, args.mask).receives;
  const FetchWork work = make_fetch_work(args, spans, receives, row_bytes);
  std::vector<int> fetched(layout.gathered.size());
  std::vector<int64_t> wanted(work.wanted.size());
  int64_t rows = 0;
  for (const FetchPiece& piece : work.pieces) {
    EXPECT_GT(piece.rows, 0);
    EXPECT_LE(piece.rows * row_bytes, kFetchBytes);
    EXPECT_EQ(piece.row / kKeyTile, (piece.row + piece.rows - 1) / kKeyTile);
    wanted.at(static_cast<std::size_t>(piece.row / kKeyTile)) += piece.rows;
    rows += piece.rows;
    for (int i = 0; i < piece.rows; ++i) {
      const auto row = static_cast<std::size_t>(piece.row + i);
      ++fetched.at(row);
      const Token& token = layout.gathered.at(row);
      const int64_t begin = args.plan->cu_seqlens()[static_cast<std::size_t>(token.document)];
      const LocalRow source = args.plan->local_row(begin + token.position);
      EXPECT_EQ(source.rank, piece.source);
      EXPECT_EQ(source.row, piece.source_row + i);
    }
    if (testing::Test::HasFailure()) break;
  }
  EXPECT_EQ(rows, work.rows);
  EXPECT_TRUE(std::equal(wanted.begin(), wanted.end(), work.wanted.begin(), work.wanted.end()));
  EXPECT_EQ(std::count_if(fetched.begin(), fetched.end(), [](int times) { return times > 1; }), 0);
  return fetched;
}

void check_forward(const AttendArgs& args, const Layout& layout, bool own_rows) {
  SCOPED_TRACE(own_rows ? "forward, own rows in place" : "forward");
  const ForwardWork work = make_forward_work(args, own_rows);
  ASSERT_GT(work.tile_heads, 0);
  ASSERT_LE(work.tile_heads, kMaxTileHeads);
  ASSERT_EQ(args.q.shape[1] / args.k.shape[1] % work.tile_heads, 0);
  for (int row = 0; row < kForwardTile; ++row) {
    ASSERT_EQ(row * work.by_tile_heads() >> 16, row / work.tile_heads);
  }
  std::vector<int> fetched(layout.gathered.size(), 1);
  if (own_rows) {
    for (const int64_t row_bytes : {16, 2048, 16384}) {
      fetched = check_fetch(args, work.spans, layout, row_bytes);
    }
  }
  ASSERT_NO_FATAL_FAILURE(check_spans(work.spans, layout));
  std::vector<int> written(layout.local.size());
  Seen seen(layout.local.size());
  int64_t weight = kFar;
  for (const ForwardUnit& unit : work.units) {
    const Span& span = work.spans.spans.at(static_cast<std::size_t>(unit.span));
    ASSERT_NO_FATAL_FAILURE(
        follow(unit, work.tile_tokens(), span, reach_of(args.mask), written, seen));
    ASSERT_GT(unit.run_count, 0);
    const auto runs = std::span(work.runs).subspan(static_cast<std::size_t>(unit.first_run),
                                                   static_cast<std::size_t>(unit.run_count));
    const int64_t document = work.spans.documents.at(static_cast<std::size_t>(unit.span));
    ASSERT_NO_FATAL_FAILURE(check_runs(unit, runs, span, document, layout, fetched));
    ASSERT_LE(unit.end_key - unit.first_block * kKeyTile, weight) << "heaviest first";
    weight = unit.end_key - unit.first_block * kKeyTile;
  }
  EXPECT_EQ(std::count(written.begin(), written.end(), 1), std::ssize(written));
  expect_visible(seen, layout);
}

/// The keys that a unit reads and whose gradients it writes are the same, and of its document.
void check_keys(const BackwardUnit& unit, int64_t document, bool own, const Layout& layout) {
  ASSERT_GT(unit.k_count, 0);
  ASSERT_LE(unit.k_count, kKeyTile);
  const std::vector<Token>& read = own ? layout.local : layout.gathered;
  ASSERT_GE(unit.k_row, 0);
  ASSERT_LE(unit.k_row + unit.k_count, std::ssize(read));
  ASSERT_GE(unit.dk_row, 0);
  ASSERT_LE(unit.dk_row + unit.k_count, std::ssize(layout.gathered));
  for (int key = 0; key < unit.k_count; ++key) {
    const Token want{document, unit.k_position + key};
    ASSERT_EQ(read[static_cast<std::size_t>(unit.k_row + key)], want);
    ASSERT_EQ(layout.gathered[static_cast<std::size_t>(unit.dk_row + key)], want);
  }
}

/// The keys of a unit are the rank's own.
void check_own(const BackwardUnit& unit, int64_t document, const Layout& layout) {
  for (int key = 0; key < unit.k_count; ++key) {
    const Token token{document, unit.k_position + key};
    ASSERT_NE(std::find(layout.local.begin(), layout.local.end(), token), layout.local.end());
  }
}

/// What compute of backward.cuh does with a unit for one query head.
void follow(const BackwardUnit& unit, int tokens, const Span& span, const Reach& reach,
            Seen& seen) {
  ASSERT_GE(unit.first_tile, 0);
  ASSERT_LE(unit.end_tile, (span.q_count + tokens - 1) / tokens);
  for (int tile = unit.first_tile; tile < unit.end_tile; ++tile) {
    const bool masked = tile < unit.first_full || tile >= unit.end_full;
    const int live = span.q_count - tile * tokens;
    if (!masked) {
      ASSERT_GE(live, tokens) << "a tile without a mask has rows of others";
    }
    for (int query = 0; query < std::min(live, tokens); ++query) {
      const int row = tile * tokens + query;
      const int at = position_of(span, row) - unit.k_position;
      int from = 0;
      int to = kKeyTile - 1;
      if (masked) {
        from = std::max(from, at - reach.left);
        to = std::min(unit.k_count - 1, at + reach.right);
      }
      if (from > to || to < 0) continue;
      seen[static_cast<std::size_t>(span.q_begin + row)].push_back(
          {unit.dk_row + from, unit.dk_row + to + 1});
    }
  }
}

void check_backward(const AttendArgs& args, const Layout& layout, bool own_rows, int processors) {
  SCOPED_TRACE(own_rows ? "backward, own rows early" : "backward");
  const BackwardWork work = make_backward_work(args, own_rows, processors);
  ASSERT_NO_FATAL_FAILURE(check_spans(work.spans, layout));
  ASSERT_NO_FATAL_FAILURE(check_tiles(work));
  ASSERT_LE(work.tile_heads, kMaxTileHeads);
  ASSERT_EQ(work.tile_heads & (work.tile_heads - 1), 0) << "the kernel shifts by its logarithm";
  if (!own_rows) {
    EXPECT_TRUE(work.early.empty());
    EXPECT_TRUE(work.rest.empty());
  }
  const int64_t heads = args.q.shape[1];
  const int64_t kv_heads = args.k.shape[1];
  const std::size_t rows = layout.gathered.size();
  // Of each row of dk, KV head and split: how many units write it.
  std::vector<int> written(rows * static_cast<std::size_t>(kv_heads * work.splits));
  for (const std::vector<BackwardUnit>* units : {&work.early, &work.others, &work.rest}) {
    int64_t weight = int64_t{kFar} * heads;
    for (const BackwardUnit& unit : *units) {
      ASSERT_LE(int64_t{unit.end_tile - unit.first_tile} * unit.heads, weight) << "heaviest first";
      weight = int64_t{unit.end_tile - unit.first_tile} * unit.heads;
      const int64_t document = work.spans.documents.at(static_cast<std::size_t>(unit.span));
      ASSERT_NO_FATAL_FAILURE(check_keys(unit, document, units == &work.early, layout));
      // Other ranks fetch their rows before these have run.
      if (units == &work.rest) {
        ASSERT_NO_FATAL_FAILURE(check_own(unit, document, layout));
      }
      ASSERT_GE(unit.split, 0);
      ASSERT_LT(unit.split, work.splits);
      ASSERT_GT(unit.heads, 0);
      ASSERT_EQ(unit.kv_head, unit.head / (heads / kv_heads));
      ASSERT_EQ(unit.kv_head, (unit.head + unit.heads - 1) / (heads / kv_heads));
      ASSERT_LE(unit.head + unit.heads, heads);
      ASSERT_EQ(unit.head % work.tile_heads, 0);
      ASSERT_EQ(unit.heads % work.tile_heads, 0);
      const auto plane = static_cast<std::size_t>(unit.kv_head * work.splits + unit.split);
      for (int key = 0; key < unit.k_count; ++key) {
        ++written[plane * rows + static_cast<std::size_t>(unit.dk_row + key)];
      }
    }
  }
  EXPECT_EQ(std::count(written.begin(), written.end(), 1), std::ssize(written)) << "rows of dk";
  for (int64_t head = 0; head < heads; ++head) {
    SCOPED_TRACE("head " + std::to_string(head));
    Seen seen(layout.local.size());
    for (const std::vector<BackwardUnit>* units : {&work.early, &work.others, &work.rest}) {
      for (const BackwardUnit& unit : *units) {
        if (head < unit.head || head >= unit.head + unit.heads) continue;
        const Span& span = work.spans.spans.at(static_cast<std::size_t>(unit.span));
        ASSERT_NO_FATAL_FAILURE(follow(unit, work.tile_tokens(), span, reach_of(args.mask), seen));
      }
    }
    ASSERT_NO_FATAL_FAILURE(expect_visible(seen, layout));
  }
}

struct Heads {
  int64_t heads, kv_heads;
  int processors;
};

/// A rank's part of a call: args refer to the plan and to `items`.
struct Call {
  std::vector<WorkItem> items;
  AttendArgs args;

  Call(const Plan& plan, int64_t rank, const Mask& mask, const Heads& heads)
      : items(plan.work_items(rank, mask)) {
    args.plan = &plan;
    args.rank = rank;
    args.items = items;
    args.mask = mask;
    args.q = TensorView::contiguous(nullptr, DType::kBFloat16,
                                    {plan.local_tokens(rank), heads.heads, 16});
    args.k = TensorView::contiguous(nullptr, DType::kBFloat16,
                                    {plan.gathered_tokens(rank, mask), heads.kv_heads, 16});
  }
};

void check_rank(const Plan& plan, int64_t rank, const Mask& mask, const std::vector<Heads>& all) {
  SCOPED_TRACE(std::to_string(plan.num_documents()) + " documents, " +
               std::to_string(plan.total_tokens()) + " tokens, W " +
               std::to_string(plan.world_size()) + " rank " + std::to_string(rank) +
               (mask.causal ? " causal, left " : " left ") + std::to_string(mask.window_left) +
               " right " + std::to_string(mask.window_right));
  const Layout layout = make_layout(plan, rank, mask);
  for (const Heads& heads : all) {
    SCOPED_TRACE(std::to_string(heads.heads) + " heads, " + std::to_string(heads.kv_heads) +
                 " KV heads");
    const Call call(plan, rank, mask, heads);
    for (const bool own_rows : {false, true}) {
      check_forward(call.args, layout, own_rows);
      check_backward(call.args, layout, own_rows, heads.processors);
    }
  }
}

const std::vector<Mask> kMasks = {{},
                                  {false, -1, -1},
                                  {true, 0, -1},
                                  {true, 1, -1},
                                  {true, 50, -1},
                                  {true, 1000, -1},
                                  {false, 40, 30},
                                  {false, -1, 10},
                                  {false, 50, -1},
                                  {false, 0, 0}};
const std::vector<Heads> kSeveralHeads = {
    {1, 1, 132}, {6, 2, 132}, {8, 1, 24}, {34, 1, 24}, {4, 4, 1}};

void check_pack(const std::vector<int64_t>& lengths, const std::vector<Mask>& masks,
                const std::vector<Heads>& heads) {
  for (const int64_t world_size : {1, 2, 3, 4, 5, 8, 16}) {
    const Plan plan = Plan::from_lengths(lengths, world_size);
    for (int64_t rank = 0; rank < world_size; ++rank) {
      for (const Mask& mask : masks) {
        check_rank(plan, rank, mask, heads);
        if (testing::Test::HasFailure()) return;  // one report is enough
      }
    }
  }
}

TEST(HopperWork, ShortDocuments) {
  check_pack({}, kMasks, kSeveralHeads);
  check_pack({0}, kMasks, kSeveralHeads);
  check_pack({1}, kMasks, kSeveralHeads);
  check_pack({7, 8, 9}, kMasks, kSeveralHeads);
  check_pack({300, 1, 0, 127, 128, 129, 7, 64, 2, 401}, kMasks, kSeveralHeads);
}

TEST(HopperWork, ManyDocuments) {
  std::mt19937_64 engine(7);
  std::vector<int64_t> lengths(300);
  for (int64_t& length : lengths) length = static_cast<int64_t>(engine() % 40);
  lengths[100] = 700;
  check_pack(lengths, kMasks, {{2, 1, 132}});
}

TEST(HopperWork, LongDocuments) {
  check_pack({5000}, kMasks, {{2, 1, 132}});
  check_pack({4096, 3000, 260}, kMasks, {{4, 2, 132}});
}

/// Chunks of which a rank of eight has whole units of its own keys: the late one's come first and
/// the early one's last.
TEST(HopperWork, OwnRows) {
  const std::vector<int64_t> lengths = {100, 17000, 1};
  const std::vector<Mask> masks = {{}, {false, -1, -1}};
  check_pack(lengths, masks, {{1, 1, 132}});
  for (const int64_t world_size : {1, 2, 8}) {
    const Plan plan = Plan::from_lengths(lengths, world_size);
    for (const Mask& mask : masks) {
      const Call call(plan, world_size - 1, mask, {1, 1, 132});
      // Every 128 keys a unit.
      const int64_t chunk = 17000 / world_size / 2;
      const BackwardWork work = make_backward_work(call.args, true, 132);
      EXPECT_GE(std::ssize(work.early), chunk / kKeyTile);
      EXPECT_GE(std::ssize(work.rest), chunk / kKeyTile);
    }
  }
}

/// A group's heads are dealt over splits only as far as there are processors without work.
TEST(HopperWork, Splits) {
  const Plan plan = Plan::from_lengths(std::vector<int64_t>{2000}, 1);
  const Layout layout = make_layout(plan, 0, Mask{});
  const std::vector<std::pair<int, int>> cases = {{1, 1}, {8, 1}, {16, 2}, {32, 4}, {132, 8}};
  for (const auto& [processors, splits] : cases) {
    const Call call(plan, 0, Mask{}, {8, 1, processors});
    check_backward(call.args, layout, false, processors);
    EXPECT_EQ(make_backward_work(call.args, false, processors).splits, splits)
        << processors << " processors";
  }
}

/// Heads share tiles where that leaves fewer rows empty and fewer keys unseen, up to all of a
/// group; a tile that a document fills alone has no need, and 126 of 128 rows are no gain for a
/// long one.
TEST(HopperWork, HeadsOfATile) {
  struct Case {
    std::vector<int64_t> lengths;
    int64_t heads, kv_heads, world_size;
    std::int32_t forward, backward;
  };
  const std::vector<Case> cases = {
      {{100, 100, 100}, 8, 1, 1, 8, 8},  {{100, 100, 100}, 8, 8, 1, 1, 1},
      {{900, 300, 500}, 32, 8, 2, 4, 4}, {{900, 300, 500}, 64, 2, 2, 16, 16},
      {{900, 300, 500}, 28, 4, 2, 7, 1}, {{900, 300, 500}, 12, 2, 2, 6, 2},
      {{131072}, 28, 4, 1, 1, 1},        {{8192}, 32, 8, 1, 1, 1}};
  for (const Case& one : cases) {
    const Plan plan = Plan::from_lengths(one.lengths, one.world_size);
    const Call call(plan, one.world_size - 1, Mask{}, {one.heads, one.kv_heads, 1});
    const ForwardWork work = make_forward_work(call.args, false);
    const BackwardWork backward = make_backward_work(call.args, false, 1);
    const std::string what = std::to_string(one.lengths[0]) + " tokens, " +
                             std::to_string(one.heads) + " heads of " +
                             std::to_string(one.kv_heads);
    EXPECT_EQ(work.tile_heads, one.forward) << what;
    EXPECT_EQ(work.tile_tokens(), kForwardTile / one.forward) << what;
    EXPECT_EQ(backward.tile_heads, one.backward) << what;
    EXPECT_EQ(backward.tile_tokens(), kQueryTile / one.backward) << what;
  }
}

/// The packs of GpuAttention.HeadsShareTiles make the kernels go where heads share tiles.
TEST(HopperWork, HeadsOfATileOnAGpu) {
  const std::vector<int64_t> short_ones(140, 33);
  const std::vector<int64_t> longer_ones(40, 70);
  std::vector<int64_t> mixed(300, 37);
  mixed.push_back(4096);
  struct Case {
    std::vector<int64_t> lengths;
    int64_t heads, kv_heads, world_size;
    std::int32_t forward, backward;
  };
  const std::vector<Case> cases = {{short_ones, 16, 1, 2, 16, 8},  {short_ones, 8, 2, 1, 2, 4},
                                   {short_ones, 12, 2, 2, 6, 2},   {short_ones, 7, 1, 1, 7, 1},
                                   {longer_ones, 32, 2, 2, 16, 8}, {mixed, 32, 2, 2, 16, 2}};
  for (const Case& one : cases) {
    const Plan plan = Plan::from_lengths(one.lengths, one.world_size);
    check_rank(plan, one.world_size - 1, Mask{}, {{one.heads, one.kv_heads, 132}});
    const Call call(plan, one.world_size - 1, Mask{}, {one.heads, one.kv_heads, 132});
    const BackwardWork backward = make_backward_work(call.args, true, 132);
    EXPECT_EQ(make_forward_work(call.args, true).tile_heads, one.forward) << one.heads;
    EXPECT_EQ(backward.tile_heads, one.backward) << one.heads;
    EXPECT_EQ(backward.early.empty(), one.lengths.back() < 4096);
  }
}

/// Positions up to the last that the kernels can count, and one that they cannot.
TEST(HopperWork, PositionsThatTheKernelsCount) {
  const int64_t world_size = int64_t{1} << 18;
  const Plan plan = Plan::from_lengths(std::vector<int64_t>{kFar - 1, 5}, world_size);
  for (const Mask& mask : {Mask{true, 50, -1}, Mask{true, 3000, -1}, Mask{false, 40, 30}}) {
    for (const int64_t rank : {int64_t{0}, world_size / 2, world_size - 1}) {
      check_rank(plan, rank, mask, {{2, 1, 132}});
    }
  }
  const Plan longer = Plan::from_lengths(std::vector<int64_t>{2 * int64_t{kFar}}, world_size);
  for (const Mask& mask : kMasks) {
    const Call call(longer, 0, mask, {1, 1, 132});
    EXPECT_THROW(make_forward_work(call.args, false), DeviceError);
    EXPECT_THROW(make_backward_work(call.args, true, 132), DeviceError);
  }
}

}  // namespace
}  // namespace zigzag::cuda::hopper
