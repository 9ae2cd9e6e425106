#include "cuda/launch_lists.h"

#include <algorithm>
#include <map>

#include "cuda/recent.h"

namespace zigzag::cuda {
namespace {

using std::int64_t;

constexpr std::size_t kKeptPacks = 256;

struct Rectangle {
  int64_t q_begin, q_count, k_begin, k_count;
  int dk_source = 0;
};

int64_t length(const Rectangle& item) { return std::max(item.q_count, item.k_count); }

/// Splits items into at most two launches, so that no launch's grid, which is batch x the longest
/// item, is mostly empty. Items keep falling length inside a launch.
std::vector<std::vector<Rectangle>> split_by_length(std::vector<Rectangle> items) {
  std::stable_sort(items.begin(), items.end(),
                   [](const Rectangle& a, const Rectangle& b) { return length(a) > length(b); });
  const auto count = static_cast<int64_t>(items.size());
  if (count == 0) return {};
  const int64_t whole = count * length(items[0]);
  int64_t best = whole;
  int64_t cut = 0;
  for (int64_t i = 1; i < count; ++i) {
    const int64_t cost =
        i * length(items[0]) + (count - i) * length(items[static_cast<std::size_t>(i)]);
    if (cost < best) {
      best = cost;
      cut = i;
    }
  }
  // A second launch must save more than its own start.
  if (cut == 0 || best * 2 > whole || count <= 8) return {std::move(items)};
  const auto middle = items.begin() + static_cast<std::ptrdiff_t>(cut);
  return {{items.begin(), middle}, {middle, items.end()}};
}

void add_launch(std::vector<Launch>& launches, std::vector<Rectangle> items, CudnnMask mask,
                int layer, int64_t& dk_rows, bool early = false) {
  if (items.empty()) return;
  std::stable_sort(items.begin(), items.end(),
                   [](const Rectangle& a, const Rectangle& b) { return length(a) > length(b); });
  Launch launch;
  launch.mask = mask;
  launch.layer = layer;
  launch.early = early;
  for (const Rectangle& item : items) {
    launch.items.push_back(
        {item.q_begin, item.q_count, item.k_begin, item.k_count, dk_rows, item.dk_source});
    launch.max_q = std::max(launch.max_q, item.q_count);
    launch.max_k = std::max(launch.max_k, item.k_count);
    dk_rows += item.k_count;
  }
  launches.push_back(std::move(launch));
}

/// The one length of all items when they are squares side by side that fill q and k; else 0.
int64_t equal_length_of(std::vector<Rectangle> items) {
  std::sort(items.begin(), items.end(),
            [](const Rectangle& a, const Rectangle& b) { return a.q_begin < b.q_begin; });
  int64_t row = 0;
  for (const Rectangle& item : items) {
    const int64_t length = items[0].q_count;
    if (item.q_begin != row || item.k_begin != row || item.q_count != length ||
        item.k_count != length) {
      return 0;
    }
    row += length;
  }
  return items.empty() ? 0 : items[0].q_count;
}

/// A document's early and late items as one where they see keys alike: their rows stand side by
/// side in the shard.
std::vector<WorkItem> merged_items(std::span<const WorkItem> items, const Mask& mask) {
  std::vector<WorkItem> merged;
  std::map<int64_t, std::size_t> of_document;
  for (const WorkItem& item : items) {
    const auto [found, fresh] = of_document.try_emplace(item.document, merged.size());
    if (!fresh) {
      WorkItem& other = merged[found->second];
      WorkItem first = other.q_begin < item.q_begin ? other : item;
      const WorkItem& second = other.q_begin < item.q_begin ? item : other;
      const bool adjacent = first.q_begin + first.q_count == second.q_begin;
      const bool alike = !mask.causal || first.q_position + first.q_count == second.q_position;
      if (adjacent && alike && first.k_begin == second.k_begin) {
        first.q_count += second.q_count;
        first.k_count = std::max(first.k_count, second.k_count);
        other = first;
        continue;
      }
    }
    merged.push_back(item);
  }
  return merged;
}

ForwardLaunches make_forward(const AttendArgs& args) {
  std::vector<Rectangle> items;
  bool square = true;
  for (const WorkItem& item : merged_items(args.items, args.mask)) {
    if (item.q_count == 0 || item.k_count == 0) continue;
    items.push_back({item.q_begin, item.q_count, item.k_begin, item.k_count});
    square = square && item.q_count == item.k_count;
  }
  CudnnMask mask = CudnnMask::kNone;
  if (args.mask.causal) mask = square ? CudnnMask::kTopLeft : CudnnMask::kBottomRight;
  ForwardLaunches result;
  int64_t unused = 0;
  for (const std::vector<Rectangle>& part : split_by_length(items)) {
    add_launch(result.launches, part, mask, 0, unused);
  }
  result.equal_length = equal_length_of(items);
  return result;
}

/// A backward's work by kind. Whole items are cut, if at all, into blocks of queries that keep all
/// of their keys, so that every row of dq is made in one place and rounded once.
struct BackwardWork {
  std::vector<Rectangle> rectangles;
  std::vector<Rectangle> diagonals;  // square, top-left causal
  std::vector<Rectangle> items;      // bottom-right causal

