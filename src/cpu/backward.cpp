#include "cpu/backward.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>

#include "cpu/page_pool.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"
#include "cpu/target.h"

namespace zigzag::cpu {
namespace {

// Float32 sums held at a time, unless one document and KV head needs more: so many times what the
// largest needs, and in any case the fewest, which a cache keeps until they are rounded.
constexpr std::int64_t kUnitsHeld = 64;
constexpr std::int64_t kFewestSumBytes = std::int64_t{4} << 20;
constexpr std::int64_t kMostSumBytes = std::int64_t{40} << 20;
// Rows that one task rounds.
constexpr std::int64_t kRoundRows = 512;

// Sums of a stretch of a document's keys, for one KV head: of one rank or, where no rank adds twice
// to a key, of all: then tasks add in rank order, and that is the sum of the ranks' sums.
struct Slot {
  std::int64_t document = 0;
  VisibleKeys keys;
  std::vector<VisibleKeys> seen;  // keys that tasks add to
};

// A task of some slot, for every KV head.
struct SlotPiece {
  RowGroup group;
  std::size_t slot = 0;
  double order = 0;  // pieces with more of it run before
};

// All slots and pieces of a pack.
class Slots {
 public:
  Slots(const Problem& problem, const std::vector<std::vector<TaskRows>>& items,
        const KernelSet& kernels, std::int64_t documents)
      : of_document_(static_cast<std::size_t>(documents)) {
    std::vector<std::vector<RowGroup>> pieces;  // of each rank
    pieces.reserve(items.size());
    for (const std::vector<TaskRows>& rank : items) {
      pieces.push_back(row_pieces(problem, rank, kernels.backward_lanes, kernels.panel_lanes));
    }
    const std::vector<double> shared = shared_documents(pieces, documents);
    for (const std::vector<RowGroup>& rank : pieces) add_rank(rank, shared, pieces.size() == 1);
    std::stable_sort(pieces_.begin(), pieces_.end(),
                     [](const SlotPiece& a, const SlotPiece& b) { return a.order > b.order; });
    for (SlotPiece& piece : pieces_) {
      piece.group.fresh = see(piece.group.keys, slots_[piece.slot].seen);
    }
  }

  const std::vector<Slot>& slots() const { return slots_; }
  const std::vector<SlotPiece>& pieces() const { return pieces_; }
  // In the order in which their sums are added.
  const std::vector<std::size_t>& of_document(std::int64_t document) const {
    return of_document_[static_cast<std::size_t>(document)];
  }

 private:
  // For each document to whose keys no rank adds twice, the cost of its heaviest piece; else -1.
  static std::vector<double> shared_documents(const std::vector<std::vector<RowGroup>>& pieces,
                                              std::int64_t documents) {
    std::vector<double> cost(static_cast<std::size_t>(documents), 0.0);
    for (const std::vector<RowGroup>& rank : pieces) {
      std::unordered_map<std::int64_t, std::vector<VisibleKeys>> seen;
      for (const RowGroup& group : rank) {
        double& most = cost[static_cast<std::size_t>(group.item->document)];
        const VisibleKeys fresh = see(group.keys, seen[group.item->document]);
        const bool twice = fresh.end - fresh.first != group.keys.end - group.keys.first;
        most = twice || most < 0 ? -1 : std::max(most, group.cost);
      }
    }
    return cost;
  }

  void add_rank(const std::vector<RowGroup>& rank, const std::vector<double>& shared, bool alone) {
    // Stretches of keys of this rank's own slots, so that a window's gap takes no memory.
    std::unordered_map<std::int64_t, std::vector<VisibleKeys>> own;
    for (const RowGroup& group : rank) see(group.keys, own[group.item->document]);
    for (const RowGroup& group : rank) {
      const std::int64_t document = group.item->document;
      const double most = shared[static_cast<std::size_t>(document)];
      const bool one_slot = alone || most >= 0;
      std::vector<std::size_t>& slots = of_document_[static_cast<std::size_t>(document)];
      std::size_t slot = slots_.size();
      if (one_slot) {
        if (!slots.empty()) slot = slots.front();
      } else {
        for (std::size_t i = first_of_rank(slots); i < slots.size(); ++i) {
          const VisibleKeys& keys = slots_[slots[i]].keys;
          if (keys.first <= group.keys.first && group.keys.end <= keys.end) slot = slots[i];
        }
      }
      if (slot == slots_.size()) {
        Slot added{document, group.keys, {}};
        if (!one_slot) {
          for (const VisibleKeys& keys : own.at(document)) {
            if (keys.first <= group.keys.first && group.keys.end <= keys.end) added.keys = keys;
          }
        }
        slots_.push_back(std::move(added));
        slots.push_back(slot);
      }
      VisibleKeys& keys = slots_[slot].keys;
      keys = {std::min(keys.first, group.keys.first), std::max(keys.end, group.keys.end)};
      // Pieces of all ranks that share a slot stay in rank order.
      pieces_.push_back({group, slot, !alone && one_slot ? most : group.cost});
    }
    rank_slots_ = slots_.size();
  }

