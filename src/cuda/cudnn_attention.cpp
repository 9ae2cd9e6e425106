#include <algorithm>
#include <bit>
#include <cstring>

#include "cuda/attention.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/launch_lists.h"
#include "cuda/layout.h"
#include "cuda/sum_rows.h"
#include "cuda/timeline.h"

namespace zigzag::cuda {
namespace {

using std::int64_t;

/// A deterministic backward of cuDNN needs memory that grows with lengths squared; beyond this the
/// library's own kernels, which are deterministic as they are, serve instead.
constexpr int64_t kMaxDeterministicWorkspace = int64_t{16} << 30;

enum TableKind : std::uint32_t { kForwardArrays = 10, kBackwardArrays, kDqSums, kDkvSums };

/// Packs whose documents all have one length, a multiple of this, run in plans made for it: 6%
/// faster forward and 11% backward than ragged ones, at a plan a length.
constexpr int64_t kDenseStep = 256;

int64_t power_of_two(int64_t value) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<std::uint64_t>(value)));
}

/// Rounds up in steps of an eighth of the value's power of two, so that few plans are built.
int64_t bucket(int64_t value) {
  const int64_t step = std::max<int64_t>(128, power_of_two(value) / 16);
  return (value + step - 1) / step * step;
}

bool aligned(const TensorView& view) {
  const int64_t elements = 16 / item_size(view.dtype);
  return reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 && view.strides[2] == 1 &&
         view.strides[0] % elements == 0 && view.strides[1] % elements == 0;
}

bool dense(const TensorView& view) {
  return view.strides[2] == 1 && view.strides[1] == view.shape[2] &&
         view.strides[0] == view.shape[1] * view.shape[2];
}

bool fits(const AttendArgs& args, std::string& why) {
  if (args.q.dtype == DType::kFloat32) {
    why = "cuDNN has no float32 attention";
  } else if (args.softcap != 0) {
    why = "cuDNN has no softcap";
  } else if (args.q.shape[2] % 16 != 0) {
    why = "cuDNN wants a head_dim that is a multiple of 16";
  } else if (!launches_express(args.mask)) {
    why = "windows run in the library's own kernels";
  } else if (!aligned(args.q) || !aligned(args.k) || !aligned(args.v) || !aligned(args.out)) {
    why = "cuDNN wants rows and heads that start at multiples of 16 bytes";
  } else if (args.lse.strides[1] != 1) {
    why = "cuDNN wants the heads of lse side by side";
  } else {
    return true;
  }
  return false;
}

CudnnShape base_shape(const AttendArgs& args) {
  CudnnShape shape;
  shape.dtype = args.q.dtype;
  shape.heads = args.q.shape[1];
  shape.kv_heads = args.k.shape[1];
  shape.head_dim = args.q.shape[2];
  shape.q_row = args.q.strides[0];
  shape.q_head = args.q.strides[1];
  shape.k_row = args.k.strides[0];
  shape.k_head = args.k.strides[1];
  shape.v_row = args.v.strides[0];
  shape.v_head = args.v.strides[1];
  shape.out_row = args.out.strides[0];
  shape.out_head = args.out.strides[1];
  shape.lse_row = args.lse.strides[0];
  shape.scale = args.scale;
  return shape;
}

bool dense_length(int64_t length) { return length > 0 && length % kDenseStep == 0; }

/// `parts`: items of the shape that each item of the launch becomes.
void set_launch(CudnnShape& shape, const Launch& launch, int64_t parts, bool equal_lengths) {
  shape.mask = launch.mask;
  shape.batch = static_cast<int64_t>(launch.items.size()) * parts;
  shape.max_q = launch.max_q;
  shape.max_k = launch.max_k;
  shape.dense = equal_lengths;
  if (equal_lengths) return;
  shape.batch = power_of_two(shape.batch);
  shape.max_q = std::max<int64_t>(128, power_of_two(launch.max_q));
  shape.max_k = std::max<int64_t>(128, power_of_two(launch.max_k));
  // Squares stay squares, and cuDNN refuses a bottom-right mask with more queries than keys.
  if (shape.mask != CudnnMask::kNone) shape.max_k = std::max(shape.max_k, shape.max_q);
}

