#include <span>
#include <utility>
#include <vector>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "gil.h"
#include "run.h"

namespace zigzag::python {
namespace {

using Window = std::pair<std::int64_t, std::int64_t>;
using KernelsName = std::optional<std::string>;

std::optional<Kernels> to_kernels(const KernelsName& name) {
  return name ? std::optional(parse_kernels(*name)) : std::nullopt;
}

OperationOptions operation(const KernelsName& kernels, std::uintptr_t stream) {
  return {to_kernels(kernels), reinterpret_cast<void*>(stream)};  // NOLINT
}

/// Python's copy of AttentionOptions.
AttentionOptions make_options(bool causal, Window window, std::optional<double> softmax_scale,
                              double softcap, std::int64_t kv_heads_per_stage, bool deterministic,
                              const KernelsName& kernels, std::uintptr_t stream) {
  AttentionOptions options;
  static_cast<OperationOptions&>(options) = operation(kernels, stream);
  options.mask = make_mask(causal, window);
  options.softmax_scale = softmax_scale;
  options.softcap = softcap;
  options.kv_heads_per_stage = kv_heads_per_stage;
  options.deterministic = deterministic;
  return options;
}

void run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Plan& plan,
                 const Communicator& communicator, const AttentionOptions& options,
                 const Tensor& out, const Tensor& lse) {
  run_operation(
      [=] { forward(q.view, k.view, v.view, plan, communicator, options, out.view, lse.view); },
      communicator, q.view.device);
}

void run_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& out, const Tensor& lse, const Plan& plan,
                  const Communicator& communicator, const AttentionOptions& options,
                  const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  run_operation(
      [=] {
        backward(dout.view, q.view, k.view, v.view, out.view, lse.view, plan, communicator, options,
                 dq.view, dk.view, dv.view);
      },
      communicator, q.view.device);
}

std::span<const std::int64_t> span_of(const IndexInput& values) {
  return {values.data(), values.size()};
}

void bind_attention(nb::module_& module) {
  nb::class_<AttentionOptions>(module, "AttentionOptions", "What attention computes.")
      .def(nb::new_([](bool causal, Window window, std::optional<double> softmax_scale,
                       double softcap, std::int64_t kv_heads_per_stage, bool deterministic,
                       const KernelsName& kernels, std::uintptr_t stream) {
             return make_options(causal, window, softmax_scale, softcap, kv_heads_per_stage,
                                 deterministic, kernels, stream);
           }),
           nb::kw_only(), nb::arg("causal") = true, nb::arg("window") = Window(-1, -1),
           nb::arg("softmax_scale").none() = nb::none(), nb::arg("softcap") = 0.0,
           nb::arg("kv_heads_per_stage") = 0, nb::arg("deterministic") = false,
           nb::arg("kernels").none() = nb::none(), nb::arg("stream") = 0);
  module.def("forward", &run_forward, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("plan"),
             nb::arg("communicator"), nb::arg("options"), nb::arg("out"), nb::arg("lse"));
  module.def("backward", &run_backward, nb::arg("dout"), nb::arg("q"), nb::arg("k"), nb::arg("v"),
             nb::arg("out"), nb::arg("lse"), nb::arg("plan"), nb::arg("communicator"),
             nb::arg("options"), nb::arg("dq"), nb::arg("dk"), nb::arg("dv"));
  module.def(
      "reference_forward",
      [](const Tensor& q, const Tensor& k, const Tensor& v, const IndexInput& cu_seqlens,
         const AttentionOptions& options, const Tensor& out, const Tensor& lse) {
        const GilReleased release;
        reference::forward(q.view, k.view, v.view, span_of(cu_seqlens), options, out.view,
                           lse.view);
      },
      nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("cu_seqlens"), nb::arg("options"),
      nb::arg("out"), nb::arg("lse"));
  module.def(
      "reference_backward",
      [](const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
         const IndexInput& cu_seqlens, const AttentionOptions& options, const Tensor& dq,
         const Tensor& dk, const Tensor& dv) {
        const GilReleased release;
        reference::backward(dout.view, q.view, k.view, v.view, span_of(cu_seqlens), options,
                            dq.view, dk.view, dv.view);
      },
      nb::arg("dout"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("cu_seqlens"),
      nb::arg("options"), nb::arg("dq"), nb::arg("dk"), nb::arg("dv"));
}

void bind_layout(nb::module_& module) {
  const auto kernels_argument = nb::arg("kernels").none() = nb::none();
  const auto stream_argument = nb::arg("stream") = 0;
  module.def(
      "shard",
      [](const Tensor& x, const Plan& plan, std::int64_t rank, const Tensor& out,
         const KernelsName& kernels, std::uintptr_t stream) {
        const GilReleased release;
        shard(x.view, plan, rank, out.view, operation(kernels, stream));
      },
      nb::arg("x"), nb::arg("plan"), nb::arg("rank"), nb::arg("out"), kernels_argument,
      stream_argument);
  module.def(
      "unshard",
      [](const std::vector<Tensor>& parts, const Plan& plan, const Tensor& out,
         const KernelsName& kernels, std::uintptr_t stream) {
        std::vector<TensorView> views;
        views.reserve(parts.size());
        for (const Tensor& part : parts) {
          views.push_back(part.view);
        }
        const GilReleased release;
        unshard(views, plan, out.view, operation(kernels, stream));
      },
      nb::arg("parts"), nb::arg("plan"), nb::arg("out"), kernels_argument, stream_argument);
  module.def(
      "unshard_rank",
      [](const Tensor& part, const Plan& plan, std::int64_t rank, const Tensor& out,
         const KernelsName& kernels, std::uintptr_t stream) {
        const GilReleased release;
        unshard_rank(part.view, plan, rank, out.view, operation(kernels, stream));
      },
      nb::arg("part"), nb::arg("plan"), nb::arg("rank"), nb::arg("out"), kernels_argument,
      stream_argument);
  module.def(
      "extract",
      [](const Tensor& gathered, const Plan& plan, const IndexInput& prefix_chunks,
         const Tensor& out, const KernelsName& kernels, std::uintptr_t stream) {
        const GilReleased release;
        extract(gathered.view, plan, span_of(prefix_chunks), out.view, operation(kernels, stream));
      },
      nb::arg("gathered"), nb::arg("plan"), nb::arg("prefix_chunks"), nb::arg("out"),
      kernels_argument, stream_argument);
  module.def(
      "extracted_tokens",
      [](const Plan& plan, const IndexInput& prefix_chunks) {
        return extracted_tokens(plan, span_of(prefix_chunks));
      },
      nb::arg("plan"), nb::arg("prefix_chunks"));
  module.def(
      "scatter",
      [](const Tensor& grad, const Plan& plan, std::int64_t rank, const Tensor& out,
         const KernelsName& kernels, std::uintptr_t stream) {
        const GilReleased release;
        scatter(grad.view, plan, rank, out.view, operation(kernels, stream));
      },
      nb::arg("grad"), nb::arg("plan"), nb::arg("rank"), nb::arg("out"), kernels_argument,
      stream_argument);
}

}  // namespace

void bind_operations(nb::module_& module) {
  module.def(
      "set_default_kernels", [](const KernelsName& name) { set_default_kernels(to_kernels(name)); },
      nb::arg("name").none());
  module.def("default_kernels", [] { return std::string(kernels_name(default_kernels())); });
  module.def("num_threads", &num_threads);
  bind_attention(module);
  bind_layout(module);
}

}  // namespace zigzag::python
