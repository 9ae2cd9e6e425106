#include "lent_attention.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "comm/sum.h"
#include "cpu/parallel.h"
#include "schedule_tables.h"

namespace zigzag {

namespace {

using std::int64_t;

/// Bytes of partials held at a time, unless one KV head needs more: they stay in a shared cache
/// until they are summed.
constexpr int64_t kPartialBytes = int64_t{32} << 20;
/// Rows of a shard that one task sums.
constexpr int64_t kSumRows = 512;

using Tables = std::vector<std::shared_ptr<const ScheduleTables>>;

Tables tables_of(const Plan& plan, const Mask& mask) {
  Tables tables;
  for (int64_t rank = 0; rank < plan.world_size(); ++rank) {
    tables.push_back(schedule_tables(plan, rank, mask));
  }
  return tables;
}

/// Where the rows of K or V that a rank gathers stand in the shards, in the gathered order.
std::vector<LentRows> lent_rows(const comm::ExchangeTable& table,
                                std::span<const TensorView> shards) {
  std::vector<LentRows> rows;
  for (std::size_t rank = 0; rank < shards.size(); ++rank) {
    const TensorView& x = shards[rank];
    const int64_t item = item_size(x.dtype);
    for (const Segment& s : table.receives[rank]) {
      rows.push_back({s.destination_row, s.destination_row + s.rows,
                      static_cast<const std::byte*>(x.data) + s.source_row * x.strides[0] * item,
                      x.strides[0] * item, x.strides[1] * item});
    }
  }
  std::sort(rows.begin(), rows.end(),
            [](const LentRows& a, const LentRows& b) { return a.begin < b.begin; });
  return rows;
}

/// Some KV heads of a call and the query heads that read them.
struct Heads {
  int64_t first;
  int64_t count;
  int64_t group;  // query heads of a KV head
  TensorView kv(const TensorView& x) const { return x.slice(1, first, count); }
  TensorView q(const TensorView& x) const { return x.slice(1, first * group, count * group); }
};

/// K or V of all ranks, of some heads.
std::vector<TensorView> shards(std::span<const CallTensors> ranks, TensorView CallTensors::*which,
                               const Heads& heads) {
  std::vector<TensorView> views;
  views.reserve(ranks.size());
  for (const CallTensors& rank : ranks) views.push_back(heads.kv(rank.*which));
  return views;
}

/// What forward and backward of all ranks have in common: memory that the arguments point into.
class Calls {
 public:
  Calls(std::span<const CallTensors> ranks, const Plan& plan, const AttentionOptions& options,
        const Problem& problem)
      : ranks_(ranks),
        plan_(plan),
        options_(options),
        problem_(problem),
        tables_(tables_of(plan, options.mask)) {}

  const Tables& tables() const { return tables_; }

  Heads heads(int64_t first, int64_t count) const {
    return {first, count, problem_.heads / problem_.kv_heads};
  }

  std::vector<int64_t> gathered_shape(std::size_t rank, const Heads& heads) const {
    return {tables_[rank]->exchange.gathered_tokens, heads.count, problem_.head_dim};
  }

  /// The arguments of every rank, valid until the next call.
  template <typename Args>
  std::vector<Args> arguments(const Heads& heads) {
    const std::vector<TensorView> k = shards(ranks_, &CallTensors::k, heads);
    const std::vector<TensorView> v = shards(ranks_, &CallTensors::v, heads);
    rows_.clear();
    rows_.reserve(2 * ranks_.size());
    std::vector<Args> all(ranks_.size());
    for (std::size_t r = 0; r < ranks_.size(); ++r) {
      const CallTensors& tensors = ranks_[r];
      Args& args = all[r];
      args.q = heads.q(tensors.q);
      args.k = args.v = TensorView::contiguous(nullptr, tensors.k.dtype, gathered_shape(r, heads),
                                               tensors.k.device);
      args.lent_k = rows_.emplace_back(lent_rows(tables_[r]->exchange, k));
      args.lent_v = rows_.emplace_back(lent_rows(tables_[r]->exchange, v));
      args.out = heads.q(tensors.out);
      args.lse = heads.q(tensors.lse);
      args.plan = &plan_;
      args.rank = static_cast<int64_t>(r);
      args.items = tables_[r]->items;
      args.mask = options_.mask;
      args.scale = problem_.scale;
      args.softcap = options_.softcap;
      args.deterministic = options_.deterministic;
    }
    return all;
  }