/// Elements from one of an item's parts to the next: parts are the groups of query heads that share
/// a KV head, when those run as items of their own.
struct PartSteps {
  int64_t parts = 1;
  int64_t q = 0, k = 0, v = 0, out = 0, lse = 0, dout = 0, dq = 0, dkv = 0;
};

/// The offsets and lengths of a launch on the device: arrays one after another in one table.
class LaunchArrays {
 public:
  LaunchArrays(DeviceState& device, const TableKey& key, const Launch& launch,
               const CudnnShape& shape, const PartSteps& steps, bool keys_in_place, bool own_rows,
               cudaStream_t stream)
      : batch_(shape.batch),
        use_(
            device.table(key, [&] { return build(launch, shape, steps, keys_in_place, own_rows); }),
            stream) {}

  void fill(CudnnArrays& arrays) const {
    arrays.q_offsets = offsets(0);
    arrays.k_offsets = offsets(1);
    arrays.v_offsets = offsets(2);
    arrays.out_offsets = offsets(3);
    arrays.lse_offsets = offsets(4);
    arrays.dout_offsets = offsets(5);
    arrays.dq_offsets = offsets(6);
    arrays.dkv_offsets = offsets(7);
    arrays.q_lengths = reinterpret_cast<const std::int32_t*>(offsets(kArrays));
    arrays.k_lengths = arrays.q_lengths + batch_;
  }

 private:
  static constexpr std::size_t kArrays = 8;

  const int64_t* offsets(std::size_t array) const {
    return use_.as<int64_t>() + static_cast<int64_t>(array) * (batch_ + 1);
  }

  static std::vector<std::byte> build(const Launch& launch, const CudnnShape& shape,
                                      const PartSteps& steps, bool keys_in_place, bool own_rows) {
    const auto batch = static_cast<std::size_t>(shape.batch);
    const auto parts = static_cast<std::size_t>(steps.parts);
    const std::size_t live = launch.items.size() * parts;
    std::vector<int64_t> offsets(kArrays * (batch + 1), 0);
    std::vector<std::int32_t> lengths(2 * batch, 0);
    // Spare items are empty and start where the first item does.
    for (std::size_t i = 0; i <= batch; ++i) {
      const LaunchItem& item = launch.items[i < live ? i / parts : 0];
      const auto part = static_cast<int64_t>(i < live ? i % parts : 0);
      const int64_t dk_begin = keys_in_place ? item.k_begin : item.dk_begin;
      // A diagonal block's keys are the tokens of its queries.
      const int64_t k_begin = own_rows ? item.q_begin : item.k_begin;
      const int64_t values[kArrays] = {item.q_begin * shape.q_row + part * steps.q,
                                       k_begin * shape.k_row + part * steps.k,
                                       k_begin * shape.v_row + part * steps.v,
                                       item.q_begin * shape.out_row + part * steps.out,
                                       item.q_begin * shape.lse_row + part * steps.lse,
                                       item.q_begin * shape.dout_row + part * steps.dout,
                                       item.q_begin * shape.dq_row + part * steps.dq,
                                       dk_begin * shape.dk_row + part * steps.dkv};
      for (std::size_t array = 0; array < kArrays; ++array) {
        offsets[array * (batch + 1) + i] = values[array];
      }
      if (i < live) {
        lengths[i] = static_cast<std::int32_t>(item.q_count);
        lengths[batch + i] = static_cast<std::int32_t>(item.k_count);
      }
    }
    std::vector<std::byte> bytes = bytes_of(offsets);
    const std::vector<std::byte> tail = bytes_of(lengths);
    bytes.insert(bytes.end(), tail.begin(), tail.end());
    return bytes;
  }

  int64_t batch_;
  TableUse use_;
};

