#include <algorithm>
#include <map>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/attention.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/fma_params.h"
#include "cuda/launch_lists.h"
#include "cuda/recent.h"
#include "zigzag/error.h"

namespace zigzag::cuda {
namespace {

using std::int64_t;

constexpr std::uint32_t kFmaTables = 20;

/// The tables of a pack as the kernels read them, in one run of bytes.
struct FmaPack {
  std::vector<std::byte> bytes;
  std::size_t items_at = 0, q_tiles_at = 0, keys_at = 0, k_tiles_at = 0;
  int64_t item_count = 0, key_count = 0, q_tiles = 0, k_tiles = 0;
};

int64_t tiles_of(int64_t rows) { return (rows + kFmaTile - 1) / kFmaTile; }

FmaPack make_pack(const AttendArgs& args) {
  FmaPack pack;
  std::vector<FmaItem> items;
  std::vector<int64_t> q_starts{0};
  std::map<int64_t, std::vector<int64_t>> of_document;
  for (const WorkItem& item : args.items) {
    of_document[item.document].push_back(static_cast<int64_t>(items.size()));
    items.push_back(
        {item.q_begin, item.q_count, item.q_position, item.k_begin, item.k_count, item.k_position});
    q_starts.push_back(q_starts.back() + tiles_of(item.q_count));
  }
  std::vector<FmaKeys> keys;
  std::vector<int64_t> k_starts{0};
  for (const KeyRange& range : args.plan->gathered_ranges(args.rank, args.mask)) {
    FmaKeys entry{range.row, range.end - range.begin, range.begin, {-1, -1}};
    if (entry.count == 0) continue;
    std::vector<int64_t> seen_by = of_document[range.document];
    // In the order of their queries, so that sums do not depend on the order of the items.
    std::sort(seen_by.begin(), seen_by.end(), [&](int64_t a, int64_t b) {
      return items[static_cast<std::size_t>(a)].q_begin <
             items[static_cast<std::size_t>(b)].q_begin;
    });
    if (seen_by.size() > 2) throw DeviceError("a document has more than two work items");
    std::copy(seen_by.begin(), seen_by.end(), entry.items);
    keys.push_back(entry);
    k_starts.push_back(k_starts.back() + tiles_of(entry.count));
  }
  pack.item_count = static_cast<int64_t>(items.size());
  pack.key_count = static_cast<int64_t>(keys.size());
  pack.q_tiles = q_starts.back();
  pack.k_tiles = k_starts.back();
  pack.items_at = append_bytes(pack.bytes, items);
  pack.q_tiles_at = append_bytes(pack.bytes, q_starts);
  pack.keys_at = append_bytes(pack.bytes, keys);
  pack.k_tiles_at = append_bytes(pack.bytes, k_starts);
  return pack;
}

RowHeadStrides strides_of(const TensorView& view) { return {view.strides[0], view.strides[1]}; }

bool aligned(const TensorView& view) {
  const auto bytes = static_cast<std::uintptr_t>(4 * item_size(view.dtype));
  return reinterpret_cast<std::uintptr_t>(view.data) % bytes == 0 && view.strides[0] % 4 == 0 &&
         view.strides[1] % 4 == 0 && view.shape[2] % 4 == 0;
}

FmaParams base_params(const AttendArgs& args, const FmaPack& pack, const TableUse& table) {
  if (args.q.shape[2] > 256) {
    throw DeviceError("attention on a GPU takes head_dim 1 to 256, not " +
                      std::to_string(args.q.shape[2]));
  }
  FmaParams params{};
  params.q = args.q.data;
  params.k = args.k.data;
  params.v = args.v.data;
  params.out = args.out.data;
  params.lse = args.lse.as<float>();
  params.q_strides = strides_of(args.q);
  params.k_strides = strides_of(args.k);
  params.v_strides = strides_of(args.v);
  params.out_strides = strides_of(args.out);
  params.lse_strides = strides_of(args.lse);
  const auto* bytes = table.as<std::byte>();
  params.items = reinterpret_cast<const FmaItem*>(bytes + pack.items_at);
  params.q_tiles = reinterpret_cast<const int64_t*>(bytes + pack.q_tiles_at);
  params.keys = reinterpret_cast<const FmaKeys*>(bytes + pack.keys_at);
  params.k_tiles = reinterpret_cast<const int64_t*>(bytes + pack.k_tiles_at);
  params.item_count = pack.item_count;
  params.key_count = pack.key_count;
  params.local_rows = args.q.shape[0];
  params.heads = static_cast<int>(args.q.shape[1]);
  params.kv_heads = static_cast<int>(args.k.shape[1]);
  params.head_dim = static_cast<int>(args.q.shape[2]);
  params.scale = static_cast<float>(args.scale);
  params.softcap = static_cast<float>(args.softcap);
  params.left = args.mask.window_left;
  params.right = args.mask.causal ? 0 : args.mask.window_right;
  params.aligned = aligned(args.q) && aligned(args.k) && aligned(args.v);
  return params;
}

std::shared_ptr<const FmaPack> pack_of(const AttendArgs& args) {
  static auto* recent = new Recent<TableKey, FmaPack>(256);
  return recent->get(pack_key(args), [&] { return make_pack(args); });
}

std::shared_ptr<DeviceTable> table_of(DeviceState& device, const AttendArgs& args,
                                      const FmaPack& pack) {
  TableKey key = pack_key(args);
  key.kind = kFmaTables;
  return device.table(key, [&] { return pack.bytes; });
}

}  // namespace

void fma_attend(const AttendArgs& args, void* stream) {
  DeviceState& device = DeviceState::get(args.q.device.index);
  DeviceGuard guard(args.q.device.index);
  const auto pack = pack_of(args);
  const TableUse table(table_of(device, args, *pack), as_stream(stream));
  const FmaParams params = base_params(args, *pack, table);
  switch (args.q.dtype) {
    case DType::kFloat32:
      return fma_forward<float>(params, pack->q_tiles, stream);
    case DType::kFloat16:
      return fma_forward<__half>(params, pack->q_tiles, stream);
    default:
      return fma_forward<__nv_bfloat16>(params, pack->q_tiles, stream);
  }
}

void fma_attend_backward(const AttendBackwardArgs& args, void* stream) {
  DeviceState& device = DeviceState::get(args.q.device.index);
  DeviceGuard guard(args.q.device.index);
  const auto pack = pack_of(args);
  const TableUse table(table_of(device, args, *pack), as_stream(stream));
  FmaParams params = base_params(args, *pack, table);
  const Scratch delta(device, args.q.shape[0] * args.q.shape[1] * int64_t{sizeof(float)},
                      as_stream(stream));
  params.delta = delta.as<float>();
  params.dout = args.dout.data;
  params.dq = args.dq.data;
  params.dk = args.dk.data;
  params.dv = args.dv.data;
  params.dout_strides = strides_of(args.dout);
  params.dq_strides = strides_of(args.dq);
  params.dk_strides = strides_of(args.dk);
  params.dv_strides = strides_of(args.dv);
  params.sums_are_float = args.dk.dtype == DType::kFloat32;
  params.aligned = params.aligned && aligned(args.dout);
  switch (args.q.dtype) {
    case DType::kFloat32:
      return fma_backward<float>(params, pack->q_tiles, pack->k_tiles, stream);
    case DType::kFloat16:
      return fma_backward<__half>(params, pack->q_tiles, pack->k_tiles, stream);
    default:
      return fma_backward<__nv_bfloat16>(params, pack->q_tiles, pack->k_tiles, stream);
  }
}

}  // namespace zigzag::cuda