 private:
  std::span<const CallTensors> ranks_;
  const Plan& plan_;
  const AttentionOptions& options_;
  const Problem& problem_;
  Tables tables_;
  std::vector<std::vector<LentRows>> rows_;
};

/// Adds the ranks' partials of some heads, one head after another, to the ranks' gradients.
void sum_partials(const Tables& tables, std::span<const TensorView> partials,
                  std::span<const TensorView> gradients) {
  struct Job {
    std::size_t rank;
    int64_t head;
    int64_t begin;
  };
  std::vector<Job> jobs;
  for (int64_t head = 0; head < gradients[0].shape[1]; ++head) {
    for (std::size_t rank = 0; rank < gradients.size(); ++rank) {
      for (int64_t row = 0; row < gradients[rank].shape[0]; row += kSumRows) {
        jobs.push_back({rank, head, row});
      }
    }
  }
  cpu::parallel_for(std::ssize(jobs), [&](int64_t i) {
    const Job& job = jobs[static_cast<std::size_t>(i)];
    const TensorView& gradient = gradients[job.rank];
    std::vector<comm::Contribution> contributions;
    for (std::size_t peer = 0; peer < partials.size(); ++peer) {
      contributions.push_back(
          {tables[job.rank]->exchange.sends[peer],
           partials[peer].as<const float>() + job.head * partials[peer].strides[1]});
    }
    comm::sum_rows(gradient.slice(1, job.head, 1), job.begin,
                   std::min(job.begin + kSumRows, gradient.shape[0]), contributions);
  });
}

}  // namespace

void forward_for_all(std::span<const CallTensors> ranks, const Plan& plan,
                     const AttentionOptions& options, const Problem& problem, Backend& backend) {
  Calls calls(ranks, plan, options, problem);
  backend.attend_for_all(calls.arguments<AttendArgs>(calls.heads(0, problem.kv_heads)));
}

void backward_for_all(std::span<const CallTensors> ranks, const Plan& plan,
                      const AttentionOptions& options, const Problem& problem, Backend& backend) {
  Calls calls(ranks, plan, options, problem);
  int64_t gathered = 0;
  for (const auto& tables : calls.tables()) gathered += tables->exchange.gathered_tokens;
  const int64_t head_bytes = 2 * gathered * problem.head_dim * static_cast<int64_t>(sizeof(float));
  const int64_t most = std::clamp<int64_t>(kPartialBytes / std::max<int64_t>(head_bytes, 1), 1,
                                           problem.kv_heads_per_stage);
  // Waves of about equal size.
  const int64_t waves = (problem.kv_heads + most - 1) / most;
  for (int64_t wave = 0; wave < waves; ++wave) {
    const int64_t first = problem.kv_heads * wave / waves;
    const Heads heads = calls.heads(first, problem.kv_heads * (wave + 1) / waves - first);
    std::vector<AttendBackwardArgs> all = calls.arguments<AttendBackwardArgs>(heads);
    std::vector<Buffer> memory;
    std::vector<TensorView> partials[2];
    std::vector<TensorView> gradients[2];
    for (std::size_t r = 0; r < ranks.size(); ++r) {
      AttendBackwardArgs& args = all[r];
      args.dout = heads.q(ranks[r].dout);
      args.dq = heads.q(ranks[r].dq);
      for (const int which : {0, 1}) {
        TensorView x = TensorView::contiguous(nullptr, DType::kFloat32,
                                              calls.gathered_shape(r, heads), ranks[r].dk.device);
        // A head's rows end to end: the sums that one task adds to stay in few cache sets.
        x.strides = {x.shape[2], x.shape[0] * x.shape[2], 1};
        memory.push_back(backend.allocate(x.num_elements() * item_size(x.dtype)));
        x.data = memory.back().memory.get();
        partials[which].push_back(x);
        gradients[which].push_back(heads.kv(which == 0 ? ranks[r].dk : ranks[r].dv));
      }
      args.dk = partials[0].back();
      args.dv = partials[1].back();
    }
    backend.attend_backward_for_all(all);
    for (const int which : {0, 1}) sum_partials(calls.tables(), partials[which], gradients[which]);
  }
}

}  // namespace zigzag