  void append(const BackwardWork& other) {
    rectangles.insert(rectangles.end(), other.rectangles.begin(), other.rectangles.end());
    diagonals.insert(diagonals.end(), other.diagonals.begin(), other.diagonals.end());
    items.insert(items.end(), other.items.begin(), other.items.end());
  }
};

/// What a launch costs, in tiles of 128 x 128 that cuDNN computes for one query head (measured on
/// an H200): also making and adding up the partial dk and dv of 128 keys, and passing 128 queries
/// through a second launch.
constexpr int64_t kTile = 128;
constexpr double kKeysCost = 0.8;
constexpr double kSecondLaunchCost = 2.1;
/// Whole items, which are more exact, are taken where they cost up to this much more.
constexpr double kExactness = 1.04;
constexpr int64_t kMostBlocks = 3;

double tiles(int64_t rows) { return static_cast<double>((rows + kTile - 1) / kTile); }

double cost_of(const BackwardWork& work) {
  double cost = 0;
  for (const Rectangle& x : work.rectangles) {
    cost +=
        tiles(x.q_count) * (tiles(x.k_count) + kSecondLaunchCost) + kKeysCost * tiles(x.k_count);
  }
  for (const Rectangle& x : work.diagonals) {
    cost += tiles(x.q_count) * (tiles(x.q_count) + 1) / 2 + kKeysCost * tiles(x.k_count);
  }
  for (const Rectangle& x : work.items) {
    cost += (tiles(x.q_count) + kKeysCost) * tiles(x.k_count);
  }
  return cost;
}

/// One document's pieces. Where the rank's two chunks are neighbours, their diagonal blocks and the
/// rectangle between them are one larger diagonal block.
BackwardWork pieces_of(std::span<const Piece> pieces) {
  BackwardWork work;
  for (const Piece& piece : pieces) {
    if (piece.q_count == 0 || piece.k_count == 0) continue;
    (piece.causal ? work.diagonals : work.rectangles)
        .push_back(
            {piece.q_begin, piece.q_count, piece.k_begin, piece.k_count, piece.causal ? 0 : 1});
  }
  if (work.diagonals.size() == 2) {
    Rectangle& first = work.diagonals[0];
    const Rectangle second = work.diagonals[1];
    if (first.q_begin + first.q_count == second.q_begin &&
        first.k_begin + first.k_count == second.k_begin) {
      std::erase_if(work.rectangles, [&](const Rectangle& between) {
        return between.q_begin == second.q_begin && between.q_count == second.q_count &&
               between.k_begin == first.k_begin && between.k_count == first.k_count;
      });
      first.q_count += second.q_count;
      first.k_count += second.k_count;
      work.diagonals.pop_back();
    }
  }
  return work;
}

/// One document's items, each cut into `blocks` blocks of queries. Keys that several blocks see get
/// a partial gradient from each.
BackwardWork whole_items(std::span<const WorkItem> items, int64_t blocks) {
  BackwardWork work;
  int source = 1;
  for (const WorkItem& item : items) {
    if (item.q_count == 0 || item.k_count == 0) continue;
    const int64_t rows = (item.q_count + blocks - 1) / blocks;
    // Blocks of whole tiles waste none.
    const int64_t step = (rows + kTile - 1) / kTile * kTile;
    for (int64_t q = 0; q < item.q_count; q += step) {
      const int64_t count = std::min(step, item.q_count - q);
      const int64_t keys = item.k_count - item.q_count + q + count;
      work.items.push_back({item.q_begin + q, count, item.k_begin, keys, source++});
    }
  }
  return work;
}

/// The causal backward of a rank, a document at a time in the form that costs least.
BackwardWork causal_work(const AttendArgs& args) {
  const std::vector<Piece> pieces = args.plan->pieces(args.rank);
  std::map<int64_t, std::vector<WorkItem>> items;
  for (const WorkItem& item : args.items) items[item.document].push_back(item);
  // A rank alone sees whole documents: squares, of which cuDNN skips the masked half.
  const bool squares = args.plan->world_size() == 1;
  BackwardWork mixed;
  BackwardWork whole;
  for (std::size_t first = 0; first < pieces.size();) {
    std::size_t end = first;
    while (end < pieces.size() && pieces[end].document == pieces[first].document) ++end;
    const BackwardWork cut = pieces_of(std::span(pieces).subspan(first, end - first));
    if (squares) {
      mixed.append(cut);
    } else {
      const std::vector<WorkItem>& own = items[pieces[first].document];
      BackwardWork best = whole_items(own, 1);
      for (int64_t blocks = 2; blocks <= kMostBlocks; ++blocks) {
        BackwardWork other = whole_items(own, blocks);
        if (cost_of(other) < cost_of(best)) best = std::move(other);
      }
      whole.append(best);
      mixed.append(cost_of(best) <= kExactness * cost_of(cut) ? best : cut);
    }
    first = end;
  }
  if (squares) return mixed;
  return cost_of(whole) <= kExactness * cost_of(mixed) ? whole : mixed;
}

/// Items in layers inside which no two share query rows.
std::vector<std::vector<Rectangle>> in_layers(const std::vector<Rectangle>& items) {
  std::vector<std::vector<Rectangle>> layers;
  std::vector<std::map<int64_t, int64_t>> taken;  // by layer: begin -> end
  for (const Rectangle& item : items) {
    const int64_t end = item.q_begin + item.q_count;
    std::size_t layer = 0;
    for (; layer < layers.size(); ++layer) {
      const auto& rows = taken[layer];
      const auto after = rows.lower_bound(item.q_begin);
      const bool hits_next = after != rows.end() && after->first < end;
      const bool hits_last = after != rows.begin() && std::prev(after)->second > item.q_begin;
      if (!hits_next && !hits_last) break;
    }
    if (layer == layers.size()) {
      layers.emplace_back();
      taken.emplace_back();
    }
    layers[layer].push_back(item);
    taken[layer][item.q_begin] = end;
  }
  return layers;
}

BackwardLaunches make_backward(const AttendArgs& args, bool separate) {
  BackwardWork work;
  if (args.mask.causal) {
    work = causal_work(args);
  } else {
    for (const WorkItem& item : merged_items(args.items, args.mask)) {
      if (item.q_count == 0 || item.k_count == 0) continue;
      work.rectangles.push_back({item.q_begin, item.q_count, item.k_begin, item.k_count, 1});
    }
  }
  BackwardLaunches result;
  result.gathered_rows = args.plan->gathered_tokens(args.rank, args.mask);
  // One launch a kind: cuDNN's backward does not mind items of unlike length, but passes over all
  // of its queries before and after. No two diagonal blocks or items share query rows.
  add_launch(result.launches, work.diagonals, CudnnMask::kTopLeft, 0, result.early_k, true);
  add_launch(result.launches, work.items, CudnnMask::kBottomRight, 0, result.late_k);
  if (separate) {
    for (const std::vector<Rectangle>& layer : in_layers(work.rectangles)) {
      add_launch(result.launches, layer, CudnnMask::kNone, result.layers++, result.late_k);
    }
  } else if (!work.rectangles.empty()) {
    add_launch(result.launches, work.rectangles, CudnnMask::kNone, result.layers++, result.late_k);
  }

  std::vector<SumPart> q_parts;
  std::vector<SumPart> k_parts;
  int key_sources = 2;
  for (const Launch& launch : result.launches) {
    for (const LaunchItem& item : launch.items) {
      q_parts.push_back({launch.layer, item.q_begin, item.q_begin, item.q_count});
      k_parts.push_back({item.dk_source, item.k_begin, item.dk_begin, item.k_count});
      key_sources = std::max(key_sources, item.dk_source + 1);
    }
  }
  result.dq = make_sum_table(q_parts, result.layers, args.q.shape[0]);
  result.dkv = make_sum_table(k_parts, key_sources, result.gathered_rows);
  result.one_layer = work.rectangles.empty() ||
                     (work.diagonals.empty() && work.items.empty() && result.layers == 2);
  result.covers_keys = result.one_layer && work.items.empty() &&
                       result.early_k + result.late_k == result.gathered_rows;
  if (work.items.empty() && (work.rectangles.empty() || work.diagonals.empty())) {
    result.equal_length =
        equal_length_of(work.rectangles.empty() ? work.diagonals : work.rectangles);
  }
  return result;
}

}  // namespace

TableKey pack_key(const AttendArgs& args) {
  std::uint64_t plan =
      mix(args.plan->fingerprint(), static_cast<std::uint64_t>(args.plan->total_tokens()));
  plan = mix(plan, static_cast<std::uint64_t>(args.plan->world_size()));
  std::uint64_t detail = mix(static_cast<std::uint64_t>(args.rank), args.mask.causal ? 1 : 0);
  detail = mix(detail, static_cast<std::uint64_t>(args.mask.window_left));
  detail = mix(detail, static_cast<std::uint64_t>(args.mask.window_right));
  return {plan, detail, 0};
}

bool launches_express(const Mask& mask) {
  return mask.window_left < 0 && (mask.causal || mask.window_right < 0);
}

std::shared_ptr<const ForwardLaunches> forward_launches(const AttendArgs& args) {
  static auto* recent = new Recent<TableKey, ForwardLaunches>(kKeptPacks);
  return recent->get(pack_key(args), [&] { return make_forward(args); });
}

std::shared_ptr<const BackwardLaunches> backward_launches(const AttendArgs& args, bool separate) {
  static auto* recent = new Recent<TableKey, BackwardLaunches>(kKeptPacks);
  TableKey key = pack_key(args);
  key.kind = separate ? 1 : 0;
  return recent->get(key, [&] { return make_backward(args, separate); });
}

}  // namespace zigzag::cuda