/// What the arrays of a launch depend on besides the pack.
TableKey arrays_key(TableKey key, TableKind kind, std::size_t index, const CudnnShape& shape,
                    int64_t parts, int64_t variant) {
  key.kind = kind;
  for (const int64_t value :
       {static_cast<int64_t>(index), shape.q_row, shape.q_head, shape.k_row, shape.v_row,
        shape.out_row, shape.out_head, shape.lse_row, shape.dout_row, shape.dout_head, shape.dq_row,
        shape.dk_row, shape.head_dim, shape.batch, parts, variant}) {
    key.detail = mix(key.detail, static_cast<std::uint64_t>(value));
  }
  return key;
}

/// A launch with its shape.
struct Prepared {
  const Launch* launch;
  CudnnShape shape;
};

/// Plans for all launches, and the workspace that the largest of them needs.
bool prepare_all(CudnnEngine& engine, const std::vector<Prepared>& launches, int64_t& workspace,
                 std::string& why) {
  workspace = 0;
  for (const Prepared& prepared : launches) {
    const int64_t bytes = engine.prepare(prepared.shape, why);
    if (bytes < 0) return false;
    if (prepared.shape.deterministic && bytes > kMaxDeterministicWorkspace) {
      why = "cuDNN's deterministic backward would need " + std::to_string(bytes) + " bytes";
      return false;
    }
    workspace = std::max(workspace, bytes);
  }
  return true;
}

TimelineScope span(const AttendArgs& args, std::string_view name, void* stream) {
  return {name, static_cast<int>(args.rank), args.q.device.index, Lane::kAttention, stream};
}

std::string_view launch_name(const Launch& launch) {
  return launch.mask == CudnnMask::kTopLeft       ? "backward, diagonal blocks"
         : launch.mask == CudnnMask::kBottomRight ? "backward, whole items"
                                                  : "backward, rectangles";
}

void set_pointers(CudnnArrays& arrays, const AttendArgs& args) {
  arrays.q = args.q.data;
  arrays.k = args.k.data;
  arrays.v = args.v.data;
  arrays.out = args.out.data;
  arrays.lse = args.lse.data;
}

}  // namespace

bool cudnn_forward(CudnnEngine& engine, const AttendArgs& args, void* stream_pointer,
                   std::string& why) {
  if (!fits(args, why)) return false;
  const auto lists = forward_launches(args);
  std::vector<Prepared> launches;
  for (const Launch& launch : lists->launches) {
    CudnnShape shape = base_shape(args);
    set_launch(shape, launch, 1, dense_length(lists->equal_length));
    launches.push_back({&launch, shape});
  }
  int64_t bytes = 0;
  if (!prepare_all(engine, launches, bytes, why)) return false;

  const cudaStream_t stream = as_stream(stream_pointer);
  DeviceState& device = DeviceState::get(args.q.device.index);
  const Scratch workspace(device, bytes, stream);
  for (std::size_t i = 0; i < launches.size(); ++i) {
    const Prepared& prepared = launches[i];
    const TableKey key = arrays_key(pack_key(args), kForwardArrays, i, prepared.shape, 1, 0);
    const LaunchArrays tables(device, key, *prepared.launch, prepared.shape, {}, false, false,
                              stream);
    CudnnArrays arrays;
    tables.fill(arrays);
    set_pointers(arrays, args);
    const auto scope = span(args, "forward", stream);
    engine.run(prepared.shape, arrays, workspace.data(), stream);
  }
  return true;
}

struct CudnnBackward::State {
  State(CudnnEngine& used_engine, const AttendBackwardArgs& given, bool rows_are_own,
        cudaStream_t used_stream)
      : engine(used_engine),
        args(given),
        own_rows(rows_are_own),
        stream(used_stream),
        device(DeviceState::get(given.q.device.index)),
        lists(backward_launches(given, given.deterministic)),
        heads(given.q.shape[1]),
        kv_heads(given.k.shape[1]),
        head_dim(given.q.shape[2]),
        q_bytes(given.q.shape[0] * heads * head_dim * item_size(given.q.dtype)) {
    // One launch that owns every row writes the gradients themselves; otherwise their parts are
    // summed afterwards.
    direct_q = lists->one_layer && aligned(args.dq) && dense(args.dq);
    direct_k = !own_rows && lists->covers_keys && args.dk.dtype == args.q.dtype && dense(args.dk) &&
               dense(args.dv) && aligned(args.dk) && aligned(args.dv);
    // cuDNN sums a group's heads in the tensors' own type. Where parts are summed anyway, each
    // query head's dk and dv are kept apart (its K/V head is read by all of the group, stride 0),
    // so that no such rounding happens.
    group = direct_k ? 1 : heads / kv_heads;
    parts = group > 1 ? kv_heads : 1;
  }

