#include "zigzag/attention.h"

#include <exception>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "attention_check.h"
#include "backend.h"
#include "comm/agree.h"
#include "comm/transport.h"
#include "lent_attention.h"
#include "schedule_tables.h"
#include "zigzag/error.h"

namespace zigzag {

namespace {

using std::int64_t;

/// Bytes of K and V of the whole pack that one stage gathers at most, where it has a choice. On a
/// GPU every stage costs launches that fill the chip less well: stages are for memory alone.
constexpr int64_t kCpuStageBytes = int64_t{256} << 20;
constexpr int64_t kCudaStageBytes = int64_t{8} << 30;

std::unique_ptr<Backend> make_backend(Device device, Kernels kernels, void* stream) {
  return device.type == DeviceType::kCpu ? make_cpu_backend(kernels)
                                         : make_cuda_backend(device, kernels, stream);
}

/// Runs `check`, compares its outcome with the other ranks' and returns it; every rank throws when
/// one of them refuses its arguments or they differ.
template <typename Check>
Problem agree_on(comm::Direction direction, const TensorView& q, const Plan& plan,
                 const Communicator& communicator, const AttentionOptions& options,
                 const Check& check) {
  try {
    Problem problem;
    std::string error;
    try {
      problem = check();
    } catch (const InvalidArgument& refusal) {
      error = refusal.what();
    } catch (const std::exception& failure) {
      communicator.abort(failure.what());
      throw;
    }
    comm::agree(communicator.transport(), describe(direction, q, plan, options, problem, error));
    return problem;
  } catch (const std::bad_alloc& failure) {
    // Not what ranks agree on: the others would wait for this one until their deadline.
    communicator.abort(failure.what());
    throw;
  }
}

/// Runs `work`; when it throws, the other ranks are told why before the exception goes on.
template <typename Work>
void or_abort(const Communicator& communicator, const Work& work) {
  try {
    work();
  } catch (const std::exception& failure) {
    communicator.abort(failure.what());
    throw;
  } catch (...) {
    communicator.abort("an exception of unknown type");
    throw;
  }
}

/// True when the ranks are threads of this process, so that one of them can compute for all.
bool lends(const Communicator& communicator, const Backend& backend) {
  return communicator.size() > 1 && backend.attends_all() && communicator.transport().lends();
}

/// Lends a rank's tensors to the first rank of its process, which computes for all; the others
/// wait. `compute` takes the CallTensors of every rank.
template <typename Compute>
void compute_for_all(const Communicator& communicator,
                     std::span<TensorView CallTensors::*const> names, const CallTensors& mine,
                     const Compute& compute) {
  std::vector<TensorView> views;
  for (TensorView CallTensors::*name : names) views.push_back(mine.*name);
  const std::unique_ptr<comm::Loan> loan =
      communicator.transport().lend(views, {.name = "gather of K and V"});
  if (communicator.rank() == 0) {
    // The others must know of a failure before the loan ends.
    or_abort(communicator, [&] {
      std::vector<CallTensors> all(static_cast<std::size_t>(communicator.size()));
      for (std::size_t rank = 0; rank < all.size(); ++rank) {
        const std::span<const TensorView> lent = loan->views(static_cast<int>(rank));
        for (std::size_t i = 0; i < names.size(); ++i) all[rank].*names[i] = lent[i];
      }
      compute(all);
    });
  }
  loan->end();
}

/// One call of forward or backward over KV-head stages: what both have in common.
class Schedule {
 public:
  Schedule(std::unique_ptr<Backend> backend, const TensorView& q, const TensorView& k,
           const TensorView& v, const Plan& plan, const Communicator& communicator,
           const AttentionOptions& options, const Problem& problem)
      : q_(q),
        k_(k),
        v_(v),
        plan_(plan),
        transport_(communicator.transport()),
        options_(options),
        problem_(problem),
        backend_(std::move(backend)),
        tables_(schedule_tables(plan, communicator.rank(), options.mask)),
        table_(tables_->exchange) {
    if (alone()) return;
    stages_ = static_cast<int>(problem.kv_heads / problem.kv_heads_per_stage);
    slots_ = backend_->overlaps() && stages_ > 1 ? 2 : 1;
    for (int slot = 0; slot < slots_; ++slot) {
      gathered_.push_back({gathered_buffer(q.dtype), gathered_buffer(q.dtype)});
    }
  }

