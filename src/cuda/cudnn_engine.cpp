// The one file that includes cuDNN's frontend, which takes more than a minute to compile.
#include "cuda/cudnn_engine.h"

#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include <cudnn_frontend.h>
#include <dlfcn.h>

#include "cuda/check.h"
#include "cuda/library.h"
#include "zigzag/error.h"

namespace cudnn_frontend {
// The frontend calls cuDNN through this handle.
void* cudnn_dlhandle = nullptr;
}  // namespace cudnn_frontend

namespace zigzag::cuda {
namespace {

namespace fe = cudnn_frontend;

enum Uid : std::int64_t {
  kQ = 1,
  kK,
  kV,
  kOut,
  kLse,
  kDout,
  kDq,
  kDk,
  kDv,
  kQOffsets,
  kKOffsets,
  kVOffsets,
  kOutOffsets,
  kDoutOffsets,
  kLseOffsets,
  kDqOffsets,
  kDkvOffsets,
  kQLengths,
  kKLengths,
};

/// The oldest cuDNN whose ragged kernels this code was measured with.
constexpr std::size_t kOldestVersion = 91000;

CudnnEngine::Presence open_cudnn() {
  CudnnEngine::Presence presence;
  // The frontend opens CUDA's runtime by its name alone; in a Python wheel it lies off the path.
  const OpenedLibrary runtime =
      open_library("ZIGZAG_CUDART_PATH", "libcudart.so.13", "nvidia/cu13/lib");
  if (runtime.handle == nullptr &&
      dlopen("/usr/local/cuda/lib64/libcudart.so.13", RTLD_NOW | RTLD_LOCAL) == nullptr) {
    presence.detail = runtime.detail;
    return presence;
  }
  // cuDNN opens NVRTC by its name, likewise.
  (void)open_library("ZIGZAG_NVRTC_PATH", "libnvrtc.so.13", "nvidia/cu13/lib");
  const OpenedLibrary cudnn =
      open_library("ZIGZAG_CUDNN_PATH", "libcudnn.so.9", "nvidia/cudnn/lib");
  presence.detail = cudnn.detail;
  if (cudnn.handle == nullptr) return presence;
  fe::cudnn_dlhandle = cudnn.handle;
  const std::size_t version = fe::detail::get_backend_version();
  const std::string text = std::to_string(version / 10000) + "." +
                           std::to_string(version / 100 % 100) + "." +
                           std::to_string(version % 100);
  if (version < kOldestVersion) {
    presence.detail =
        "cuDNN " + text + " is too old; 9.10 or newer is needed (" + cudnn.detail + ")";
    return presence;
  }
  presence.available = true;
  presence.detail = "cuDNN " + text + ", " + cudnn.detail;
  return presence;
}

using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

/// Makes the tensors of one graph.
class Builder {
 public:
  Builder(fe::graph::Graph& graph, const CudnnShape& shape) : graph_(graph), shape_(shape) {}

  /// Null for a dense shape.
  Tensor offsets(Uid uid, const char* name) {
    if (shape_.dense) return nullptr;
    return graph_.tensor(fe::graph::Tensor_attributes()
                             .set_name(name)
                             .set_uid(uid)
                             .set_dim({shape_.batch + 1, 1, 1, 1})
                             .set_stride({1, 1, 1, 1})
                             .set_data_type(fe::DataType_t::INT64));
  }
  Tensor lengths(Uid uid, const char* name) {
    return graph_.tensor(fe::graph::Tensor_attributes()
                             .set_name(name)
                             .set_uid(uid)
                             .set_dim({shape_.batch, 1, 1, 1})
                             .set_stride({1, 1, 1, 1})
                             .set_data_type(fe::DataType_t::INT32));
  }
  Tensor input(Uid uid, const char* name, bool keys, std::int64_t row, std::int64_t head,
               const Tensor& ragged) {
    auto attributes = fe::graph::Tensor_attributes()
                          .set_name(name)
                          .set_uid(uid)
                          .set_dim(dims(keys))
                          .set_stride(strides(keys, row, head));
    if (ragged != nullptr) attributes.set_ragged_offset(ragged);
    return graph_.tensor(attributes);
  }
  void output(const Tensor& tensor, Uid uid, bool keys, std::int64_t row, std::int64_t head,
              const Tensor& ragged) {
    tensor->set_output(true).set_uid(uid).set_dim(dims(keys)).set_stride(strides(keys, row, head));
    if (ragged != nullptr) tensor->set_ragged_offset(ragged);
  }
  /// Tells the items' lengths, where they differ.
  template <typename Attributes>
  void set_lengths(Attributes& attributes) {
    if (shape_.dense) return;
    attributes.set_padding_mask(true)
        .set_seq_len_q(lengths(kQLengths, "q_lengths"))
        .set_seq_len_kv(lengths(kKLengths, "k_lengths"));
  }
  std::vector<std::int64_t> lse_dims() const {
    return {shape_.batch, shape_.heads, shape_.max_q, 1};
  }
  std::vector<std::int64_t> lse_strides() const {
    return {shape_.max_q * shape_.lse_row, 1, shape_.lse_row, 1};
  }

