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

void add_launches(std::vector<Launch>& launches, const std::vector<Rectangle>& items,
                  CudnnMask mask, int layer, int64_t& dk_rows) {
  for (const std::vector<Rectangle>& part : split_by_length(items)) {
    Launch launch;
    launch.mask = mask;
    launch.layer = layer;
    for (const Rectangle& item : part) {
      launch.items.push_back({item.q_begin, item.q_count, item.k_begin, item.k_count, dk_rows});
      launch.max_q = std::max(launch.max_q, item.q_count);
      launch.max_k = std::max(launch.max_k, item.k_count);
      dk_rows += item.k_count;
    }
    launches.push_back(std::move(launch));
  }
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
  add_launches(result.launches, items, mask, 0, unused);
  result.equal_length = equal_length_of(items);
  return result;
}

/// One document's pieces. Where the rank's two chunks are neighbours, their diagonal blocks and the
/// rectangle between them are one larger diagonal block.
void add_document(std::vector<Rectangle> rectangles, std::vector<Rectangle> diagonals,
                  std::vector<Rectangle>& all_rectangles, std::vector<Rectangle>& all_diagonals) {
  if (diagonals.size() == 2) {
    Rectangle& first = diagonals[0];
    const Rectangle second = diagonals[1];
    if (first.q_begin + first.q_count == second.q_begin &&
        first.k_begin + first.k_count == second.k_begin) {
      std::erase_if(rectangles, [&](const Rectangle& between) {
        return between.q_begin == second.q_begin && between.q_count == second.q_count &&
               between.k_begin == first.k_begin && between.k_count == first.k_count;
      });
      first.q_count += second.q_count;
      first.k_count += second.k_count;
      diagonals.pop_back();
    }
  }
  all_rectangles.insert(all_rectangles.end(), rectangles.begin(), rectangles.end());
  all_diagonals.insert(all_diagonals.end(), diagonals.begin(), diagonals.end());
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
  const int64_t gathered_rows = args.plan->gathered_tokens(args.rank, args.mask);
  std::vector<Rectangle> rectangles;
  std::vector<Rectangle> diagonals;
  if (args.mask.causal) {
    const std::vector<Piece> pieces = args.plan->pieces(args.rank);
    for (std::size_t first = 0; first < pieces.size();) {
      std::vector<Rectangle> own_rectangles;
      std::vector<Rectangle> own_diagonals;
      std::size_t i = first;
      for (; i < pieces.size() && pieces[i].document == pieces[first].document; ++i) {
        const Piece& piece = pieces[i];
        if (piece.q_count == 0 || piece.k_count == 0) continue;
        (piece.causal ? own_diagonals : own_rectangles)
            .push_back({piece.q_begin, piece.q_count, piece.k_begin, piece.k_count});
      }
      add_document(std::move(own_rectangles), std::move(own_diagonals), rectangles, diagonals);
      first = i;
    }
  } else {
    for (const WorkItem& item : merged_items(args.items, args.mask)) {
      if (item.q_count == 0 || item.k_count == 0) continue;
      rectangles.push_back({item.q_begin, item.q_count, item.k_begin, item.k_count});
    }
  }
  BackwardLaunches result;
  result.gathered_rows = gathered_rows;
  add_launches(result.launches, diagonals, CudnnMask::kTopLeft, 0, result.diagonal_k);
  if (separate) {
    for (const std::vector<Rectangle>& layer : in_layers(rectangles)) {
      add_launches(result.launches, layer, CudnnMask::kNone, result.layers++, result.rectangle_k);
    }
  } else {
    // A launch adds to a dq that it has cleared, so every launch has one of its own.
    const std::size_t first = result.launches.size();
    add_launches(result.launches, rectangles, CudnnMask::kNone, 0, result.rectangle_k);
    for (std::size_t i = first; i < result.launches.size(); ++i) {
      result.launches[i].layer = result.layers++;
    }
  }

  std::vector<SumPart> q_parts;
  std::vector<SumPart> k_parts;
  for (const Launch& launch : result.launches) {
    for (const LaunchItem& item : launch.items) {
      q_parts.push_back({launch.layer, item.q_begin, item.q_begin, item.q_count});
      k_parts.push_back({launch.layer == 0 ? 0 : 1, item.k_begin, item.dk_begin, item.k_count});
    }
  }
  result.dq = make_sum_table(q_parts, result.layers, args.q.shape[0]);
  result.dkv = make_sum_table(k_parts, 2, gathered_rows);
  result.one_layer = rectangles.empty() || (diagonals.empty() && result.layers == 2);
  result.covers_keys = result.one_layer && result.diagonal_k + result.rectangle_k == gathered_rows;
  result.equal_length = rectangles.empty() ? equal_length_of(diagonals)
                                           : (diagonals.empty() ? equal_length_of(rectangles) : 0);
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
