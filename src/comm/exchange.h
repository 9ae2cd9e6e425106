#pragma once

#include <span>
#include <vector>

#include "comm/rows.h"
#include "comm/transport.h"
#include "zigzag/tensor.h"

namespace zigzag::comm {

/// Throws InvalidArgument unless a gather's views fit each other and the table: as many sources as
/// destinations, of one type and row size, with local_tokens and gathered_tokens rows.
void check_gather(std::span<const TensorView> sources, std::span<const TensorView> destinations,
                  const ExchangeTable& table, int rank, int size);

/// The same for a reduction: float32 partials of gathered_tokens rows without gaps and
/// destinations of local_tokens rows of as many elements.
void check_reduce(std::span<const TensorView> partials, std::span<const TensorView> destinations,
                  const ExchangeTable& table, int rank, int size);

/// The views as rows. Throws InvalidArgument for device memory.
std::vector<RowView> row_views(std::span<const TensorView> views);

/// Copies this rank's own rows of a gather.
void gather_own(std::span<const TensorView> sources, std::span<const TensorView> destinations,
                const ExchangeTable& table, int rank);

}  // namespace zigzag::comm