 private:
  std::vector<std::int64_t> dims(bool keys) const {
    return {shape_.batch, keys ? shape_.kv_heads : shape_.heads, keys ? shape_.max_k : shape_.max_q,
            shape_.head_dim};
  }
  std::vector<std::int64_t> strides(bool keys, std::int64_t row, std::int64_t head) const {
    return {(keys ? shape_.max_k : shape_.max_q) * row, head, row, 1};
  }

  fe::graph::Graph& graph_;
  const CudnnShape& shape_;
};

template <typename Attributes>
void set_mask(Attributes& attributes, CudnnMask mask) {
  if (mask == CudnnMask::kNone) return;
  attributes.set_diagonal_alignment(mask == CudnnMask::kTopLeft
                                        ? fe::DiagonalAlignment_t::TOP_LEFT
                                        : fe::DiagonalAlignment_t::BOTTOM_RIGHT);
  attributes.set_diagonal_band_right_bound(0);
}

void describe_forward(fe::graph::Graph& graph, const CudnnShape& shape) {
  Builder make(graph, shape);
  const Tensor q =
      make.input(kQ, "q", false, shape.q_row, shape.q_head, make.offsets(kQOffsets, "q_offsets"));
  const Tensor k =
      make.input(kK, "k", true, shape.k_row, shape.k_head, make.offsets(kKOffsets, "k_offsets"));
  const Tensor v =
      make.input(kV, "v", true, shape.v_row, shape.v_head, make.offsets(kVOffsets, "v_offsets"));
  auto attributes =
      fe::graph::SDPA_attributes().set_name("forward").set_generate_stats(true).set_attn_scale(
          static_cast<float>(shape.scale));
  make.set_lengths(attributes);
  set_mask(attributes, shape.mask);
  auto [out, lse] = graph.sdpa(q, k, v, attributes);
  make.output(out, kOut, false, shape.out_row, shape.out_head,
              make.offsets(kOutOffsets, "out_offsets"));
  lse->set_output(true)
      .set_uid(kLse)
      .set_data_type(fe::DataType_t::FLOAT)
      .set_dim(make.lse_dims())
      .set_stride(make.lse_strides());
  if (!shape.dense) lse->set_ragged_offset(make.offsets(kLseOffsets, "lse_offsets"));
}

void describe_backward(fe::graph::Graph& graph, const CudnnShape& shape) {
  Builder make(graph, shape);
  const Tensor q =
      make.input(kQ, "q", false, shape.q_row, shape.q_head, make.offsets(kQOffsets, "q_offsets"));
  const Tensor k =
      make.input(kK, "k", true, shape.k_row, shape.k_head, make.offsets(kKOffsets, "k_offsets"));
  const Tensor v =
      make.input(kV, "v", true, shape.v_row, shape.v_head, make.offsets(kVOffsets, "v_offsets"));
  const Tensor out = make.input(kOut, "out", false, shape.out_row, shape.out_head,
                                make.offsets(kOutOffsets, "out_offsets"));
  const Tensor dout = make.input(kDout, "dout", false, shape.dout_row, shape.dout_head,
                                 make.offsets(kDoutOffsets, "dout_offsets"));
  auto lse_attributes = fe::graph::Tensor_attributes()
                            .set_name("lse")
                            .set_uid(kLse)
                            .set_data_type(fe::DataType_t::FLOAT)
                            .set_dim(make.lse_dims())
                            .set_stride(make.lse_strides());
  if (!shape.dense) lse_attributes.set_ragged_offset(make.offsets(kLseOffsets, "lse_offsets"));
  const Tensor lse = graph.tensor(lse_attributes);
  auto attributes = fe::graph::SDPA_backward_attributes()
                        .set_name("backward")
                        .set_attn_scale(static_cast<float>(shape.scale))
                        .set_deterministic_algorithm(shape.deterministic);
  make.set_lengths(attributes);
  if (!shape.dense) {
    attributes.set_max_total_seq_len_q(shape.total_q).set_max_total_seq_len_kv(shape.total_k);
  }
  set_mask(attributes, shape.mask);
  auto [dq, dk, dv] = graph.sdpa_backward(q, k, v, out, dout, lse, attributes);
  const std::int64_t row = shape.dk_row;
  const Tensor dkv_offsets = make.offsets(kDkvOffsets, "dkv_offsets");
  make.output(dq, kDq, false, shape.dq_row, shape.dq_head, make.offsets(kDqOffsets, "dq_offsets"));
  make.output(dk, kDk, true, row, shape.head_dim, dkv_offsets);
  make.output(dv, kDv, true, row, shape.head_dim, dkv_offsets);
}

void* writable(const void* pointer) { return const_cast<void*>(pointer); }

}  // namespace

struct CudnnEngine::State {
  struct Plan {
    std::shared_ptr<fe::graph::Graph> graph;  // null: cuDNN has none
    std::int64_t workspace = -1;
    std::string why;
  };
  int device = 0;
  cudnnHandle_t handle = nullptr;
  std::map<CudnnShape, Plan> plans;
};

const CudnnEngine::Presence& CudnnEngine::presence() {
  static const Presence presence = [] {
    try {
      return open_cudnn();
    } catch (const std::exception& error) {
      return Presence{false, error.what()};
    }
  }();
  return presence;
}

CudnnEngine::CudnnEngine(int device) : state_(std::make_unique<State>()) {
  if (!presence().available) throw DeviceError(presence().detail);
  DeviceGuard guard(device);
  state_->device = device;
  const cudnnStatus_t status = fe::detail::create_handle(&state_->handle);
  if (status != CUDNN_STATUS_SUCCESS) {
    throw DeviceError(std::string("cuDNN cannot use cuda:") + std::to_string(device) + ": " +
                      fe::detail::get_error_string(status));
  }
}

CudnnEngine::~CudnnEngine() = default;

std::int64_t CudnnEngine::prepare(const CudnnShape& shape, std::string& why) {
  State::Plan& plan = state_->plans[shape];
  if (plan.graph == nullptr && plan.why.empty()) {
    DeviceGuard guard(state_->device);
    auto graph = std::make_shared<fe::graph::Graph>();
    graph
        ->set_io_data_type(shape.dtype == DType::kBFloat16 ? fe::DataType_t::BFLOAT16
                                                           : fe::DataType_t::HALF)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    if (shape.backward) {
      describe_backward(*graph, shape);
    } else {
      describe_forward(*graph, shape);
    }
    fe::error_t error = graph->build(state_->handle, {fe::HeurMode_t::A});
    if (error.is_good()) {
      plan.workspace = graph->get_workspace_size();
      plan.graph = std::move(graph);
    } else {
      (void)cudaGetLastError();
      plan.why = error.get_message();
      if (plan.why.empty()) plan.why = "cuDNN has no plan for this shape";
    }
  }
  why = plan.why;
  return plan.workspace;
}

void CudnnEngine::run(const CudnnShape& shape, const CudnnArrays& arrays, void* workspace,
                      void* stream) {
  const State::Plan& plan = state_->plans.at(shape);
  DeviceGuard guard(state_->device);
  const cudnnStatus_t status = fe::detail::set_stream(state_->handle, as_stream(stream));
  if (status != CUDNN_STATUS_SUCCESS) {
    throw DeviceError(std::string("cudnnSetStream failed: ") +
                      fe::detail::get_error_string(status));
  }
  std::unordered_map<std::int64_t, void*> pack{
      {kQ, writable(arrays.q)}, {kK, writable(arrays.k)}, {kV, writable(arrays.v)},
      {kOut, arrays.out},       {kLse, arrays.lse},
  };
  if (!shape.dense) {
    pack[kQOffsets] = writable(arrays.q_offsets);
    pack[kKOffsets] = writable(arrays.k_offsets);
    pack[kVOffsets] = writable(arrays.v_offsets);
    pack[kOutOffsets] = writable(arrays.out_offsets);
    pack[kLseOffsets] = writable(arrays.lse_offsets);
    pack[kQLengths] = writable(arrays.q_lengths);
    pack[kKLengths] = writable(arrays.k_lengths);
  }
  if (shape.backward && !shape.dense) {
    pack[kDoutOffsets] = writable(arrays.dout_offsets);
    pack[kDqOffsets] = writable(arrays.dq_offsets);
    pack[kDkvOffsets] = writable(arrays.dkv_offsets);
  }
  if (shape.backward) {
    pack[kDout] = writable(arrays.dout);
    pack[kDq] = arrays.dq;
    pack[kDk] = arrays.dk;
    pack[kDv] = arrays.dv;
  }
  fe::error_t error = plan.graph->execute(state_->handle, pack, workspace);
  if (error.is_good()) return;
  throw_context_report();
  throw DeviceError("cuDNN's attention failed: " + error.get_message());
}

std::shared_ptr<CudnnEngine> borrow_cudnn_engine(int device) {
  struct Shelf {
    std::mutex mutex;
    std::multimap<int, std::unique_ptr<CudnnEngine>> engines;
  };
  // Never destroyed: cuDNN may be gone before static destructors run.
  static auto* shelf = new Shelf;
  std::unique_ptr<CudnnEngine> engine;
  {
    const std::lock_guard lock(shelf->mutex);
    const auto found = shelf->engines.find(device);
    if (found != shelf->engines.end()) {
      engine = std::move(found->second);
      shelf->engines.erase(found);
    }
  }
  if (engine == nullptr) engine = std::make_unique<CudnnEngine>(device);
  return {engine.release(), [device](CudnnEngine* used) {
            const std::lock_guard lock(shelf->mutex);
            shelf->engines.emplace(device, std::unique_ptr<CudnnEngine>(used));
          }};
}

}  // namespace zigzag::cuda