  void forward(const TensorView& out, const TensorView& lse) {
    const JoinOnError guard(*this);
    const auto arguments = [&](int stage) {
      AttendArgs args;
      fill(args, stage);
      args.out = q_heads(out, stage);
      args.lse = q_heads(lse, stage);
      return args;
    };
    if (stages_ == 1 && attend_open(arguments(0))) return;
    gather(0);
    join_exchange();
    for (int stage = 0; stage < stages_; ++stage) {
      gather_next(stage);
      backend_->attend(arguments(stage));
      await_gather(stage + 1);
    }
  }

  void backward(const TensorView& dout, const TensorView& out, const TensorView& lse,
                const TensorView& dq, const TensorView& dk, const TensorView& dv) {
    std::vector<Pair> partials;
    for (int slot = 0; slot < slots_ && !alone(); ++slot) {
      partials.push_back({gathered_buffer(DType::kFloat32), gathered_buffer(DType::kFloat32)});
    }
    const auto arguments = [&](int stage) {
      AttendBackwardArgs args;
      fill(args, stage);
      args.dout = q_heads(dout, stage);
      args.out = q_heads(out, stage);
      args.lse = q_heads(lse, stage);
      args.dq = q_heads(dq, stage);
      // A rank alone has no partials: its sums are the gradients.
      const Pair* partial = alone() ? nullptr : &partials[static_cast<std::size_t>(stage % slots_)];
      args.dk = partial == nullptr ? dk : partial->k.view;
      args.dv = partial == nullptr ? dv : partial->v.view;
      return args;
    };
    const auto start_early = [&](int stage) {
      if (alone() || stage >= stages_) return;
      AttendBackwardArgs args = arguments(stage);
      args.k = kv_heads(k_, stage);
      args.v = kv_heads(v_, stage);
      backend_->attend_backward_early(args);
    };
    // What other ranks add to the gradients of this one's rows, where it is fetched while attention
    // goes on. One serves all stages: it is filled and read in the order of the exchange queue.
    Pair fetched;
    const JoinOnError guard(*this);
    gather(0);
    start_early(0);
    join_exchange();
    for (int stage = 0; stage < stages_; ++stage) {
      gather_next(stage);
      const AttendBackwardArgs args = arguments(stage);
      const comm::Step step{"reduction of dK and dV", stage, stages_};
      const TensorView sources[] = {args.dk, args.dv};
      const bool others = !alone() && transport_.reduces_in_parts(backend_->exchange_queue()) &&
                          backend_->attend_backward_others(args);
      if (others) {
        if (fetched.k.view.data == nullptr) {
          const int64_t rows = (transport_.size() - 1) * table_.local_tokens;
          // Only exchanges use it, and they do not wait for what attention's queue is at.
          const Queue queue = backend_->exchange_queue();
          fetched = {buffer_of(rows, DType::kFloat32, queue),
                     buffer_of(rows, DType::kFloat32, queue)};
        }
        backend_->order(backend_->compute_queue(), backend_->exchange_queue());
        const TensorView views[] = {fetched.k.view, fetched.v.view};
        transport_.fetch_partials(sources, views, table_, step, backend_->exchange_queue());
      }
      backend_->attend_backward(args);
      // Only a slot that no reduction reads can take the next stage's partials at once.
      const bool free_slot = stage + 1 < slots_;
      if (free_slot) start_early(stage + 1);
      await_gather(stage + 1);
      if (!free_slot) start_early(stage + 1);
      if (alone()) continue;
      backend_->order(backend_->compute_queue(), backend_->exchange_queue());
      const TensorView destinations[] = {kv_heads(dk, stage), kv_heads(dv, stage)};
      if (others) {
        const TensorView views[] = {fetched.k.view, fetched.v.view};
        transport_.add_up(sources, views, destinations, table_, backend_->exchange_queue());
      } else {
        transport_.reduce(sources, destinations, table_, step, backend_->exchange_queue());
      }
    }
    join_exchange();
  }

