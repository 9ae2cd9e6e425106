#include <algorithm>
#include <bit>
#include <cstring>

#include "cuda/attention.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/launch_lists.h"
#include "cuda/layout.h"
#include "cuda/sum_rows.h"

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
               const CudnnShape& shape, const PartSteps& steps, bool keys_in_place,
               cudaStream_t stream)
      : batch_(shape.batch),
        use_(device.table(key, [&] { return build(launch, shape, steps, keys_in_place); }),
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
                                      const PartSteps& steps, bool keys_in_place) {
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
      const int64_t values[kArrays] = {item.q_begin * shape.q_row + part * steps.q,
                                       item.k_begin * shape.k_row + part * steps.k,
                                       item.k_begin * shape.v_row + part * steps.v,
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
    const LaunchArrays tables(device, key, *prepared.launch, prepared.shape, {}, false, stream);
    CudnnArrays arrays;
    tables.fill(arrays);
    set_pointers(arrays, args);
    engine.run(prepared.shape, arrays, workspace.data(), stream);
  }
  return true;
}

bool cudnn_backward(CudnnEngine& engine, const AttendBackwardArgs& given, void* stream_pointer,
                    std::string& why) {
  if (!fits(given, why)) return false;
  if (!aligned(given.dout)) {
    why = "cuDNN wants rows and heads of dout that start at multiples of 16 bytes";
    return false;
  }
  AttendBackwardArgs args = given;
  const int64_t heads = args.q.shape[1];
  const int64_t kv_heads = args.k.shape[1];
  const int64_t head_dim = args.q.shape[2];
  const int64_t rows = args.q.shape[0];
  const int64_t size = item_size(args.q.dtype);
  const bool q_is_dense = dense(args.q);

  const auto lists = backward_launches(args, args.k.shape[0], args.deterministic);
  // One launch that owns every row writes the gradients themselves; otherwise their parts are
  // summed afterwards.
  const bool direct_q = lists->one_layer && aligned(args.dq) && dense(args.dq);
  const bool direct_k = lists->covers_keys && args.dk.dtype == args.q.dtype && dense(args.dk) &&
                        dense(args.dv) && aligned(args.dk) && aligned(args.dv);
  // cuDNN sums a group's heads in the tensors' own type. Where parts are summed anyway, each query
  // head's dk and dv are kept apart (its K/V head is read by all of the group, stride 0), so that
  // no such rounding happens.
  const int64_t group = direct_k ? 1 : heads / kv_heads;
  const int64_t parts = group > 1 ? kv_heads : 1;

  std::vector<Prepared> launches;
  for (const Launch& launch : lists->launches) {
    CudnnShape shape = base_shape(args);
    set_launch(shape, launch, parts, direct_q && direct_k && dense_length(lists->equal_length));
    shape.backward = true;
    shape.deterministic = args.deterministic;
    shape.q_row = heads * head_dim;
    shape.q_head = head_dim;
    shape.dq_row = shape.q_row;
    shape.dq_head = shape.q_head;
    shape.dout_row = args.dout.strides[0];
    shape.dout_head = args.dout.strides[1];
    shape.dk_row = (group > 1 ? heads : kv_heads) * head_dim;
    if (group > 1) {
      shape.heads = shape.kv_heads = group;
      shape.k_head = shape.v_head = 0;
    }
    // cuDNN addresses its scratch by the offsets of lse, dq, dk and dv.
    if (!shape.dense) {
      shape.total_q = bucket(rows);
      shape.total_k = bucket(direct_k            ? args.k.shape[0]
                             : launch.layer == 0 ? lists->diagonal_k
                                                 : lists->rectangle_k);
    }
    launches.push_back({&launch, shape});
  }
  int64_t bytes = 0;
  if (!prepare_all(engine, launches, bytes, why)) return false;

  const cudaStream_t stream = as_stream(stream_pointer);
  DeviceState& device = DeviceState::get(args.q.device.index);
  const int64_t q_bytes = rows * heads * head_dim * size;
  // dq takes the layout of q (see LaunchItem), so q must not have gaps.
  const Scratch packed_q(device, q_is_dense ? 0 : q_bytes, stream);
  if (!q_is_dense) {
    const TensorView copy =
        TensorView::contiguous(packed_q.data(), args.q.dtype, args.q.shape, args.q.device);
    const Segment whole[] = {{0, 0, 0, rows}};
    copy_rows(args.q, copy, whole, 0, stream);
    args.q = copy;
  }
  const Scratch workspace(device, bytes, stream);
  const Scratch dq_layers(device, direct_q ? 0 : lists->layers * q_bytes, stream);
  const int64_t k_row_bytes = (group > 1 ? heads : kv_heads) * head_dim * size;
  const int64_t diagonal_bytes = direct_k ? 0 : lists->diagonal_k * k_row_bytes;
  const int64_t rectangle_bytes = direct_k ? 0 : lists->rectangle_k * k_row_bytes;
  const Scratch dk_diagonal(device, diagonal_bytes, stream);
  const Scratch dv_diagonal(device, diagonal_bytes, stream);
  const Scratch dk_rectangle(device, rectangle_bytes, stream);
  const Scratch dv_rectangle(device, rectangle_bytes, stream);

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
  const auto layer_data = [&](int layer) {
    return static_cast<void*>(dq_layers.as<char>() + layer * q_bytes);
  };
  for (std::size_t i = 0; i < launches.size(); ++i) {
    const Prepared& prepared = launches[i];
    const int layer = prepared.launch->layer;
    const int64_t variant = (direct_k ? 1 : 0) + (args.deterministic ? 2 : 0);
    const TableKey key =
        arrays_key(pack_key(args), kBackwardArrays, i, prepared.shape, parts, variant);
    const LaunchArrays tables(device, key, *prepared.launch, prepared.shape, steps, direct_k,
                              stream);
    CudnnArrays arrays;
    tables.fill(arrays);
    set_pointers(arrays, args);
    arrays.dout = args.dout.data;
    arrays.dq = direct_q ? args.dq.data : layer_data(layer);
    arrays.dk = direct_k ? args.dk.data : (layer == 0 ? dk_diagonal : dk_rectangle).data();
    arrays.dv = direct_k ? args.dv.data : (layer == 0 ? dv_diagonal : dv_rectangle).data();
    engine.run(prepared.shape, arrays, workspace.data(), stream);
  }

  TableKey key = pack_key(args);
  key.detail = mix(key.detail, args.deterministic ? 1 : 0);
  if (!direct_q) {
    std::vector<const void*> sources;
    for (int layer = 0; layer < lists->layers; ++layer) sources.push_back(layer_data(layer));
    key.kind = kDqSums;
    sum_rows(
        sources, args.q.dtype, 1, args.dq, key, [&] { return lists->dq; }, stream);
  }
  if (!direct_k) {
    key.kind = kDkvSums;
    const auto sum = [&](const TensorView& destination, const Scratch& diagonal,
                         const Scratch& rectangle) {
      const void* const sources[] = {diagonal.data(), rectangle.data()};
      sum_rows(
          sources, args.q.dtype, group, destination, key, [&] { return lists->dkv; }, stream);
    };
    sum(args.dk, dk_diagonal, dk_rectangle);
    sum(args.dv, dv_diagonal, dv_rectangle);
  }
  return true;
}

}  // namespace zigzag::cuda
