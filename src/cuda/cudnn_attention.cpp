#include <algorithm>
#include <bit>
#include <cstring>

#include "cuda/attention.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/launch_lists.h"
#include "cuda/sum_rows.h"

namespace zigzag::cuda {
namespace {

using std::int64_t;

/// A deterministic backward of cuDNN needs memory that grows with lengths squared; beyond this the
/// library's own kernels, which are deterministic as they are, serve instead.
constexpr int64_t kMaxDeterministicWorkspace = int64_t{16} << 30;

enum TableKind : std::uint32_t {
  kForwardArrays = 10,
  kRectangleArrays,
  kDiagonalArrays,
  kDqSums,
  kDkvSums
};

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

void set_launch(CudnnShape& shape, const Launch& launch) {
  shape.mask = launch.mask;
  shape.batch = power_of_two(static_cast<int64_t>(launch.items.size()));
  shape.max_q = std::max<int64_t>(128, power_of_two(launch.max_q));
  shape.max_k = std::max<int64_t>(128, power_of_two(launch.max_k));
  // Squares stay squares, and cuDNN refuses a bottom-right mask with more queries than keys.
  if (shape.mask != CudnnMask::kNone) shape.max_k = std::max(shape.max_k, shape.max_q);
}

/// The offsets and lengths of a launch on the device: arrays one after another in one table.
class LaunchArrays {
 public:
  LaunchArrays(DeviceState& device, const TableKey& key, const Launch& launch,
               const CudnnShape& shape, int64_t dq_row, cudaStream_t stream)
      : batch_(shape.batch),
        use_(device.table(key, [&] { return build(launch, shape, dq_row); }), stream) {}

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
  static constexpr int64_t kArrays = 8;

  const int64_t* offsets(int64_t array) const { return use_.as<int64_t>() + array * (batch_ + 1); }