 private:
  struct Gathered {
    Buffer buffer;
    TensorView view;
  };
  struct Pair {
    Gathered k;
    Gathered v;
  };
  /// When an exception leaves its scope, makes attention's queue wait for all work given so far:
  /// memory is released in the order of that queue.
  class JoinOnError {
   public:
    explicit JoinOnError(Schedule& schedule) : schedule_(schedule) {}
    ~JoinOnError() {
      if (std::uncaught_exceptions() == exceptions_) return;
      try {
        schedule_.join_exchange();
      } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch): the device has failed
      }
    }
    JoinOnError(const JoinOnError&) = delete;
    JoinOnError& operator=(const JoinOnError&) = delete;

   private:
    Schedule& schedule_;
    int exceptions_ = std::uncaught_exceptions();
  };

  bool alone() const { return transport_.size() == 1; }

  Gathered buffer_of(int64_t rows, DType dtype, Queue queue) {
    Gathered result;
    result.view = TensorView::contiguous(
        nullptr, dtype, {rows, problem_.kv_heads_per_stage, problem_.head_dim}, q_.device);
    result.buffer = backend_->allocate(result.view.num_elements() * item_size(dtype), queue);
    result.view.data = result.buffer.memory.get();
    return result;
  }
  Gathered gathered_buffer(DType dtype) {
    return buffer_of(table_.gathered_tokens, dtype, backend_->compute_queue());
  }

  TensorView kv_heads(const TensorView& x, int stage) const {
    if (alone()) return x;
    return x.slice(1, stage * problem_.kv_heads_per_stage, problem_.kv_heads_per_stage);
  }

  TensorView q_heads(const TensorView& x, int stage) const {
    if (alone()) return x;
    const int64_t count = problem_.kv_heads_per_stage * (problem_.heads / problem_.kv_heads);
    return x.slice(1, stage * count, count);
  }

  /// The attention of the only stage, while its rows are fetched; false where this cannot be.
  bool attend_open(const AttendArgs& args) {
    if (alone() || !transport_.opens_gather() || !backend_->attends_open(args, k_, v_)) {
      return false;
    }
    const Queue queue = backend_->compute_queue();
    backend_->attend_open(
        args, transport_.open_gather(k_, v_, table_, {"gather of K and V", 0, stages_}, queue));
    transport_.close_gather(queue);
    return true;
  }

  /// Starts the gather of a stage once attention has left its slot.
  void gather(int stage) {
    if (alone() || stage >= stages_) return;
    backend_->order(backend_->compute_queue(), backend_->exchange_queue());
    const Pair& slot = gathered_[static_cast<std::size_t>(stage % slots_)];
    const TensorView sources[] = {kv_heads(k_, stage), kv_heads(v_, stage)};
    const TensorView destinations[] = {slot.k.view, slot.v.view};
    transport_.gather(sources, destinations, table_, {"gather of K and V", stage, stages_},
                      backend_->exchange_queue());
  }

  /// Makes attention that is given from here on wait for the exchanges given so far.
  void join_exchange() {
    if (!alone()) backend_->order(backend_->exchange_queue(), backend_->compute_queue());
  }

  /// Where two slots allow it, starts the next gather before this stage's attention.
  void gather_next(int stage) {
    if (slots_ == 2) gather(stage + 1);
  }

  /// Makes attention that is given from here on wait for the gather of a stage. Called before the
  /// reduction is given to the exchange queue, so that attention does not wait for that.
  void await_gather(int stage) {
    if (alone() || stage >= stages_) return;
    if (slots_ == 1) gather(stage);
    join_exchange();
  }