  std::unique_ptr<Scratch> scratch(int64_t bytes) const {
    return std::make_unique<Scratch>(device, bytes, stream);
  }
  std::int64_t dk_row() const { return (group > 1 ? heads : kv_heads) * head_dim; }
  void* layer(int index) const {
    return direct_q ? args.dq.data : dq_layers->as<char>() + index * q_bytes;
  }

  bool prepare(bool early, std::vector<Prepared>& launches, int64_t& workspace,
               std::string& why) const;
  void run(const std::vector<Prepared>& launches, int64_t workspace) const;

  CudnnEngine& engine;
  AttendBackwardArgs args;
  bool own_rows;
  cudaStream_t stream;
  DeviceState& device;
  std::shared_ptr<const BackwardLaunches> lists;
  int64_t heads, kv_heads, head_dim, q_bytes;
  bool direct_q = false;
  bool direct_k = false;
  int64_t group = 1;
  int64_t parts = 1;
  std::unique_ptr<Scratch> packed_q, dq_layers;
  std::unique_ptr<Scratch> dk_early, dv_early, dk_late, dv_late;
};

/// Plans for the early launches or for the others.
bool CudnnBackward::State::prepare(bool early, std::vector<Prepared>& launches, int64_t& workspace,
                                   std::string& why) const {
  for (const Launch& launch : lists->launches) {
    if (launch.early != early) continue;
    CudnnShape shape = base_shape(args);
    set_launch(shape, launch, parts, direct_q && direct_k && dense_length(lists->equal_length));
    shape.backward = true;
    shape.deterministic = args.deterministic;
    shape.q_row = shape.dq_row = heads * head_dim;
    shape.q_head = shape.dq_head = head_dim;
    shape.dout_row = args.dout.strides[0];
    shape.dout_head = args.dout.strides[1];
    shape.dk_row = dk_row();
    if (group > 1) {
      shape.heads = shape.kv_heads = group;
      shape.k_head = shape.v_head = 0;
    }
    // cuDNN addresses its scratch by the offsets of lse, dq, dk and dv.
    if (!shape.dense) {
      shape.total_q = bucket(args.q.shape[0]);
      shape.total_k = bucket(direct_k ? args.k.shape[0] : early ? lists->early_k : lists->late_k);
    }
    launches.push_back({&launch, shape});
  }
  return prepare_all(engine, launches, workspace, why);
}

void CudnnBackward::State::run(const std::vector<Prepared>& launches, int64_t bytes) const {
  PartSteps steps;
  if (parts > 1) {
    steps = {parts,
             group * head_dim,
             args.k.strides[1],
             args.v.strides[1],
             group * args.out.strides[1],
             group,
             group * args.dout.strides[1],
             group * head_dim,
             group * head_dim};
  }
  const Scratch workspace(device, bytes, stream);
  for (std::size_t i = 0; i < launches.size(); ++i) {
    const Prepared& prepared = launches[i];
    const bool early = prepared.launch->early;
    const bool own = own_rows && early;
    const int64_t variant =
        (direct_k ? 1 : 0) + (args.deterministic ? 2 : 0) + (own ? 4 : 0) + (early ? 8 : 0);
    const TableKey key =
        arrays_key(pack_key(args), kBackwardArrays, i, prepared.shape, parts, variant);
    const LaunchArrays tables(device, key, *prepared.launch, prepared.shape, steps, direct_k, own,
                              stream);
    CudnnArrays arrays;
    tables.fill(arrays);
    set_pointers(arrays, args);
    arrays.dout = args.dout.data;
    arrays.dq = layer(prepared.launch->layer);
    arrays.dk = direct_k ? args.dk.data : (early ? dk_early : dk_late)->data();
    arrays.dv = direct_k ? args.dv.data : (early ? dv_early : dv_late)->data();
    const auto scope = span(args, launch_name(*prepared.launch), stream);
    engine.run(prepared.shape, arrays, workspace.data(), stream);
  }
}

