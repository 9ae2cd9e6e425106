#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "zigzag/tensor.h"

namespace zigzag::io {

/// Which numbers of a seed: every stream is independent of the others.
enum class Stream : std::uint64_t { kQ = 1, kK, kV, kDOut, kEmbedding, kProjection };

/// Standard normal numbers, rounded to `dtype` (float32, float16 or bfloat16), for rows
/// [row_begin, row_begin + rows) of a tensor of `row_elements` a row -> out [rows, row_elements].
/// Element (row, column) depends on seed, stream, row and column alone: any rank draws its own
/// rows, with the same bits on every machine.
void fill_normal(std::uint64_t seed, Stream stream, std::int64_t row_begin, std::int64_t rows,
                 std::int64_t row_elements, DType dtype, void* out);

/// Sizes of the attention inputs that ByteModel makes.
struct ModelShape {
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
};

/// Makes q, k and v of byte tokens as the first layer of a byte-level model does: a seeded
/// embedding [256, 64], seeded projections, and on q and k rotary position embedding (base 10000,
/// pairs i and i + head_dim / 2) at the token's position inside its document.
class ByteModel {
 public:
  ByteModel(std::uint64_t seed, const ModelShape& shape);

  /// Rows of q, k or v (`stream`) of consecutive tokens of one document, the first of them at
  /// `position` in it -> out [tokens, heads or kv_heads, head_dim] of `dtype`.
  void fill(Stream stream, std::span<const std::uint8_t> tokens, std::int64_t position, DType dtype,
            void* out) const;

 private:
  const std::vector<float>& table(Stream stream) const;

  ModelShape shape_;
  std::vector<float> q_;             // [256, heads, head_dim]
  std::vector<float> k_;             // [256, kv_heads, head_dim]
  std::vector<float> v_;             // [256, kv_heads, head_dim]
  std::vector<double> frequencies_;  // [head_dim / 2] turns a token
};

}  // namespace zigzag::io