  static std::vector<std::byte> build(const Launch& launch, const CudnnShape& shape,
                                      int64_t dq_row) {
    const auto batch = static_cast<std::size_t>(shape.batch);
    const int64_t dkv_row = shape.kv_heads * shape.head_dim;
    std::vector<int64_t> offsets(kArrays * (batch + 1), 0);
    std::vector<std::int32_t> lengths(2 * batch, 0);
    const auto set = [&](std::size_t array, std::size_t i, int64_t value) {
      offsets[array * (batch + 1) + i] = value;
    };
    for (std::size_t i = 0; i <= batch; ++i) {
      // Spare items are empty and stand where the last item ends.
      const bool live = i < launch.items.size();
      const LaunchItem& item = launch.items[live ? i : launch.items.size() - 1];
      const int64_t q = item.q_begin + (live ? 0 : item.q_count);
      const int64_t k = item.k_begin + (live ? 0 : item.k_count);
      set(0, i, q * shape.q_row);
      set(1, i, k * shape.k_row);
      set(2, i, k * shape.v_row);
      set(3, i, q * shape.out_row);
      set(4, i, q * shape.lse_row);
      set(5, i, q * shape.dout_row);
      set(6, i, (item.dq_begin + (live ? 0 : item.q_count)) * dq_row);
      set(7, i, (item.dk_begin + (live ? 0 : item.k_count)) * dkv_row);
      if (live) {
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
                    int64_t dq_row) {
  key.kind = kind;
  for (const int64_t value :
       {static_cast<int64_t>(index), shape.q_row, shape.k_row, shape.v_row, shape.out_row,
        shape.lse_row, shape.dout_row, dq_row, shape.kv_heads * shape.head_dim, shape.batch}) {
    key.detail = mix(key.detail, static_cast<std::uint64_t>(value));
  }
  return key;
}

/// A launch with its shape, and the workspace that the largest of them needs.
struct Prepared {
  const Launch* launch;
  CudnnShape shape;
};

bool prepare_all(CudnnEngine& engine, std::vector<Prepared>& launches, int64_t& workspace,
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

}  // namespace

bool cudnn_forward(CudnnEngine& engine, const AttendArgs& args, void* stream_pointer,
                   std::string& why) {
  if (!fits(args, why)) return false;
  const auto lists = forward_launches(args);
  std::vector<Prepared> launches;
  for (const Launch& launch : lists->launches) {
    CudnnShape shape = base_shape(args);
    set_launch(shape, launch);
    launches.push_back({&launch, shape});
  }
  int64_t bytes = 0;
  if (!prepare_all(engine, launches, bytes, why)) return false;

  const cudaStream_t stream = as_stream(stream_pointer);
  DeviceState& device = DeviceState::get(args.q.device.index);
  const Scratch workspace(device, bytes, stream);
  for (std::size_t i = 0; i < launches.size(); ++i) {
    const Prepared& prepared = launches[i];
    const TableKey key = arrays_key(pack_key(args), kForwardArrays, i, prepared.shape, 0);
    const LaunchArrays tables(device, key, *prepared.launch, prepared.shape, 0, stream);
    CudnnArrays arrays;
    tables.fill(arrays);
    arrays.q = args.q.data;
    arrays.k = args.k.data;
    arrays.v = args.v.data;
    arrays.out = args.out.data;
    arrays.lse = args.lse.data;
    engine.run(prepared.shape, arrays, workspace.data(), stream);
  }
  return true;
}

bool cudnn_backward(CudnnEngine& engine, const AttendBackwardArgs& args, void* stream_pointer,
                    std::string& why) {
  if (!fits(args, why)) return false;
  if (!aligned(args.dout)) {
    why = "cuDNN wants rows and heads of dout that start at multiples of 16 bytes";
    return false;
  }
  const auto lists = backward_launches(args, args.k.shape[0]);
  const bool one_kind = lists->rectangles.empty() || lists->diagonals.empty();
  // One launch that owns every row writes the gradients themselves; otherwise their parts are
  // summed afterwards.
  const bool direct_q = one_kind && lists->slots <= 1 && aligned(args.dq) && dense(args.dq);
  const bool direct_k = lists->covers_keys && args.dk.dtype == args.q.dtype && dense(args.dk) &&
                        dense(args.dv) && aligned(args.dk) && aligned(args.dv);
  const int64_t q_row = args.q.shape[1] * args.q.shape[2];
  const int64_t k_row = args.k.shape[1] * args.k.shape[2];

  std::vector<Prepared> launches;
  std::vector<Launch> moved;  // launches whose gradients go to their final rows
  moved.reserve(lists->rectangles.size() + lists->diagonals.size());
  for (const auto* kind : {&lists->diagonals, &lists->rectangles}) {
    const bool rectangles = kind == &lists->rectangles;
    for (const Launch& launch : *kind) {
      const Launch* used = &launch;
      if (direct_q || direct_k) {
        moved.push_back(launch);
        for (LaunchItem& item : moved.back().items) {
          if (direct_q) item.dq_begin = item.q_begin;
          if (direct_k) item.dk_begin = item.k_begin;
        }
        used = &moved.back();
      }
      CudnnShape shape = base_shape(args);
      set_launch(shape, launch);
      shape.backward = true;
      shape.deterministic = args.deterministic;
      shape.dout_row = args.dout.strides[0];
      shape.dout_head = args.dout.strides[1];
      shape.dq_row = q_row;
      shape.dq_head = args.q.shape[2];
      // cuDNN addresses its scratch by the offsets of lse, dq, dk and dv.
      shape.total_q =
          bucket(std::max(args.q.shape[0], rectangles ? lists->rectangle_q : lists->diagonal_q));
      shape.total_k = bucket(direct_k ? args.k.shape[0]
                                      : (rectangles ? lists->rectangle_k : lists->diagonal_k));
      launches.push_back({used, shape});
    }
  }
  int64_t bytes = 0;
  if (!prepare_all(engine, launches, bytes, why)) return false;

  const cudaStream_t stream = as_stream(stream_pointer);
  DeviceState& device = DeviceState::get(args.q.device.index);
  const Scratch workspace(device, bytes, stream);
  const int64_t size = item_size(args.q.dtype);
  const auto scratch_rows = [](bool direct, int64_t rows) { return direct ? 0 : rows; };
  const Scratch dq_diagonal(device, scratch_rows(direct_q, lists->diagonal_q) * q_row * size,
                            stream);
  const Scratch dq_rectangle(device, scratch_rows(direct_q, lists->rectangle_q) * q_row * size,
                             stream);
  const int64_t diagonal_bytes = scratch_rows(direct_k, lists->diagonal_k) * k_row * size;
  const int64_t rectangle_bytes = scratch_rows(direct_k, lists->rectangle_k) * k_row * size;
  const Scratch dk_diagonal(device, diagonal_bytes, stream);
  const Scratch dv_diagonal(device, diagonal_bytes, stream);
  const Scratch dk_rectangle(device, rectangle_bytes, stream);
  const Scratch dv_rectangle(device, rectangle_bytes, stream);

  for (std::size_t i = 0; i < launches.size(); ++i) {
    const Prepared& prepared = launches[i];
    const bool rectangles = i >= lists->diagonals.size();
    TableKey key = pack_key(args);
    key.detail = mix(key.detail, (direct_q ? 1u : 0u) + (direct_k ? 2u : 0u));
    key =
        arrays_key(key, rectangles ? kRectangleArrays : kDiagonalArrays, i, prepared.shape, q_row);
    const LaunchArrays tables(device, key, *prepared.launch, prepared.shape, q_row, stream);
    CudnnArrays arrays;
    tables.fill(arrays);
    arrays.q = args.q.data;
    arrays.k = args.k.data;
    arrays.v = args.v.data;
    arrays.dout = args.dout.data;
    arrays.out = args.out.data;
    arrays.lse = args.lse.data;
    arrays.dq = direct_q ? args.dq.data : (rectangles ? dq_rectangle : dq_diagonal).data();
    arrays.dk = direct_k ? args.dk.data : (rectangles ? dk_rectangle : dk_diagonal).data();
    arrays.dv = direct_k ? args.dv.data : (rectangles ? dv_rectangle : dv_diagonal).data();
    engine.run(prepared.shape, arrays, workspace.data(), stream);
  }

  const auto sum = [&](const TensorView& destination, const SumTable& table, TableKind kind,
                       const void* diagonal, const void* rectangle) {
    std::vector<const void*> sources(static_cast<std::size_t>(1 + lists->slots), rectangle);
    sources[0] = diagonal;
    TableKey key = pack_key(args);
    key.kind = kind;
    sum_rows(
        sources, args.q.dtype, destination, key, [&] { return table; }, stream);
  };
  if (!direct_q) {
    sum(args.dq, lists->dq, kDqSums, dq_diagonal.data(), dq_rectangle.data());
  }
  if (!direct_k) {
    sum(args.dk, lists->dkv, kDkvSums, dk_diagonal.data(), dk_rectangle.data());
    sum(args.dv, lists->dkv, kDkvSums, dv_diagonal.data(), dv_rectangle.data());
  }
  return true;
}

}  // namespace zigzag::cuda
