#include "zigzag/attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "attention_check.h"
#include "cpu/parallel.h"
#include "half.h"
#include "reference/clones.h"

namespace zigzag::reference {

namespace {

using std::int64_t;

/// Query rows whose probabilities the backward keeps at a time, so that memory is linear in tokens.
constexpr int64_t kBackwardRows = 64;

/// Query rows of one forward task, which share its scratch.
constexpr int64_t kRowsAtATime = 32;

constexpr double kEmptyLse = -std::numeric_limits<double>::infinity();

double load(const TensorView& x, int64_t offset) {
  switch (x.dtype) {
    case DType::kFloat32:
      return static_cast<double>(x.as<float>()[offset]);
    case DType::kFloat16:
      return static_cast<double>(from_float16(x.as<std::uint16_t>()[offset]));
    default:
      return static_cast<double>(from_bfloat16(x.as<std::uint16_t>()[offset]));
  }
}

/// Rows [begin, begin + rows) of one head in float64, row-major [rows, head_dim].
std::vector<double> load_head(const TensorView& x, int64_t begin, int64_t rows, int64_t head) {
  const int64_t dim = x.shape[2];
  std::vector<double> result(static_cast<std::size_t>(rows * dim));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < dim; ++c) {
      result[static_cast<std::size_t>(i * dim + c)] =
          load(x, (begin + i) * x.strides[0] + head * x.strides[1] + c * x.strides[2]);
    }
  }
  return result;
}

ZIGZAG_CLONES double dot(const double* a, const double* b, int64_t n) {
  // Eight partial sums, so that the order of additions is the same with and without SIMD.
  std::array<double, 8> sums{};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (std::size_t j = 0; j < 8; ++j)
      sums[j] += a[i + static_cast<int64_t>(j)] * b[i + static_cast<int64_t>(j)];
  }
  double total = 0;
  for (; i < n; ++i) total += a[i] * b[i];
  for (const double sum : sums) total += sum;
  return total;
}

ZIGZAG_CLONES void add_scaled(double* y, double factor, const double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

/// A score and the derivative of the capped score with respect to the plain one.
struct Score {
  double value;
  double slope;
};

struct Problem {
  Mask mask;
  double scale;
  double softcap;

  Score score(double product) const {
    const double plain = product * scale;
    if (softcap == 0) return {plain, 1};
    const double bounded = std::tanh(plain / softcap);
    return {softcap * bounded, 1 - bounded * bounded};
  }
};

/// One head of one document.
struct Head {
  int64_t length;
  int64_t dim;
  std::vector<double> q, k, v;  // [length, dim]

  const double* query(int64_t i) const { return q.data() + i * dim; }
  const double* key(int64_t j) const { return k.data() + j * dim; }
  const double* value(int64_t j) const { return v.data() + j * dim; }
};

/// Softmax of query i over its keys: writes out [dim] and, for the keys it sees, the
/// probabilities and the slopes of the capped scores [length]; returns lse.
double attend_row(const Head& head, const Problem& problem, int64_t i, double* out,
                  double* probabilities, double* slopes) {
  const int64_t first = problem.mask.first_key(i);
  const int64_t end = problem.mask.end_key(i, head.length);
  std::fill(out, out + head.dim, 0.0);
  double most = kEmptyLse;
  bool has_nan = false;
  for (int64_t j = first; j < end; ++j) {
    const Score s = problem.score(dot(head.query(i), head.key(j), head.dim));
    probabilities[j] = s.value;
    slopes[j] = s.slope;
    most = std::max(most, s.value);
    has_nan = has_nan || std::isnan(s.value);
  }
  if (has_nan) most = std::numeric_limits<double>::quiet_NaN();
  // No key, or all scores -inf: nothing is visible, and -inf - -inf would be NaN.
  if (most == kEmptyLse) {
    std::fill(probabilities + first, probabilities + std::max(first, end), 0.0);
    return kEmptyLse;
  }
  double sum = 0;
  for (int64_t j = first; j < end; ++j) {
    probabilities[j] = std::exp(probabilities[j] - most);
    sum += probabilities[j];
    add_scaled(out, probabilities[j], head.value(j), head.dim);
  }
  for (int64_t j = first; j < end; ++j) probabilities[j] /= sum;
  for (int64_t c = 0; c < head.dim; ++c) out[c] /= sum;
  return most + std::log(sum);
}

Problem problem_of(const AttentionOptions& options, int64_t head_dim) {
  return {options.mask,
          options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))),
          options.softcap};
}

Head load_document(const TensorView& q, const TensorView& k, const TensorView& v, int64_t begin,
                   int64_t length, int64_t head) {
  const int64_t kv_head = head / (q.shape[1] / std::max<int64_t>(1, k.shape[1]));
  return {length, q.shape[2], load_head(q, begin, length, head),
          load_head(k, begin, length, kv_head), load_head(v, begin, length, kv_head)};
}

