#include "comm/sum.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "comm/rows.h"
#include "cpu/kernel.h"
#include "cpu/target.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

// Rows that are cut at the ends of segments together.
constexpr std::int64_t kBlockRows = 1024;

// A contribution's rows to local rows [begin, end).
struct Part {
  std::int64_t begin;
  std::int64_t end;
  const float* rows;
};

// Local rows [begin, end), to which the same terms contribute throughout.
void sum_terms(const TensorView& destination, const RowView& out, std::int64_t begin,
               std::int64_t end, std::vector<const float*> terms) {
  const std::int64_t width = destination.row_elements();
  cpu::RowSums sums;
  sums.terms = terms;
  sums.term_stride = width;
  sums.rows = end - begin;
  sums.columns = width / out.runs;
  sums.dtype = destination.dtype;
  sums.to_stride = out.row_stride;
  for (std::int64_t run = 0; run < out.runs; ++run) {
    sums.to = out.row(begin) + run * out.run_stride;
    cpu::sum_rows(cpu::selected_target(), sums);
    for (const float*& term : terms) term += sums.columns;
  }
}

}  // namespace

void sum_rows(const TensorView& destination, std::int64_t begin, std::int64_t end,
              std::span<const Contribution> contributions) {
  const DType dtype = destination.dtype;
  if (dtype != DType::kFloat32 && dtype != DType::kFloat16 && dtype != DType::kBFloat16) {
    throw InvalidArgument("gradients are float32, float16 or bfloat16; the destination is " +
                          std::string(dtype_name(dtype)));
  }
  const std::int64_t width = destination.row_elements();
  if (begin >= end || width == 0) return;
  const RowView out(destination);
  for (std::int64_t first = begin; first < end; first += kBlockRows) {
    const std::int64_t last = std::min(end, first + kBlockRows);
    std::vector<Part> parts;  // in the order of their addition
    std::vector<std::int64_t> cuts{first, last};
    for (const Contribution& from : contributions) {
      for_each_part(from.segments, first, last,
                    [&](std::int64_t local, std::int64_t row, std::int64_t rows) {
                      parts.push_back({local, local + rows, from.rows + row * width});
                      cuts.insert(cuts.end(), {local, local + rows});
                    });
    }
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
      std::vector<const float*> terms;
      for (const Part& part : parts) {
        if (part.begin <= cuts[i] && cuts[i] < part.end) {
          terms.push_back(part.rows + (cuts[i] - part.begin) * width);
        }
      }
      sum_terms(destination, out, cuts[i], cuts[i + 1], std::move(terms));
    }
  }
}

}  // namespace zigzag::comm
