#include "comm/sum.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "comm/rows.h"
#include "cpu/kernel.h"
#include "cpu/target.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

// Floats of the running sum: it stays in a core's nearest caches.
constexpr std::int64_t kBlockFloats = std::int64_t{8} << 10;

void add(float* __restrict sum, const float* __restrict values, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] += values[i];
}

void store(std::byte* to, DType dtype, const float* values, std::int64_t count) {
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(to, values, static_cast<std::size_t>(count) * sizeof(float));
      return;
    case DType::kFloat16:
    case DType::kBFloat16:
      return cpu::round_row(cpu::selected_target(), dtype, values, count, to);
    default:
      throw InvalidArgument("gradients are float32, float16 or bfloat16; the destination is " +
                            std::string(dtype_name(dtype)));
  }
}

}  // namespace

void sum_rows(const TensorView& destination, std::int64_t begin, std::int64_t end,
              std::span<const Contribution> contributions) {
  const std::int64_t width = destination.row_elements();
  if (begin >= end || width == 0) return;
  const RowView out(destination);
  const std::int64_t run_elements = width / out.runs;
  const std::int64_t block = std::max<std::int64_t>(1, kBlockFloats / width);
  std::vector<float> sum(static_cast<std::size_t>(block * width));
  for (std::int64_t first = begin; first < end; first += block) {
    const std::int64_t last = std::min(end, first + block);
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (const Contribution& part : contributions) {
      for_each_part(
          part.segments, first, last, [&](std::int64_t local, std::int64_t row, std::int64_t rows) {
            add(sum.data() + (local - first) * width, part.rows + row * width, rows * width);
          });
    }
    if (out.dense()) {
      store(out.row(first), destination.dtype, sum.data(), (last - first) * width);
      continue;
    }
    for (std::int64_t row = first; row < last; ++row) {
      for (std::int64_t run = 0; run < out.runs; ++run) {
        store(out.row(row) + run * out.run_stride, destination.dtype,
              sum.data() + (row - first) * width + run * run_elements, run_elements);
      }
    }
  }
}

}  // namespace zigzag::comm