  void fill(AttendArgs& args, int stage) const {
    args.q = q_heads(q_, stage);
    if (alone()) {
      args.k = k_;
      args.v = v_;
    } else {
      args.k = gathered_[static_cast<std::size_t>(stage % slots_)].k.view;
      args.v = gathered_[static_cast<std::size_t>(stage % slots_)].v.view;
    }
    args.plan = &plan_;
    args.rank = transport_.rank();
    args.items = tables_->items;
    args.mask = options_.mask;
    args.scale = problem_.scale;
    args.softcap = options_.softcap;
    args.deterministic = options_.deterministic;
  }

  const TensorView& q_;
  const TensorView& k_;
  const TensorView& v_;
  const Plan& plan_;
  comm::Transport& transport_;
  const AttentionOptions& options_;
  const Problem& problem_;
  std::unique_ptr<Backend> backend_;
  std::shared_ptr<const ScheduleTables> tables_;
  const comm::ExchangeTable& table_;
  int stages_ = 1;
  int slots_ = 1;
  std::vector<Pair> gathered_;
};

}  // namespace

int64_t auto_kv_heads_per_stage(const Plan& plan, int64_t kv_heads, int64_t head_dim, DType dtype,
                                Device device) {
  // Every rank must choose alike, so the choice rests on what all of them know.
  const int64_t head_bytes = 2 * plan.total_tokens() * head_dim * item_size(dtype);
  const int64_t limit = device.type == DeviceType::kCpu ? kCpuStageBytes : kCudaStageBytes;
  int64_t best = 1;
  for (int64_t stage = 1; stage <= kv_heads; ++stage) {
    if (kv_heads % stage == 0 && head_bytes <= limit / stage) best = stage;
  }
  return best;
}

void forward(const TensorView& q, const TensorView& k, const TensorView& v, const Plan& plan,
             const Communicator& communicator, const AttentionOptions& options,
             const TensorView& out, const TensorView& lse) {
  const Problem problem = agree_on(comm::Direction::kForward, q, plan, communicator, options, [&] {
    return check_forward(q, k, v, plan, communicator, options, out, lse);
  });
  or_abort(communicator, [&] {
    std::unique_ptr<Backend> backend = make_backend(q.device, problem.kernels, options.stream);
    if (!lends(communicator, *backend)) {
      Schedule(std::move(backend), q, k, v, plan, communicator, options, problem).forward(out, lse);
      return;
    }
    constexpr TensorView CallTensors::*kNames[] = {
        &CallTensors::q, &CallTensors::k, &CallTensors::v, &CallTensors::out, &CallTensors::lse};
    compute_for_all(communicator, kNames, {q, k, v, out, lse, {}, {}, {}, {}},
                    [&](std::span<const CallTensors> ranks) {
                      forward_for_all(ranks, plan, options, problem, *backend);
                    });
  });
}

void backward(const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
              const TensorView& out, const TensorView& lse, const Plan& plan,
              const Communicator& communicator, const AttentionOptions& options,
              const TensorView& dq, const TensorView& dk, const TensorView& dv) {
  const Problem problem = agree_on(comm::Direction::kBackward, q, plan, communicator, options, [&] {
    return check_backward(dout, q, k, v, out, lse, plan, communicator, options, dq, dk, dv);
  });
  or_abort(communicator, [&] {
    std::unique_ptr<Backend> backend = make_backend(q.device, problem.kernels, options.stream);
    if (!lends(communicator, *backend)) {
      Schedule(std::move(backend), q, k, v, plan, communicator, options, problem)
          .backward(dout, out, lse, dq, dk, dv);
      return;
    }
    constexpr TensorView CallTensors::*kNames[] = {
        &CallTensors::q,   &CallTensors::k,   &CallTensors::v,
        &CallTensors::out, &CallTensors::lse, &CallTensors::dout,
        &CallTensors::dq,  &CallTensors::dk,  &CallTensors::dv};
    compute_for_all(communicator, kNames, {q, k, v, out, lse, dout, dq, dk, dv},
                    [&](std::span<const CallTensors> ranks) {
                      backward_for_all(ranks, plan, options, problem, *backend);
                    });
  });
}

}  // namespace zigzag