void store_row(const TensorView& x, int64_t row, int64_t head, const double* values) {
  for (int64_t c = 0; c < x.shape[2]; ++c) {
    x.as<double>()[row * x.strides[0] + head * x.strides[1] + c * x.strides[2]] = values[c];
  }
}

}  // namespace

void forward(const TensorView& q, const TensorView& k, const TensorView& v,
             std::span<const int64_t> cu_seqlens, const AttentionOptions& options,
             const TensorView& out, const TensorView& lse) {
  check_reference_forward(q, k, v, cu_seqlens, options, out, lse);
  const Problem problem = problem_of(options, q.shape[2]);
  for (std::size_t d = 0; d + 1 < cu_seqlens.size(); ++d) {
    const int64_t begin = cu_seqlens[d];
    const int64_t length = cu_seqlens[d + 1] - begin;
    for (int64_t h = 0; h < q.shape[1] && length > 0; ++h) {
      const Head head = load_document(q, k, v, begin, length, h);
      cpu::parallel_ranges(length, kRowsAtATime, [&](int64_t first, int64_t last) {
        std::vector<double> row(static_cast<std::size_t>(head.dim));
        std::vector<double> scratch(static_cast<std::size_t>(2 * length));
        for (int64_t i = first; i < last; ++i) {
          lse.as<double>()[(begin + i) * lse.strides[0] + h * lse.strides[1]] =
              attend_row(head, problem, i, row.data(), scratch.data(), scratch.data() + length);
          store_row(out, begin + i, h, row.data());
        }
      });
    }
  }
}

void backward(const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
              std::span<const int64_t> cu_seqlens, const AttentionOptions& options,
              const TensorView& dq, const TensorView& dk, const TensorView& dv) {
  check_reference_backward(dout, q, k, v, cu_seqlens, options, dq, dk, dv);
  const Problem problem = problem_of(options, q.shape[2]);
  const int64_t dim = q.shape[2];
  const int64_t group = q.shape[1] / std::max<int64_t>(1, k.shape[1]);
  for (std::size_t d = 0; d + 1 < cu_seqlens.size(); ++d) {
    const int64_t begin = cu_seqlens[d];
    const int64_t length = cu_seqlens[d + 1] - begin;
    if (length == 0) continue;
    const auto size = static_cast<std::size_t>(length * dim);
    for (int64_t kv = 0; kv < k.shape[1]; ++kv) {
      std::vector<double> key_grad(size);
      std::vector<double> value_grad(size);
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        const Head head = load_document(q, k, v, begin, length, h);
        const std::vector<double> grad = load_head(dout, begin, length, h);
        // P and dS of some query rows at a time: rows in parallel first, for dq, then keys in
        // parallel, for dk and dv, so that no two threads write one element.
        const int64_t block = std::min(length, kBackwardRows);
        std::vector<double> p(static_cast<std::size_t>(block * length));
        std::vector<double> ds(static_cast<std::size_t>(block * length));
        for (int64_t top = 0; top < length; top += block) {
          const int64_t bottom = std::min(length, top + block);
          cpu::parallel_for(bottom - top, [&](int64_t r) {
            const int64_t i = top + r;
            const double* dout_row = grad.data() + i * dim;
            std::vector<double> row(static_cast<std::size_t>(dim));
            double* p_row = p.data() + r * length;
            double* ds_row = ds.data() + r * length;
            attend_row(head, problem, i, row.data(), p_row, ds_row);
            const double delta = dot(dout_row, row.data(), dim);
            std::fill(row.begin(), row.end(), 0.0);
            const int64_t end = problem.mask.end_key(i, length);
            for (int64_t j = problem.mask.first_key(i); j < end; ++j) {
              const double dp = dot(dout_row, head.value(j), dim);
              ds_row[j] *= p_row[j] * (dp - delta) * problem.scale;
              add_scaled(row.data(), ds_row[j], head.key(j), dim);
            }
            store_row(dq, begin + i, h, row.data());
          });
          cpu::parallel_for(length, [&](int64_t j) {
            for (int64_t i = top; i < bottom; ++i) {
              if (j < problem.mask.first_key(i) || j >= problem.mask.end_key(i, length)) continue;
              const int64_t at = (i - top) * length + j;
              add_scaled(value_grad.data() + j * dim, p[static_cast<std::size_t>(at)],
                         grad.data() + i * dim, dim);
              add_scaled(key_grad.data() + j * dim, ds[static_cast<std::size_t>(at)], head.query(i),
                         dim);
            }
          });
        }
      }
      for (int64_t j = 0; j < length; ++j) {
        store_row(dk, begin + j, kv, key_grad.data() + j * dim);
        store_row(dv, begin + j, kv, value_grad.data() + j * dim);
      }
    }
  }
}

}  // namespace zigzag::reference
