#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/cpu_backend.h"
#include "cpu/parallel.h"
#include "half.h"

namespace zigzag::cpu {
namespace {

double load(const TensorView& x, std::int64_t row, std::int64_t head, std::int64_t column) {
  const std::int64_t at = row * x.strides[0] + head * x.strides[1] + column;
  switch (x.dtype) {
    case DType::kFloat16:
      return from_float16(x.as<std::uint16_t>()[at]);
    case DType::kBFloat16:
      return from_bfloat16(x.as<std::uint16_t>()[at]);
    default:
      return x.as<float>()[at];
  }
}

void store(const TensorView& x, std::int64_t row, std::int64_t head, std::int64_t column,
           double value) {
  const std::int64_t at = row * x.strides[0] + head * x.strides[1] + column;
  const auto rounded = static_cast<float>(value);
  switch (x.dtype) {
    case DType::kFloat16:
      x.as<std::uint16_t>()[at] = to_float16(rounded);
      break;
    case DType::kBFloat16:
      x.as<std::uint16_t>()[at] = to_bfloat16(rounded);
      break;
    default:
      x.as<float>()[at] = rounded;
  }
}

// A query row of an item: the gathered key rows [begin, end) that it sees.
struct Row {
  std::int64_t q;
  std::int64_t begin;
  std::int64_t end;
};

Row row_of(const AttendArgs& args, const WorkItem& item, std::int64_t i) {
  const std::int64_t position = item.q_position + i;
  const std::int64_t to_row = item.k_begin - item.k_position;
  const std::int64_t end = item.k_begin + item.k_count;
  return {
      item.q_begin + i, std::clamp(args.mask.first_key(position) + to_row, item.k_begin, end),
      std::clamp(args.mask.end_key(position, item.document_length) + to_row, item.k_begin, end)};
}

struct Score {
  double value;
  double slope;  // of the softcap: d(value) / d(scale * q.k)
};

Score score(const AttendArgs& args, std::int64_t q, std::int64_t head, std::int64_t k,
            std::int64_t kv_head) {
  double product = 0;
  for (std::int64_t c = 0; c < args.q.shape[2]; ++c) {
    product += load(args.q, q, head, c) * load(args.k, k, kv_head, c);
  }
  product *= args.scale;
  if (args.softcap == 0) return {product, 1};
  const double tangent = std::tanh(product / args.softcap);
  return {args.softcap * tangent, 1 - tangent * tangent};
}

void attend_row(const AttendArgs& args, const Row& row, std::int64_t head, std::int64_t kv_head) {
  std::vector<double> weights;
  double max = -std::numeric_limits<double>::infinity();
  for (std::int64_t k = row.begin; k < row.end; ++k) {
    weights.push_back(score(args, row.q, head, k, kv_head).value);
    max = std::max(max, weights.back());
  }
  // A row that sees no score but -inf is empty, and -inf - -inf would be NaN.
  const bool is_empty = std::all_of(weights.begin(), weights.end(), [](double weight) {
    return weight == -std::numeric_limits<double>::infinity();
  });
  double sum = 0;
  for (double& weight : weights) sum += weight = is_empty ? 0 : std::exp(weight - max);
  for (std::int64_t c = 0; c < args.q.shape[2]; ++c) {
    double out = 0;
    for (std::int64_t k = row.begin; k < row.end; ++k) {
      out += weights[k - row.begin] * load(args.v, k, kv_head, c);
    }
    store(args.out, row.q, head, c, is_empty ? 0 : out / sum);
  }
  const double lse = is_empty ? max : max + std::log(sum);
  args.lse.as<float>()[row.q * args.lse.strides[0] + head * args.lse.strides[1]] =
      static_cast<float>(lse);
}

// dq of a row, and its additions to dk and dv [gathered_tokens, head_dim] of its KV head.
void backward_row(const AttendBackwardArgs& args, const Row& row, std::int64_t head,
                  std::int64_t kv_head, std::vector<double>& dk, std::vector<double>& dv) {
  const std::int64_t head_dim = args.q.shape[2];
  const double lse = args.lse.as<float>()[row.q * args.lse.strides[0] + head * args.lse.strides[1]];
  const bool is_empty = lse == -std::numeric_limits<double>::infinity();
  double delta = 0;
  for (std::int64_t c = 0; c < head_dim; ++c) {
    delta += load(args.dout, row.q, head, c) * load(args.out, row.q, head, c);
  }
  std::vector<double> dq(static_cast<std::size_t>(head_dim));
  for (std::int64_t k = row.begin; k < row.end; ++k) {
    const Score s = score(args, row.q, head, k, kv_head);
    const double weight = is_empty ? 0 : std::exp(s.value - lse);
    double dweight = 0;
    for (std::int64_t c = 0; c < head_dim; ++c) {
      dweight += load(args.dout, row.q, head, c) * load(args.v, k, kv_head, c);
    }
    const double dproduct = weight * (dweight - delta) * s.slope * args.scale;
    for (std::int64_t c = 0; c < head_dim; ++c) {
      dv[k * head_dim + c] += weight * load(args.dout, row.q, head, c);
      dk[k * head_dim + c] += dproduct * load(args.q, row.q, head, c);
      dq[c] += dproduct * load(args.k, k, kv_head, c);
    }
  }
  for (std::int64_t c = 0; c < head_dim; ++c) store(args.dq, row.q, head, c, dq[c]);
}

}  // namespace

void ReferenceBackend::attend(const AttendArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  if (heads == 0) return;
  const std::int64_t group = heads / args.k.shape[1];
  for (const WorkItem& item : args.items) {
    parallel_for(item.q_count * heads, [&](std::int64_t i) {
      attend_row(args, row_of(args, item, i / heads), i % heads, i % heads / group);
    });
  }
}

void ReferenceBackend::attend_backward(const AttendBackwardArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  if (heads == 0) return;
  const std::int64_t group = heads / args.k.shape[1];
  const std::int64_t head_dim = args.q.shape[2];
  parallel_for(args.k.shape[1], [&](std::int64_t kv_head) {
    const auto elements = static_cast<std::size_t>(args.k.shape[0] * head_dim);
    std::vector<double> dk(elements);
    std::vector<double> dv(elements);
    for (const WorkItem& item : args.items) {
      for (std::int64_t i = 0; i < item.q_count; ++i) {
        for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          backward_row(args, row_of(args, item, i), head, kv_head, dk, dv);
        }
      }
    }
    for (std::int64_t k = 0; k < args.k.shape[0]; ++k) {
      for (std::int64_t c = 0; c < head_dim; ++c) {
        store(args.dk, k, kv_head, c, dk[k * head_dim + c]);
        store(args.dv, k, kv_head, c, dv[k * head_dim + c]);
      }
    }
  });
}

}  // namespace zigzag::cpu
