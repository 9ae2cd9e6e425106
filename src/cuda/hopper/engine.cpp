#include "cuda/hopper/engine.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/hopper/params.h"
#include "cuda/hopper/tensor_map.h"
#include "cuda/hopper/work.h"
#include "cuda/launch_lists.h"
#include "cuda/recent.h"
#include "cuda/sum_rows.h"
#include "cuda/timeline.h"

namespace zigzag::cuda::hopper {
namespace {

using std::int64_t;

constexpr double kLog2E = 1.4426950408889634;

enum TableKind : std::uint32_t { kForwardTables = 60, kBackwardTables, kSplitSums };

/// Rows and heads start at multiples of 16 bytes, and none stands for several.
bool aligned(const TensorView& view) {
  const int64_t elements = 16 / item_size(view.dtype);
  const auto fits = [&](int64_t stride) { return stride > 0 && stride % elements == 0; };
  return reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 && view.strides[2] == 1 &&
         fits(view.strides[0]) && fits(view.strides[1]);
}

/// What one device can do, asked once.
struct Abilities {
  int processors = 0;
  std::string why_not;
};

#ifdef ZIGZAG_SM_90A
constexpr bool kBuilt = true;
#else
constexpr bool kBuilt = false;
#endif

Abilities ask_abilities(int device) {
  Abilities one;
  int major = 0;
  int minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&one.processors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  if (major != 9 || minor != 0) {
    one.why_not = "the tensor-core kernels are for compute capability 9.0, not " +
                  std::to_string(major) + "." + std::to_string(minor);
  } else if (!kBuilt) {
    one.why_not = "the library was built without architecture 90a (ZIGZAG_CUDA_ARCHITECTURES)";
  } else if (!has_tensor_maps()) {
    one.why_not = "the driver has no tensor maps";
  }
  return one;
}

const Abilities& abilities(int device) {
  static std::mutex mutex;
  static auto* known = new std::map<int, Abilities>();
  const std::lock_guard lock(mutex);
  const auto found = known->find(device);
  if (found != known->end()) return found->second;
  return known->emplace(device, ask_abilities(device)).first->second;
}

/// Softcaps between which tanh and its slope keep float32's digits (common.cuh, backward.cuh).
constexpr double kLeastSoftcap = 0.01;
constexpr double kMostSoftcap = 1000;

bool fits(const AttendArgs& args, std::string& why) {
  const int64_t head_dim = args.q.shape[2];
  if (const std::string& missing = abilities(args.q.device.index).why_not; !missing.empty()) {
    why = missing;
  } else if (args.q.dtype == DType::kFloat32) {
    why = "the tensor cores take no float32";
  } else if (args.softcap != 0 && (args.softcap < kLeastSoftcap || args.softcap > kMostSoftcap)) {
    why = "the tensor-core kernels take softcaps from 0.01 to 1000";
  } else if (args.scale <= 0) {
    why = "the tensor-core kernels want a positive scale";
  } else if (head_dim % 8 != 0 || head_dim > 128) {
    why = "the tensor-core kernels want a head_dim that is a multiple of 8 up to 128";
  } else if (!aligned(args.q) || !aligned(args.k) || !aligned(args.v) || !aligned(args.out)) {
    why = "the tensor-core kernels want rows and heads of their own at multiples of 16 bytes";
  } else if (args.lse.strides[1] != 1) {
    why = "the tensor-core kernels want the heads of lse side by side";
  } else if (args.k.shape[0] == 0) {
    why = "there are no keys";
  } else {
    return true;
  }
  return false;
}

bool fits_backward(const AttendBackwardArgs& args, std::string& why) {
  if (args.deterministic) {
    why = "sums of dq are made in no fixed order";
  } else if (!aligned(args.dout) || !aligned(args.dq)) {
    why = "the tensor-core kernels want rows and heads of their own at multiples of 16 bytes";
  } else {
    return fits(args, why);
  }
  return false;
}

Rows rows_of(const TensorView& view) { return {view.data, view.strides[0], view.strides[1]}; }

/// A pack's tables in one run of bytes.
struct ForwardPack {
  ForwardWork work;  // without its units and runs, which are in the bytes
  FetchWork fetch;
  std::vector<std::byte> bytes;
  std::size_t units_at = 0, runs_at = 0, pieces_at = 0, wanted_at = 0;  // spans stand first
  int64_t units = 0;
};

struct BackwardPack {
  BackwardWork work;
  std::vector<std::byte> bytes;
  std::size_t tile_span_at = 0, early_at = 0, others_at = 0, rest_at = 0;  // spans stand first
};

TableKey table_key(const AttendArgs& args, bool own_rows, TableKind kind) {
  TableKey key = pack_key(args);
  key.kind = kind;
  for (const int64_t value :
       {args.q.shape[1], args.k.shape[1], int64_t{width_of(args.q.shape[2])},
        int64_t{own_rows ? 1 : 0}, int64_t{abilities(args.q.device.index).processors}}) {
    key.detail = mix(key.detail, static_cast<std::uint64_t>(value));
  }
  return key;
}

std::shared_ptr<const BackwardPack> pack_of(const AttendArgs& args, bool own_rows) {
  static auto* recent = new Recent<TableKey, BackwardPack>(256);
  return recent->get(table_key(args, own_rows, kBackwardTables), [&] {
    BackwardPack pack;
    pack.work = make_backward_work(args, own_rows, abilities(args.q.device.index).processors);
    append_bytes(pack.bytes, pack.work.spans.spans);
    pack.tile_span_at = append_bytes(pack.bytes, pack.work.tile_span);
    pack.early_at = append_bytes(pack.bytes, pack.work.early);
    pack.others_at = append_bytes(pack.bytes, pack.work.others);
    pack.rest_at = append_bytes(pack.bytes, pack.work.rest);
    return pack;
  });
}

/// Calls `body` with the element type and head width of the call, and whether it has a softcap.
template <typename Body>
void dispatch(DType dtype, int width, bool softcap, const Body& body) {
  const auto with_width = [&]<typename T, int kWidth>() {
    if (softcap) return body.template operator()<T, kWidth, true>();
    body.template operator()<T, kWidth, false>();
  };
  const auto with_type = [&]<typename T>() {
    if (width == 64) return with_width.template operator()<T, 64>();
    with_width.template operator()<T, 128>();
  };
  if (dtype == DType::kFloat16) return with_type.template operator()<__half>();
  with_type.template operator()<__nv_bfloat16>();
}

/// What makes weights of scores, in either pass.
template <typename Params>
void set_scores(Params& params, const AttendArgs& args) {
  const bool capped = args.softcap != 0;
  params.scale_log2 = static_cast<float>((capped ? args.softcap : args.scale) * kLog2E);
  if constexpr (std::is_same_v<Params, BackwardParams>) {
    params.one_by_scale_log2 = 1 / params.scale_log2;
  }
  params.cap_scale = capped ? static_cast<float>(args.scale / args.softcap) : 0.0f;
  const Reach reach = reach_of(args.mask);
  params.left = reach.left;
  params.right = reach.right;
}

TimelineScope span_of(const AttendArgs& args, std::string_view name, void* stream) {
  return {name, static_cast<int>(args.rank), args.q.device.index, Lane::kAttention, stream};
}

/// `table`: the bytes of `pack` on the device.
FetchParams fetch_params(const AttendArgs& args, const OpenGather& open, const ForwardPack& pack,
                         const std::byte* table, int* counters) {
  FetchParams params{};
  params.pieces = reinterpret_cast<const FetchPiece*>(table + pack.pieces_at);
  params.piece_count = static_cast<int>(pack.fetch.pieces.size());
  params.row_bytes = static_cast<int>(args.k.row_bytes());
  params.rows = static_cast<int>(pack.fetch.rows);
  params.wanted = reinterpret_cast<const std::int32_t*>(table + pack.wanted_at);
  params.next_piece = counters + 1;
  params.arrived_rows = counters + 2;
  params.arrived = counters + 3;
  for (std::size_t r = 0; r < open.k.size(); ++r) {
    params.k[r] = static_cast<const char*>(open.k[r]);
    params.v[r] = static_cast<const char*>(open.v[r]);
  }
  params.gathered_k = args.k.as<char>();
  params.gathered_v = args.v.as<char>();
  return params;
}

/// KV heads that are worked on side by side: as many as have K and V that stay in the L2 cache.
int64_t section_of(const AttendArgs& args) {
  constexpr int64_t kCacheBytes = int64_t{32} << 20;
  const int64_t kv_heads = args.k.shape[1];
  const int64_t bytes = 2 * args.k.shape[0] * args.k.shape[2] * item_size(args.k.dtype);
  int64_t best = 1;
  for (int64_t count = 1; count <= kv_heads; ++count) {
    if (kv_heads % count == 0 && count * bytes <= kCacheBytes) best = count;
  }
  return best;
}

}  // namespace

bool fetches(const AttendArgs& args, const TensorView& own_k, const TensorView& own_v) {
  std::string why;
  return args.plan->world_size() <= kFetchRanks && args.k.row_bytes() <= kFetchBytes &&
         aligned(own_k) && aligned(own_v) && fits(args, why);
}

bool forward(const AttendArgs& args, const OpenGather* open, void* stream_pointer,
             std::string& why) {
  if (!fits(args, why)) return false;
  static auto* recent = new Recent<TableKey, ForwardPack>(256);
  TableKey key = table_key(args, open != nullptr, kForwardTables);
  if (open != nullptr) {
    key.detail = mix(key.detail, static_cast<std::uint64_t>(args.k.row_bytes()));
  }
  const auto pack = recent->get(key, [&] {
    ForwardPack fresh;
    fresh.work = make_forward_work(args, open != nullptr);
    append_bytes(fresh.bytes, fresh.work.spans.spans);
    fresh.units_at = append_bytes(fresh.bytes, fresh.work.units);
    fresh.runs_at = append_bytes(fresh.bytes, fresh.work.runs);
    fresh.units = std::ssize(fresh.work.units);
    if (open != nullptr) {
      fresh.fetch = make_fetch_work(args, fresh.work.spans, open->receives, args.k.row_bytes());
      fresh.pieces_at = append_bytes(fresh.bytes, fresh.fetch.pieces);
      fresh.wanted_at = append_bytes(fresh.bytes, fresh.fetch.wanted);
    }
    fresh.work.units = {};
    fresh.work.runs = {};
    return fresh;
  });
  const cudaStream_t stream = as_stream(stream_pointer);
  DeviceState& device = DeviceState::get(args.q.device.index);
  DeviceGuard guard(args.q.device.index);
  const TableUse table(device.table(key, [&] { return pack->bytes; }), stream);
  // The next tile, the next piece, all rows that have arrived, and those of each block of keys.
  const int64_t counter_bytes =
      (3 + std::ssize(pack->fetch.wanted)) * static_cast<int64_t>(sizeof(int));
  const Scratch counters(device, counter_bytes, stream);
  check(cudaMemsetAsync(counters.data(), 0, static_cast<std::size_t>(counter_bytes), stream),
        "cudaMemsetAsync");

  const int64_t heads = args.q.shape[1];
  const int64_t group = heads / args.k.shape[1];
  const int64_t tile_heads = pack->work.tile_heads;
  const int64_t tiles = pack->units * (heads / tile_heads);
  if (tiles > std::numeric_limits<int>::max() / 2) {
    throw DeviceError("the attention has too many tiles for one launch");
  }
  ForwardParams params{};
  params.q = make_tensor_map_of_heads(args.q, pack->work.tile_heads, pack->work.tile_tokens());
  params.k = make_tensor_map(args.k, kKeyTile);
  params.v = make_tensor_map(args.v, kKeyTile);
  params.spans = table.as<Span>();
  params.units = reinterpret_cast<const ForwardUnit*>(table.as<std::byte>() + pack->units_at);
  params.runs = reinterpret_cast<const KeyRun*>(table.as<std::byte>() + pack->runs_at);
  params.unit_count = static_cast<int>(pack->units);
  params.tiles = static_cast<int>(tiles);
  params.section = static_cast<int>(section_of(args) * (group / tile_heads));
  params.tile_tokens = pack->work.tile_tokens();
  params.tile_heads = static_cast<int>(tile_heads);
  params.by_tile_heads = pack->work.by_tile_heads();
  params.next_tile = counters.as<int>();
  if (open != nullptr) {
    params.own_k = make_tensor_map(open->own_k, kKeyTile);
    params.own_v = make_tensor_map(open->own_v, kKeyTile);
    params.fetch = fetch_params(args, *open, *pack, table.as<std::byte>(), counters.as<int>());
  }
  params.out = rows_of(args.out);
  params.lse = args.lse.as<float>();
  params.lse_row = args.lse.strides[0];
  params.group = static_cast<int>(group);
  params.head_dim = static_cast<int>(args.q.shape[2]);
  set_scores(params, args);
  const int blocks =
      static_cast<int>(std::min<int64_t>(tiles, abilities(args.q.device.index).processors));
  const auto scope = span_of(args, "forward", stream);
  dispatch(args.q.dtype, width_of(args.q.shape[2]), args.softcap != 0,
           [&]<typename T, int kWidth, bool kSoftcap>() {
             run_forward<T, kWidth, kSoftcap>(params, blocks, stream);
           });
  return true;
}

std::string unavailable(int device) { return abilities(device).why_not; }

struct HopperBackward::State {
  State(const AttendBackwardArgs& given, bool own_rows, cudaStream_t used_stream)
      : args(given),
        stream(used_stream),
        device(DeviceState::get(given.q.device.index)),
        pack(pack_of(given, own_rows)),
        table(device.table(table_key(given, own_rows, kBackwardTables),
                           [this] { return pack->bytes; }),
              used_stream),
        width(width_of(given.q.shape[2])),
        heads(given.q.shape[1]),
        padded_rows(heads / pack->work.tile_heads * pack->work.tiles() * kQueryTile),
        lse(device, padded_rows * int64_t{sizeof(float)}, stream),
        delta(device, padded_rows * int64_t{sizeof(float)}, stream),
        sums(device, padded_rows * width * int64_t{sizeof(float)}, stream) {}

