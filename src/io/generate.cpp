#include "io/generate.h"

#include <cmath>
#include <utility>

#include <fmt/format.h>

#include "half.h"
#include "io/deterministic_math.h"
#include "zigzag/error.h"

namespace zigzag::io {
namespace {

constexpr std::int64_t kBytes = 256;
constexpr std::int64_t kEmbedding = 64;

// The finaliser of splitmix64: a bijection that leaves no visible pattern in a counter.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Two independent normal numbers of one counter (Box and Muller).
std::pair<double, double> normal_pair(std::uint64_t counter) {
  const std::uint64_t bits = mix(counter);
  const double u = (static_cast<double>(bits >> 32) + 0.5) * 0x1p-32;
  const double turns = static_cast<double>(bits & 0xffffffffu) * 0x1p-32;
  const double radius = std::sqrt(-2 * portable_log(u));
  const auto [sine, cosine] = portable_sin_cos(turns);
  return {radius * cosine, radius * sine};
}

// Calls f(column, value) for the columns of one row.
template <typename F>
void for_normal_row(std::uint64_t stream_key, std::int64_t row, std::int64_t columns, F f) {
  const std::uint64_t row_key = mix(stream_key ^ mix(static_cast<std::uint64_t>(row)));
  for (std::int64_t c = 0; c < columns; c += 2) {
    const auto [a, b] = normal_pair(row_key + static_cast<std::uint64_t>(c));
    f(c, a);
    if (c + 1 < columns) f(c + 1, b);
  }
}

std::uint64_t key_of(std::uint64_t seed, Stream stream) {
  return mix(mix(seed) + static_cast<std::uint64_t>(stream));
}

// Calls f with a function that stores element i as `dtype`.
template <typename F>
void with_store(DType dtype, void* out, F f) {
  switch (dtype) {
    case DType::kFloat32:
      f([p = static_cast<float*>(out)](std::int64_t i, float x) { p[i] = x; });
      return;
    case DType::kFloat16:
      f([p = static_cast<std::uint16_t*>(out)](std::int64_t i, float x) { p[i] = to_float16(x); });
      return;
    case DType::kBFloat16:
      f([p = static_cast<std::uint16_t*>(out)](std::int64_t i, float x) { p[i] = to_bfloat16(x); });
      return;
    default:
      throw InvalidArgument(
          fmt::format("inputs cannot be drawn as {}; float32, float16 and bfloat16 are allowed",
                      dtype_name(dtype)));
  }
}

// embedding [256, 64] x projection [64, columns] -> [256, columns], about unit variance.
std::vector<float> project(std::uint64_t seed, Stream stream, std::int64_t columns,
                           const std::vector<double>& embedding) {
  const std::uint64_t key = key_of(key_of(seed, Stream::kProjection), stream);
  std::vector<double> sum(static_cast<std::size_t>(kBytes * columns), 0.0);
  std::vector<double> weights(static_cast<std::size_t>(columns));
  for (std::int64_t e = 0; e < kEmbedding; ++e) {
    for_normal_row(key, e, columns, [&](std::int64_t c, double x) {
      weights[static_cast<std::size_t>(c)] = x / 8;  // 8 = sqrt(kEmbedding)
    });
    for (std::int64_t byte = 0; byte < kBytes; ++byte) {
      const double x = embedding[static_cast<std::size_t>(byte * kEmbedding + e)];
      double* row = sum.data() + byte * columns;
      for (std::int64_t c = 0; c < columns; ++c) row[c] += x * weights[static_cast<std::size_t>(c)];
    }
  }
  return {sum.begin(), sum.end()};
}

}  // namespace

void fill_normal(std::uint64_t seed, Stream stream, std::int64_t row_begin, std::int64_t rows,
                 std::int64_t row_elements, DType dtype, void* out) {
  const std::uint64_t key = key_of(seed, stream);
  with_store(dtype, out, [&](auto store) {
    for (std::int64_t r = 0; r < rows; ++r) {
      for_normal_row(key, row_begin + r, row_elements, [&](std::int64_t c, double x) {
        store(r * row_elements + c, static_cast<float>(x));
      });
    }
  });
}

ByteModel::ByteModel(std::uint64_t seed, const ModelShape& shape) : shape_(shape) {
  std::vector<double> embedding(static_cast<std::size_t>(kBytes * kEmbedding));
  const std::uint64_t key = key_of(seed, Stream::kEmbedding);
  for (std::int64_t byte = 0; byte < kBytes; ++byte) {
    for_normal_row(key, byte, kEmbedding, [&](std::int64_t e, double x) {
      embedding[static_cast<std::size_t>(byte * kEmbedding + e)] = x;
    });
  }
  q_ = project(seed, Stream::kQ, shape.heads * shape.head_dim, embedding);
  k_ = project(seed, Stream::kK, shape.kv_heads * shape.head_dim, embedding);
  v_ = project(seed, Stream::kV, shape.kv_heads * shape.head_dim, embedding);
  const double log_base = portable_log(10000.0);
  const std::int64_t half = shape.head_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const double exponent = -static_cast<double>(i) / static_cast<double>(half) * log_base;
    frequencies_.push_back(portable_exp(exponent) / 6.283185307179586476925);
  }
}

const std::vector<float>& ByteModel::table(Stream stream) const {
  switch (stream) {
    case Stream::kQ:
      return q_;
    case Stream::kK:
      return k_;
    case Stream::kV:
      return v_;
    default:
      throw InvalidArgument("a byte model makes q, k and v only");
  }
}

void ByteModel::fill(Stream stream, std::span<const std::uint8_t> tokens, std::int64_t position,
                     DType dtype, void* out) const {
  const std::vector<float>& values = table(stream);
  const std::int64_t d = shape_.head_dim;
  const std::int64_t heads = stream == Stream::kQ ? shape_.heads : shape_.kv_heads;
  const std::int64_t half = d / 2;
  const bool rotate = stream != Stream::kV;
  std::vector<SinCos> turns(static_cast<std::size_t>(half));
  with_store(dtype, out, [&](auto store) {
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      const auto at = static_cast<double>(position + static_cast<std::int64_t>(t));
      const float* row = values.data() + tokens[t] * heads * d;
      const std::int64_t base = static_cast<std::int64_t>(t) * heads * d;
      if (!rotate) {
        for (std::int64_t i = 0; i < heads * d; ++i) store(base + i, row[i]);
        continue;
      }
      for (std::int64_t i = 0; i < half; ++i) {
        turns[static_cast<std::size_t>(i)] =
            portable_sin_cos(at * frequencies_[static_cast<std::size_t>(i)]);
      }
      for (std::int64_t h = 0; h < heads; ++h) {
        const float* head = row + h * d;
        const std::int64_t to = base + h * d;
        for (std::int64_t i = 0; i < half; ++i) {
          const auto [sine, cosine] = turns[static_cast<std::size_t>(i)];
          const double a = head[i];
          const double b = head[i + half];
          store(to + i, static_cast<float>(a * cosine - b * sine));
          store(to + i + half, static_cast<float>(b * cosine + a * sine));
        }
        for (std::int64_t i = 2 * half; i < d; ++i) store(to + i, head[i]);
      }
    }
  });
}

}  // namespace zigzag::io
