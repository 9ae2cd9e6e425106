#include <algorithm>

#include "cuda/sum_rows.h"

namespace zigzag::cuda {

SumTable make_sum_table(std::span<const SumPart> parts, std::int64_t sources,
                        std::int64_t destination_rows) {
  SumTable table;
  table.sources = sources;
  std::vector<std::int64_t>& begins = table.begins;
  begins.reserve(2 * parts.size() + 2);
  begins.push_back(0);
  begins.push_back(destination_rows);
  for (const SumPart& part : parts) {
    if (part.rows <= 0) continue;
    begins.push_back(part.begin);
    begins.push_back(part.begin + part.rows);
  }
  std::sort(begins.begin(), begins.end());
  begins.erase(std::unique(begins.begin(), begins.end()), begins.end());
  if (begins.size() < 2) begins.push_back(destination_rows);
  table.rows.assign(static_cast<std::size_t>(table.intervals() * sources), -1);
  for (const SumPart& part : parts) {
    if (part.rows <= 0) continue;
    auto at = std::lower_bound(begins.begin(), begins.end(), part.begin) - begins.begin();
    for (; begins[static_cast<std::size_t>(at)] < part.begin + part.rows; ++at) {
      table.rows[static_cast<std::size_t>(at * sources + part.source)] =
          part.source_row + begins[static_cast<std::size_t>(at)] - part.begin;
    }
  }
  return table;
}

}  // namespace zigzag::cuda