  PassParams pass_params() const;
  void run_units(const std::vector<BackwardUnit>& units, std::size_t at) const;
  void give_others(const AttendBackwardArgs& given);

  AttendBackwardArgs args;
  cudaStream_t stream;
  DeviceState& device;
  std::shared_ptr<const BackwardPack> pack;
  TableUse table;
  int width;
  int64_t heads;
  int64_t padded_rows;
  Scratch lse, delta, sums;
  std::unique_ptr<Scratch> split_dk, split_dv;
  bool others_given = false;
};

PassParams HopperBackward::State::pass_params() const {
  PassParams params{};
  params.spans = table.as<Span>();
  params.tile_span =
      reinterpret_cast<const std::int32_t*>(table.as<std::byte>() + pack->tile_span_at);
  params.tiles = pack->work.tiles();
  params.tile_heads_log2 = pack->work.tile_heads_log2();
  params.heads = static_cast<int>(heads);
  params.head_dim = static_cast<int>(args.q.shape[2]);
  params.out = rows_of(args.out);
  params.dout = rows_of(args.dout);
  params.dq = rows_of(args.dq);
  params.lse = args.lse.as<float>();
  params.lse_row = args.lse.strides[0];
  params.lse_log2 = lse.as<float>();
  params.delta = delta.as<float>();
  params.dq_sums = sums.as<float>();
  params.scale = static_cast<float>(args.scale);
  return params;
}

void HopperBackward::State::run_units(const std::vector<BackwardUnit>& units,
                                      std::size_t at) const {
  if (units.empty()) return;
  BackwardParams params{};
  const int tile_heads = pack->work.tile_heads;
  params.q = make_tensor_map_of_heads(args.q, tile_heads, pack->work.tile_tokens());
  params.dout = make_tensor_map_of_heads(args.dout, tile_heads, pack->work.tile_tokens());
  params.k = make_tensor_map(args.k, kKeyTile);
  params.v = make_tensor_map(args.v, kKeyTile);
  params.spans = table.as<Span>();
  params.units = reinterpret_cast<const BackwardUnit*>(table.as<std::byte>() + at);
  params.lse = lse.as<float>();
  params.delta = delta.as<float>();
  params.dq = sums.as<float>();
  params.tiles = pack->work.tiles();
  params.tile_heads_log2 = pack->work.tile_heads_log2();
  params.head_dim = static_cast<int>(args.q.shape[2]);
  params.scale = static_cast<float>(args.scale);
  set_scores(params, args);
  if (split_dk != nullptr) {
    const int64_t row = args.k.shape[1] * args.k.shape[2];
    params.dk = {split_dk->data(), row, args.k.shape[2]};
    params.dv = {split_dv->data(), row, args.k.shape[2]};
    params.split_stride = args.dk.shape[0] * row;
    params.sums_are_float = true;
  } else {
    params.dk = rows_of(args.dk);
    params.dv = rows_of(args.dv);
    params.sums_are_float = args.dk.dtype == DType::kFloat32;
  }
  dispatch(args.q.dtype, width, args.softcap != 0, [&]<typename T, int kWidth, bool kSoftcap>() {
    run_backward<T, kWidth, kSoftcap>(params, static_cast<int64_t>(units.size()), stream);
  });
}

HopperBackward::HopperBackward(std::unique_ptr<State> state) : state_(std::move(state)) {}
HopperBackward::~HopperBackward() = default;

std::unique_ptr<HopperBackward> HopperBackward::begin(const AttendBackwardArgs& args, bool own_rows,
                                                      void* stream, std::string& why) {
  if (!fits_backward(args, why)) return nullptr;
  DeviceGuard guard(args.q.device.index);
  auto state = std::make_unique<State>(args, own_rows, as_stream(stream));
  const BackwardWork& work = state->pack->work;
  if (work.splits > 1 || !aligned(args.dk) || !aligned(args.dv)) {
    const int64_t bytes =
        work.splits * args.dk.num_elements() * static_cast<int64_t>(sizeof(float));
    state->split_dk = std::make_unique<Scratch>(state->device, bytes, state->stream);
    state->split_dv = std::make_unique<Scratch>(state->device, bytes, state->stream);
  }
  {
    const auto scope = span_of(args, "backward, before", stream);
    const PassParams params = state->pass_params();
    if (args.q.dtype == DType::kFloat16) {
      run_before<__half>(params, state->width, state->stream);
    } else {
      run_before<__nv_bfloat16>(params, state->width, state->stream);
    }
  }
  if (!work.early.empty()) {
    const auto scope = span_of(args, "backward, own keys", stream);
    state->run_units(work.early, state->pack->early_at);
  }
  return std::unique_ptr<HopperBackward>(new HopperBackward(std::move(state)));
}

void HopperBackward::State::give_others(const AttendBackwardArgs& given) {
  args.k = given.k;
  args.v = given.v;
  if (others_given) return;
  others_given = true;
  const auto scope = span_of(args, "backward", stream);
  run_units(pack->work.others, pack->others_at);
}

bool HopperBackward::others(const AttendBackwardArgs& args) {
  if (state_->pack->work.rest.empty() || state_->split_dk != nullptr) return false;
  DeviceGuard guard(args.q.device.index);
  state_->give_others(args);
  return true;
}

void HopperBackward::finish(const AttendBackwardArgs& given) {
  State& state = *state_;
  const AttendBackwardArgs& args = state.args;
  DeviceGuard guard(args.q.device.index);
  state.give_others(given);
  if (!state.pack->work.rest.empty()) {
    const auto scope = span_of(args, "backward, rest", state.stream);
    state.run_units(state.pack->work.rest, state.pack->rest_at);
  }
  {
    const auto scope = span_of(args, "backward, after", state.stream);
    const PassParams params = state.pass_params();
    if (args.q.dtype == DType::kFloat16) {
      run_after<__half>(params, state.width, state.stream);
    } else {
      run_after<__nv_bfloat16>(params, state.width, state.stream);
    }
  }
  if (state.split_dk == nullptr) return;
  const auto scope = span_of(args, "sums of dk and dv", state.stream);
  const int splits = state.pack->work.splits;
  const auto add_up = [&](const Scratch& parts, const TensorView& destination) {
    const int64_t elements = destination.num_elements();
    std::vector<const void*> sources;
    for (int split = 0; split < splits; ++split) {
      sources.push_back(parts.as<float>() + split * elements);
    }
    const auto build = [&] {
      std::vector<SumPart> rows;
      for (int split = 0; split < splits; ++split) {
        rows.push_back({split, 0, 0, destination.shape[0]});
      }
      return make_sum_table(rows, splits, destination.shape[0]);
    };
    TableKey key = table_key(args, false, kSplitSums);
    key.detail = mix(key.detail, static_cast<std::uint64_t>(splits));
    sum_rows(sources, DType::kFloat32, 1, destination, key, build, state.stream);
  };
  add_up(*state.split_dk, args.dk);
  add_up(*state.split_dv, args.dv);
}

}  // namespace zigzag::cuda::hopper
