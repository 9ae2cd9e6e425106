#include <span>
#include <tuple>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "tensor.h"

namespace zigzag::python {
namespace {

using Window = std::pair<std::int64_t, std::int64_t>;

Plan* make_plan(const IndexInput& cu_seqlens, std::int64_t world_size) {
  return new Plan(std::span(cu_seqlens.data(), cu_seqlens.size()), world_size);
}

// [documents x 3]: begin, end and local row of one chunk of every document.
nb::ndarray<nb::numpy, std::int64_t, nb::ndim<2>> chunk_table(const Plan& plan,
                                                              std::int64_t index) {
  auto owned = std::make_unique<std::vector<std::int64_t>>();
  owned->reserve(static_cast<std::size_t>(plan.num_documents()) * 3);
  for (std::int64_t document = 0; document < plan.num_documents(); ++document) {
    const Chunk chunk = plan.chunk(document, index);
    owned->insert(owned->end(), {chunk.begin, chunk.end, chunk.local_row});
  }
  std::int64_t* const data = owned->data();
  nb::capsule owner(owned.release(), [](void* pointer) noexcept {
    delete static_cast<std::vector<std::int64_t>*>(pointer);
  });
  return {data, {static_cast<std::size_t>(plan.num_documents()), 3}, owner};
}

}  // namespace

void bind_plan(nb::module_& module) {
  const auto causal = nb::arg("causal") = true;
  const auto window = nb::arg("window") = Window(-1, -1);
  nb::class_<Plan>(module, "Plan", "The zigzag layout of one pack; zigzag_attention.Plan wraps it.")
      .def(nb::new_(&make_plan), nb::arg("cu_seqlens"), nb::arg("world_size"))
      .def_prop_ro("world_size", &Plan::world_size)
      .def_prop_ro("total_tokens", &Plan::total_tokens)
      .def_prop_ro("num_documents", &Plan::num_documents)
      .def_prop_ro("num_chunks", &Plan::num_chunks)
      .def_prop_ro(
          "cu_seqlens",
          [](const Plan& plan) {
            const auto values = plan.cu_seqlens();
            return to_array({values.begin(), values.end()});
          },
          nb::rv_policy::move)
      .def_prop_ro("fingerprint", &Plan::fingerprint)
      .def("document_length", &Plan::document_length, nb::arg("document"))
      .def(
          "chunk",
          [](const Plan& plan, std::int64_t document, std::int64_t index) {
            const Chunk chunk = plan.chunk(document, index);
            return std::tuple(chunk.begin, chunk.end, chunk.local_row);
          },
          nb::arg("document"), nb::arg("index"))
      .def("chunk_table", &chunk_table, nb::arg("index"))
      .def("chunk_indices", &Plan::chunk_indices, nb::arg("rank"))
      .def("chunk_owner", &Plan::chunk_owner, nb::arg("index"))
      .def("local_tokens", &Plan::local_tokens, nb::arg("rank"))
      .def(
          "local_cu_seqlens",
          [](const Plan& plan, std::int64_t rank) { return to_array(plan.local_cu_seqlens(rank)); },
          nb::arg("rank"))
      .def(
          "token_indices",
          [](const Plan& plan, std::int64_t rank) { return to_array(plan.token_indices(rank)); },
          nb::arg("rank"))
      .def(
          "position_ids",
          [](const Plan& plan, std::int64_t rank) { return to_array(plan.position_ids(rank)); },
          nb::arg("rank"))
      .def(
          "local_row",
          [](const Plan& plan, std::int64_t token) {
            const LocalRow place = plan.local_row(token);
            return std::pair(place.rank, place.row);
          },
          nb::arg("token"))
      .def(
          "gathered_tokens",
          [](const Plan& plan, std::int64_t rank, bool is_causal, Window sides) {
            return plan.gathered_tokens(rank, make_mask(is_causal, sides));
          },
          nb::arg("rank"), causal, window)
      .def(
          "flops",
          [](const Plan& plan, std::int64_t rank, std::int64_t heads, std::int64_t head_dim,
             bool is_causal, Window sides) {
            return plan.flops(rank, heads, head_dim, make_mask(is_causal, sides));
          },
          nb::arg("rank"), nb::arg("heads") = 1, nb::arg("head_dim") = 1, causal, window)
      .def(
          "balance",
          [](const Plan& plan, bool is_causal, Window sides) {
            return plan.balance(make_mask(is_causal, sides));
          },
          causal, window)
      .def(
          "gathered_bytes",
          [](const Plan& plan, std::int64_t rank, std::int64_t kv_heads, std::int64_t head_dim,
             std::int64_t itemsize, bool is_causal, Window sides) {
            return plan.gathered_bytes(rank, kv_heads, head_dim, itemsize,
                                       make_mask(is_causal, sides));
          },
          nb::arg("rank"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("itemsize"), causal,
          window);
}

}  // namespace zigzag::python
