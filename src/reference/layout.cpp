#include "reference/layout.h"

#include <cstring>
#include <vector>

namespace zigzag::reference {

namespace {

using std::int64_t;

/// Copies the elements of one row, index by index.
void copy_row(const TensorView& source, int64_t source_row, const TensorView& destination,
              int64_t destination_row) {
  const int64_t item = item_size(source.dtype);
  for (int64_t element = 0; element < source.row_elements(); ++element) {
    int64_t from = source_row * source.strides[0];
    int64_t to = destination_row * destination.strides[0];
    int64_t rest = element;
    for (std::size_t d = source.shape.size(); d-- > 1;) {
      const int64_t index = rest % source.shape[d];
      rest /= source.shape[d];
      from += index * source.strides[d];
      to += index * destination.strides[d];
    }
    std::memcpy(destination.as<std::byte>() + to * item, source.as<std::byte>() + from * item,
                static_cast<std::size_t>(item));
  }
}

}  // namespace

void shard(const TensorView& x, const Plan& plan, int64_t rank, const TensorView& out) {
  for (int64_t row = 0; row < out.shape[0]; ++row) {
    copy_row(x, plan.global_token(rank, row), out, row);
  }
}

void unshard(std::span<const TensorView> parts, const Plan& plan, const TensorView& out) {
  for (int64_t token = 0; token < plan.total_tokens(); ++token) {
    const LocalRow place = plan.local_row(token);
    copy_row(parts[static_cast<std::size_t>(place.rank)], place.row, out, token);
  }
}

void unshard_rank(const TensorView& part, const Plan& plan, int64_t rank, const TensorView& out) {
  for (int64_t row = 0; row < part.shape[0]; ++row) {
    copy_row(part, row, out, plan.global_token(rank, row));
  }
}

void extract(const TensorView& gathered, const Plan& plan, std::span<const int64_t> prefix_chunks,
             const TensorView& out) {
  std::vector<int64_t> first_row(1, 0);
  for (int64_t r = 0; r < plan.world_size(); ++r) {
    first_row.push_back(first_row.back() + plan.local_tokens(r));
  }
  int64_t row = 0;
  for (int64_t d = 0; d < plan.num_documents(); ++d) {
    const int64_t chunks = prefix_chunks[static_cast<std::size_t>(d)];
    const int64_t prefix = chunks == 0 ? 0 : plan.chunk(d, chunks - 1).end;
    for (int64_t position = 0; position < prefix; ++position) {
      const int64_t token = plan.cu_seqlens()[static_cast<std::size_t>(d)] + position;
      const LocalRow place = plan.local_row(token);
      copy_row(gathered, first_row[static_cast<std::size_t>(place.rank)] + place.row, out, row++);
    }
  }
}

}  // namespace zigzag::reference
