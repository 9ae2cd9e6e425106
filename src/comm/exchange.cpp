#include "comm/exchange.h"

#include <string>
#include <string_view>

#include <fmt/format.h>

#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

void check_table(std::size_t inputs, std::size_t outputs, const ExchangeTable& table, int rank,
                 int size) {
  const auto ranks = static_cast<std::size_t>(size);
  if (table.receives.size() != ranks || table.sends.size() != ranks) {
    throw InvalidArgument(
        fmt::format("rank {}: the exchange table is of {} ranks; the group has {}", rank,
                    table.receives.size(), size));
  }
  if (inputs != outputs) {
    throw InvalidArgument(fmt::format("rank {}: an exchange was given {} inputs and {} outputs",
                                      rank, inputs, outputs));
  }
}

void check_rows(const TensorView& view, std::int64_t rows, std::string_view what, int rank) {
  if (view.shape.empty() || view.shape[0] != rows) {
    throw InvalidArgument(fmt::format("rank {}: {} has shape {}; it must have {} rows", rank, what,
                                      shape_text(view.shape), rows));
  }
}

}  // namespace

void check_gather(std::span<const TensorView> sources, std::span<const TensorView> destinations,
                  const ExchangeTable& table, int rank, int size) {
  check_table(sources.size(), destinations.size(), table, rank, size);
  for (std::size_t i = 0; i < sources.size(); ++i) {
    check_rows(sources[i], table.local_tokens, "a source of a gather", rank);
    check_rows(destinations[i], table.gathered_tokens, "a destination of a gather", rank);
    if (sources[i].dtype != destinations[i].dtype ||
        sources[i].row_elements() != destinations[i].row_elements()) {
      throw InvalidArgument(
          fmt::format("rank {}: a gather from {} {} into {} {}; type and row must be equal", rank,
                      dtype_name(sources[i].dtype), shape_text(sources[i].shape),
                      dtype_name(destinations[i].dtype), shape_text(destinations[i].shape)));
    }
  }
}

void check_reduce(std::span<const TensorView> partials, std::span<const TensorView> destinations,
                  const ExchangeTable& table, int rank, int size) {
  check_table(partials.size(), destinations.size(), table, rank, size);
  for (std::size_t i = 0; i < partials.size(); ++i) {
    check_rows(partials[i], table.gathered_tokens, "a partial of a reduction", rank);
    check_rows(destinations[i], table.local_tokens, "a destination of a reduction", rank);
    if (partials[i].dtype != DType::kFloat32 || !partials[i].is_contiguous()) {
      throw InvalidArgument(
          fmt::format("rank {}: a partial of a reduction is {} {}; it must be float32 without gaps",
                      rank, dtype_name(partials[i].dtype), shape_text(partials[i].shape)));
    }
    if (!is_attention_dtype(destinations[i].dtype) ||
        partials[i].row_elements() != destinations[i].row_elements()) {
      throw InvalidArgument(fmt::format(
          "rank {}: a reduction of {} into {} {}; rows must be equal and the type float32, float16 "
          "or bfloat16",
          rank, shape_text(partials[i].shape), dtype_name(destinations[i].dtype),
          shape_text(destinations[i].shape)));
    }
  }
}

std::vector<RowView> row_views(std::span<const TensorView> views) {
  std::vector<RowView> result;
  result.reserve(views.size());
  for (const TensorView& view : views) result.emplace_back(view);
  return result;
}

void gather_own(std::span<const TensorView> sources, std::span<const TensorView> destinations,
                const ExchangeTable& table, int rank) {
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const RowView from(sources[i]);
    const RowView to(destinations[i]);
    for (const Segment& s : table.receives[static_cast<std::size_t>(rank)]) {
      copy_rows(to, s.destination_row, from, s.source_row, s.rows);
    }
  }
}

}  // namespace zigzag::comm
