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

std::vector<Launch> make_launches(const std::vector<Rectangle>& items, CudnnMask mask,
                                  int64_t& dq_rows, int64_t& dk_rows) {
  std::vector<Launch> launches;
  for (const std::vector<Rectangle>& part : split_by_length(items)) {
    Launch launch;
    launch.mask = mask;
    for (const Rectangle& item : part) {
      launch.items.push_back(
          {item.q_begin, item.q_count, item.k_begin, item.k_count, dq_rows, dk_rows});
      launch.max_q = std::max(launch.max_q, item.q_count);
      launch.max_k = std::max(launch.max_k, item.k_count);
      dq_rows += item.q_count;
      dk_rows += item.k_count;
    }
    launches.push_back(std::move(launch));
  }
  return launches;
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
  int64_t unused_q = 0;
  int64_t unused_k = 0;
  result.launches = make_launches(items, mask, unused_q, unused_k);
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

/// Parts of a sum whose destination rows overlap get sources of their own, in order.
class SlotParts {
 public:
  void add(int64_t begin, int64_t source_row, int64_t rows) {
    std::size_t slot = 0;
    while (slot < ends_.size() && overlaps(slot, begin, rows)) ++slot;
    if (slot == ends_.size()) ends_.emplace_back();
    ends_[slot][begin] = begin + rows;
    parts_.push_back({static_cast<int64_t>(slot) + 1, begin, source_row, rows});
  }
  int slots() const { return static_cast<int>(ends_.size()); }
  const std::vector<SumPart>& parts() const { return parts_; }

 private:
  bool overlaps(std::size_t slot, int64_t begin, int64_t rows) const {
    const auto& taken = ends_[slot];
    auto after = taken.lower_bound(begin);
    if (after != taken.end() && after->first < begin + rows) return true;
    return after != taken.begin() && std::prev(after)->second > begin;
  }
  std::vector<std::map<int64_t, int64_t>> ends_;
  std::vector<SumPart> parts_;
};

BackwardLaunches make_backward(const AttendArgs& args, int64_t gathered_rows) {
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
  result.rectangles =
      make_launches(rectangles, CudnnMask::kNone, result.rectangle_q, result.rectangle_k);
  result.diagonals =
      make_launches(diagonals, CudnnMask::kTopLeft, result.diagonal_q, result.diagonal_k);

  SlotParts q_slots;
  SlotParts k_slots;
  std::vector<SumPart> q_parts;
  std::vector<SumPart> k_parts;
  for (const Launch& launch : result.diagonals) {
    for (const LaunchItem& item : launch.items) {
      q_parts.push_back({0, item.q_begin, item.dq_begin, item.q_count});
      k_parts.push_back({0, item.k_begin, item.dk_begin, item.k_count});
    }
  }
  for (const Launch& launch : result.rectangles) {
    for (const LaunchItem& item : launch.items) {
      q_slots.add(item.q_begin, item.dq_begin, item.q_count);
      k_slots.add(item.k_begin, item.dk_begin, item.k_count);
    }
  }
  q_parts.insert(q_parts.end(), q_slots.parts().begin(), q_slots.parts().end());
  k_parts.insert(k_parts.end(), k_slots.parts().begin(), k_slots.parts().end());
  result.slots = std::max(q_slots.slots(), k_slots.slots());
  result.dq = make_sum_table(q_parts, 1 + result.slots, args.q.shape[0]);
  result.dkv = make_sum_table(k_parts, 1 + result.slots, gathered_rows);
  const bool one_kind = result.rectangles.empty() || result.diagonals.empty();
  result.covers_keys =
      one_kind && result.rectangle_k + result.diagonal_k == gathered_rows && result.slots <= 1;
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

std::shared_ptr<const BackwardLaunches> backward_launches(const AttendArgs& args,
                                                          int64_t gathered_rows) {
  static auto* recent = new Recent<TableKey, BackwardLaunches>(kKeptPacks);
  return recent->get(pack_key(args), [&] { return make_backward(args, gathered_rows); });
}

}  // namespace zigzag::cuda