  // Where the slots of the rank that is being added begin in a document's list.
  std::size_t first_of_rank(const std::vector<std::size_t>& slots) const {
    return static_cast<std::size_t>(std::lower_bound(slots.begin(), slots.end(), rank_slots_) -
                                    slots.begin());
  }

  std::vector<Slot> slots_;
  std::vector<SlotPiece> pieces_;
  std::vector<std::vector<std::size_t>> of_document_;
  std::size_t rank_slots_ = 0;  // slots of the ranks added so far
};

// The sums of some documents and KV heads that are held together.
struct Wave {
  struct Unit {
    std::int64_t document;
    std::int64_t head;
  };
  std::int64_t floats = 0;
  std::vector<Unit> units;
  std::vector<RowGroup> groups;
};

std::vector<Wave> waves_of(const Problem& problem, const Slots& slots) {
  const auto floats_of = [&](std::int64_t document) {
    std::int64_t floats = 0;
    for (const std::size_t slot : slots.of_document(document)) {
      const VisibleKeys& keys = slots.slots()[slot].keys;
      floats += 2 * (keys.end - keys.first) * problem.head_dim;
    }
    return floats;
  };
  std::int64_t largest = 0;
  for (const SlotPiece& piece : slots.pieces()) {
    largest = std::max(largest, floats_of(piece.group.item->document));
  }
  constexpr std::int64_t kFloat = sizeof(float);
  const std::int64_t most =
      std::clamp(kUnitsHeld * largest, kFewestSumBytes / kFloat, kMostSumBytes / kFloat);
  std::vector<Wave> waves;
  std::unordered_map<std::int64_t, std::size_t> wave_of_unit;
  for (const SlotPiece& piece : slots.pieces()) {
    const std::int64_t document = piece.group.item->document;
    const std::int64_t floats = floats_of(document);
    for (std::int64_t head = 0; head < problem.kv_heads; ++head) {
      const auto [entry, is_new] =
          wave_of_unit.try_emplace(document * problem.kv_heads + head, waves.size());
      if (is_new) {
        if (waves.empty() || waves.back().floats + floats > most) {
          waves.emplace_back();
        }
        entry->second = waves.size() - 1;
        waves.back().floats += floats;
        waves.back().units.push_back({document, head});
      }
      RowGroup& group = waves[entry->second].groups.emplace_back(piece.group);
      group.kv_head = head;
      group.unit = static_cast<std::int64_t>(piece.slot) * problem.kv_heads + head;
    }
  }
  return waves;
}

// Clears a slot's sums of keys that no task adds to.
void set_zero(const GradientSums& sums, const Slot& slot) {
  std::int64_t from = slot.keys.first;
  const auto clear = [&](std::int64_t end) {
    const std::int64_t first = from - slot.keys.first;
    if (from >= end) return;
    std::fill_n(sums.dk + first * sums.stride_k, (end - from) * sums.stride_k, 0.0f);
    std::fill_n(sums.dv + first * sums.stride_v, (end - from) * sums.stride_v, 0.0f);
  };
  for (const VisibleKeys& seen : slot.seen) {
    clear(seen.first);
    from = seen.end;
  }
  clear(slot.keys.end);
}

// One slot's sums of dK or dV.
struct Term {
  VisibleKeys keys;
  const float* sums;
};

// Writes the rows of a document's keys as the sums of the terms.
void round_keys(const Problem& problem, std::int64_t first_row, const VisibleKeys& keys,
                std::int64_t head, const std::vector<Term>& terms, const TensorRows& to) {
  RowCursor rows(to);
  std::vector<const float*> here;
  RowSums sums;
  sums.term_stride = sums.columns = problem.head_dim;
  sums.dtype = to.dtype;
  for (std::int64_t begin = keys.first; begin < keys.end;) {
    sums.to = rows.at(first_row + begin, head);
    sums.to_stride = rows.piece().row_stride;
    // As far as the same terms go, in rows of one rank.
    std::int64_t stop = std::min(keys.end, rows.piece().end - first_row);
    here.clear();
    for (const Term& term : terms) {
      if (term.keys.first > begin) stop = std::min(stop, term.keys.first);
      if (term.keys.first > begin || term.keys.end <= begin) continue;
      stop = std::min(stop, term.keys.end);
      here.push_back(term.sums + (begin - term.keys.first) * problem.head_dim);
    }
    sums.terms = here;
    sums.rows = stop - begin;
    sum_rows(selected_target(), sums);
    begin = stop;
  }
}

}  // namespace

void run_backward(const Problem& problem, std::vector<RowGroup>& groups,
                  const std::unordered_map<std::int64_t, GradientSums>& sums) {
  const KernelSet& kernels = kernels_of(selected_target(), problem.q.dtype);
  std::unordered_map<std::int64_t, std::int64_t> last;
  for (std::int64_t i = 0; i < std::ssize(groups); ++i) {
    const auto [entry, is_new] = last.try_emplace(groups[i].unit, i);
    groups[i].previous = is_new ? -1 : entry->second;
    entry->second = i;
  }
  const std::vector<std::int64_t> begins = batches(groups);
  Turns turns(groups);
  const auto run = [&](std::int64_t i) {
    // Whatever happens, the tasks that wait for this one go on.
    struct Release {
      Turns& turns;
      std::int64_t task;
      ~Release() { turns.done(task, std::numeric_limits<std::int64_t>::max()); }
    } release{turns, i};
    std::byte* scratch =
        thread_scratch(kernels.backward_scratch(problem.head_dim, groups[i].width));
    const BackwardTask task{&groups[i], i, sums.at(groups[i].unit), &turns};
    kernels.backward(problem, task, scratch);
  };
  // Threads claim batches in order and run them in order: so a task may wait for an earlier one.
  parallel_for(std::ssize(begins) - 1, [&](std::int64_t batch) {
    for (std::int64_t i = begins[batch]; i < begins[batch + 1]; ++i) run(i);
  });
}

void backward_in_waves(const Problem& problem, const std::vector<DocumentRows>& documents,
                       const std::vector<std::vector<TaskRows>>& items, const TensorRows& dk,
                       const TensorRows& dv) {
  const Slots slots(problem, items, kernels_of(selected_target(), problem.q.dtype),
                    std::ssize(documents));
  const std::int64_t head_dim = problem.head_dim;
  std::vector<Wave> waves = waves_of(problem, slots);
  // Documents without tasks have gradients too.
  Wave& rest = waves.emplace_back();
  for (std::int64_t document = 0; document < std::ssize(documents); ++document) {
    if (!slots.of_document(document).empty()) continue;
    for (std::int64_t head = 0; head < problem.kv_heads; ++head) {
      rest.units.push_back({document, head});
    }
  }
  std::int64_t most = 0;
  for (const Wave& wave : waves) most = std::max(most, wave.floats);
  const std::shared_ptr<void> memory = pooled_pages(most * std::int64_t{sizeof(float)});
  for (Wave& wave : waves) {
    std::unordered_map<std::int64_t, GradientSums> sums;
    auto* at = static_cast<float*>(memory.get());
    struct Job {
      Wave::Unit unit;
      std::int64_t begin;
    };
    std::vector<Job> jobs;
    for (const Wave::Unit& unit : wave.units) {
      const DocumentRows& rows = documents[static_cast<std::size_t>(unit.document)];
      for (const std::size_t index : slots.of_document(unit.document)) {
        const Slot& slot = slots.slots()[index];
        const std::int64_t count = (slot.keys.end - slot.keys.first) * head_dim;
        const GradientSums sum{at, at + count, head_dim, head_dim,
                               rows.first_row + slot.keys.first};
        sums[static_cast<std::int64_t>(index) * problem.kv_heads + unit.head] = sum;
        set_zero(sum, slot);
        at += 2 * count;
      }
      for (std::int64_t key = rows.keys.first; key < rows.keys.end; key += kRoundRows) {
        jobs.push_back({unit, key});
      }
    }
    run_backward(problem, wave.groups, sums);
    parallel_for(std::ssize(jobs), [&](std::int64_t i) {
      const auto [unit, begin] = jobs[static_cast<std::size_t>(i)];
      const DocumentRows& rows = documents[static_cast<std::size_t>(unit.document)];
      const VisibleKeys keys{begin, std::min(begin + kRoundRows, rows.keys.end)};
      std::vector<Term> dk_terms;
      std::vector<Term> dv_terms;
      for (const std::size_t index : slots.of_document(unit.document)) {
        const GradientSums& sum =
            sums.at(static_cast<std::int64_t>(index) * problem.kv_heads + unit.head);
        dk_terms.push_back({slots.slots()[index].keys, sum.dk});
        dv_terms.push_back({slots.slots()[index].keys, sum.dv});
      }
      round_keys(problem, rows.first_row, keys, unit.head, dk_terms, dk);
      round_keys(problem, rows.first_row, keys, unit.head, dv_terms, dv);
    });
  }
}

}  // namespace zigzag::cpu