CudnnBackward::CudnnBackward(std::unique_ptr<State> state) : state_(std::move(state)) {}
CudnnBackward::~CudnnBackward() = default;

std::unique_ptr<CudnnBackward> CudnnBackward::begin(CudnnEngine& engine,
                                                    const AttendBackwardArgs& args, bool own_rows,
                                                    void* stream, std::string& why) {
  if (!fits(args, why)) return nullptr;
  if (!aligned(args.dout)) {
    why = "cuDNN wants rows and heads of dout that start at multiples of 16 bytes";
    return nullptr;
  }
  auto state = std::make_unique<State>(engine, args, own_rows, as_stream(stream));
  std::vector<Prepared> launches;
  int64_t workspace = 0;
  if (!state->prepare(true, launches, workspace, why)) return nullptr;
  // dq takes the layout of q (see LaunchItem), so q must not have gaps.
  if (!dense(args.q)) {
    state->packed_q = state->scratch(state->q_bytes);
    const TensorView copy =
        TensorView::contiguous(state->packed_q->data(), args.q.dtype, args.q.shape, args.q.device);
    const Segment whole[] = {{0, 0, 0, args.q.shape[0]}};
    const auto scope = span(args, "pack q", stream);
    copy_rows(args.q, copy, whole, 0, stream);
    state->args.q = copy;
  }
  if (!state->direct_q) {
    state->dq_layers = state->scratch(state->lists->layers * state->q_bytes);
  }
  const int64_t bytes =
      state->direct_k ? 0 : state->lists->early_k * state->dk_row() * item_size(args.q.dtype);
  state->dk_early = state->scratch(bytes);
  state->dv_early = state->scratch(bytes);
  state->run(launches, workspace);
  return std::unique_ptr<CudnnBackward>(new CudnnBackward(std::move(state)));
}

bool CudnnBackward::finish(const AttendBackwardArgs& given, std::string& why) {
  State& state = *state_;
  state.args.k = given.k;
  state.args.v = given.v;
  state.args.dk = given.dk;
  state.args.dv = given.dv;
  const AttendBackwardArgs& args = state.args;
  if (!fits(args, why)) return false;
  std::vector<Prepared> launches;
  int64_t workspace = 0;
  if (!state.prepare(false, launches, workspace, why)) return false;
  const int64_t bytes =
      state.direct_k ? 0 : state.lists->late_k * state.dk_row() * item_size(args.q.dtype);
  state.dk_late = state.scratch(bytes);
  state.dv_late = state.scratch(bytes);
  state.run(launches, workspace);

  TableKey key = pack_key(args);
  key.detail = mix(key.detail, args.deterministic ? 1 : 0);
  if (!state.direct_q) {
    std::vector<const void*> sources;
    for (int i = 0; i < state.lists->layers; ++i) sources.push_back(state.layer(i));
    key.kind = kDqSums;
    const auto scope = span(args, "sum of dq", state.stream);
    sum_rows(
        sources, args.q.dtype, 1, args.dq, key, [&] { return state.lists->dq; }, state.stream);
  }
  if (!state.direct_k) {
    key.kind = kDkvSums;
    const auto scope = span(args, "sums of dk and dv", state.stream);
    const auto sum = [&](const TensorView& destination, const Scratch& early, const Scratch& late) {
      std::vector<const void*> sources(static_cast<std::size_t>(state.lists->dkv.sources),
                                       late.data());
      sources[0] = early.data();
      sum_rows(
          sources, args.q.dtype, state.group, destination, key, [&] { return state.lists->dkv; },
          state.stream);
    };
    sum(args.dk, *state.dk_early, *state.dk_late);
    sum(args.dv, *state.dv_early, *state.dv_late);
  }
  return true;
}

}  // namespace zigzag::cuda
