// Compiled once for each engine of bfloat16 products, inside its target's pragmas and namespace:
// amx_kernels.cpp and avx512_bf16_kernels.cpp include it in this order: bf16_pack, bf16_forward,
// bf16_backward. No include guard and no include: the includer has made both.

/// Keys and lanes come in units of 32, the depth of one product step; head_dim is padded alike.
inline constexpr int kUnit = 32;
inline constexpr int kBf16PanelLanes = 64;

/// Keys of a block in the forward and in the backward. Long blocks load and store the tiles of
/// `out` less often; the backward keeps three products of a block besides.
inline constexpr int kForwardKeys = 256;
inline constexpr int kBlockKeys = 128;
/// Lanes of a panel in the backward: sums of dk and dv are loaded and stored once a panel.
inline constexpr int kBackwardLanes = 128;
using PanelMask = LaneMask<kBackwardLanes>;

inline std::int64_t pad(std::int64_t count) { return (count + kUnit - 1) / kUnit * kUnit; }

inline int next_width(std::int64_t lanes) { return lanes > kUnit ? kBf16PanelLanes : kUnit; }

inline int backward_width(std::int64_t lanes) {
  return static_cast<int>(std::min<std::int64_t>(pad(lanes), kBackwardLanes));
}

inline constexpr double kExp2Error = 4e-6;
inline constexpr double kTanhError = 1e-5;

/// 2^x with a relative error below kExp2Error, far below bfloat16's rounding; -inf gives 0, NaN
/// stays. 2^x = 2^n 2^f with n the whole number below x.
inline __m512 exp2_bf16(__m512 x) {
  constexpr int kMinusFloor = 1;
  const __m512 f = _mm512_reduce_ps(x, kMinusFloor);
  __m512 p = _mm512_set1_ps(kExp2Degree4[4]);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2Degree4[3]));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2Degree4[2]));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2Degree4[1]));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2Degree4[0]));
  return _mm512_scalef_ps(p, x);
}

/// For a stretch of work: subnormal results are 0, as in the products of bfloat16 themselves, so
/// that tiny weights cost no more than others.
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040U); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

/// The hyperbolic tangent for the softcap, as in exp-inl.h with this file's exp2.
inline __m512 tanh_bf16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 size = _mm512_abs_ps(x);
  const __m512 e = exp2_bf16(_mm512_mul_ps(size, _mm512_set1_ps(-2.885390082f)));
  const __m512 large = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
  const __m512 u = _mm512_mul_ps(x, x);
  __m512 p = _mm512_set1_ps(-0.0057170433f);
  p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(0.020650586f));
  p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(-0.053743497f));
  p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(0.13331491f));
  p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(-0.33333284f));
  const __m512 small = _mm512_fmadd_ps(_mm512_mul_ps(size, u), p, size);
  const __mmask16 is_small = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.625f), _CMP_LT_OQ);
  const __m512 result = _mm512_mask_blend_ps(is_small, large, small);
  return _mm512_or_ps(result, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
}

inline void exp2_array(const float* x, float* y, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) y[i] = _mm512_cvtss_f32(exp2_bf16(_mm512_set1_ps(x[i])));
}

inline void tanh_array(const float* x, float* y, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) y[i] = _mm512_cvtss_f32(tanh_bf16(_mm512_set1_ps(x[i])));
}

/// Sixteen vectors of 16 words become their columns.
inline void transpose_words(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Layouts. A product takes rows (keys or columns) from blocks of 16 rows by 64 bytes, as
// [row / 16][step][16][64 bytes], a step being 32 bfloat16 of depth; and lanes (lanes, or columns
// of dk and dv) 16 at a time, as [lane / 16][depth pair][16 words]. Its sums are [lane /
// 16][row][16 floats]. So every tile of registers is 1024 bytes without gaps.
inline constexpr std::int64_t kTileBytes = 1024;
inline constexpr std::int64_t kTileWords = 256;

/// Transposes blocks of 16 x 16 words of a [rows, columns] matrix; the block of rows r and columns
/// c goes to `to` + at(r, c).
template <typename At>
inline void transpose_words(const std::uint32_t* from, std::int64_t rows, std::int64_t columns,
                            std::int64_t stride, std::uint32_t* to, const At& at) {
  __m512i block[16];
  for (std::int64_t r = 0; r < rows; r += 16) {
    for (std::int64_t c = 0; c < columns; c += 16) {
      for (int i = 0; i < 16; ++i) block[i] = _mm512_loadu_si512(from + (r + i) * stride + c);
      transpose_words(block);
      std::uint32_t* out = to + at(r, c);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * 16, block[i]);
    }
  }
}

/// Rows [width, columns] of lanes to lanes of pairs of columns.
inline void lanes_of_rows(const std::uint16_t* rows, std::int64_t columns, int width,
                          std::uint32_t* to) {
  const std::int64_t pairs = columns / 2;
  transpose_words(reinterpret_cast<const std::uint32_t*>(rows), width, pairs, pairs, to,
                  [&](std::int64_t lane, std::int64_t pair) { return lane * pairs + pair * 16; });
}

/// Which of a vector's bfloat16 are neither inf nor NaN.
inline __mmask32 finite_mask(__m512i x) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpneq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
}

/// Columns [0, count) of `from` and zeros up to `columns`, 32 of them every `stride`; a null `from`
/// gives zeros. Returns whether all are finite.
inline bool copy_row(const std::byte* from, std::int64_t count, std::int64_t columns,
                     std::uint16_t* to, std::int64_t stride) {
  __mmask32 finite = ~__mmask32{0};
  const auto* source = reinterpret_cast<const std::uint16_t*>(from);
  if (source == nullptr) count = 0;
  for (std::int64_t c = 0; c < columns; c += 32) {
    const std::int64_t left = std::clamp<std::int64_t>(count - c, 0, 32);
    const auto mask = static_cast<__mmask32>((std::uint64_t{1} << left) - 1);
    const __m512i x =
        mask == 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, source + c);
    finite &= finite_mask(x);
    _mm512_storeu_si512(to + c / 32 * stride, x);
  }
  return finite == ~__mmask32{0};
}

/// Two rows of `columns` bfloat16 as words {low row's, high row's}, 16 of them every `stride`. With
/// `clean`, 0 stands for what is not finite.
inline void pair_rows(const std::uint16_t* low, const std::uint16_t* high, std::int64_t columns,
                      bool clean, std::uint32_t* to, std::int64_t stride) {
  for (std::int64_t c = 0; c < columns; c += 32) {
    __m512i a = _mm512_loadu_si512(low + c);
    __m512i b = _mm512_loadu_si512(high + c);
    if (clean) {
      a = _mm512_maskz_mov_epi16(finite_mask(a), a);
      b = _mm512_maskz_mov_epi16(finite_mask(b), b);
    }
    for (int half = 0; half < 2; ++half) {
      const __m256i a16 = half == 0 ? _mm512_castsi512_si256(a) : _mm512_extracti64x4_epi64(a, 1);
      const __m256i b16 = half == 0 ? _mm512_castsi512_si256(b) : _mm512_extracti64x4_epi64(b, 1);
      const __m512i pair = _mm512_or_si512(_mm512_cvtepu16_epi32(a16),
                                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(b16), 16));
      _mm512_storeu_si512(to + (c / 16 + half) * stride, pair);
    }
  }
}

/// The columns of a block [keys, columns] as rows of a product over keys [begin, end), through
/// `pairs` [keys / 2, columns].
inline void columns_of_block(const std::uint16_t* from, std::int64_t columns,
                             const BlockRange& range, std::int64_t keys, bool clean,
                             std::uint32_t* pairs, std::uint16_t* to) {
  for (std::int64_t key = range.begin; key < range.end; key += 2) {
    pair_rows(from + key * columns, from + (key + 1) * columns, columns, clean,
              pairs + key / 2 * columns, 16);
  }
  const std::int64_t first = range.begin / 2;
  transpose_words(pairs + first * columns, range.end / 2 - first, columns, columns,
                  reinterpret_cast<std::uint32_t*>(to),
                  [&](std::int64_t pair, std::int64_t column) {
                    return column * (keys / 2) + (first + pair) * 16;
                  });
}

/// The rows of a panel's lanes, [width, columns] bfloat16, while those of `ahead` are called.
/// Returns whether all are finite.
inline bool copy_lanes(const Problem& problem, const TensorRows& x, const RowGroup& group,
                       const Panel& panel, std::int64_t columns, LanesAhead ahead,
                       std::uint16_t* to) {
  bool finite = true;
  LaneCursor lanes(problem, x, group, panel.lane_begin);
  for (int l = 0; l < panel.width; ++l) {
    const std::byte* row = l < panel.lanes ? lanes.at(l) : nullptr;
    ahead.step();
    finite &= copy_row(row, problem.head_dim, columns, to + l * columns, 32);
  }
  return finite;
}

/// Keys of a block of k or v, [keys, columns]. Returns whether all are finite.
inline bool copy_block(const TensorRows& x, const RowGroup& group, const KeyBlock& block,
                       const BlockRange& range, std::int64_t head_dim, std::int64_t columns,
                       std::uint16_t* to) {
  bool finite = true;
  KeyCursor keys(x, group, block);
  for (int key = range.begin; key < range.end; ++key) {
    finite &= copy_row(keys.row(key), head_dim, columns, to + key * columns, 32);
  }
  return finite;
}

/// Keys of a block of k or v as rows of a product.
inline void rows_of_block(const TensorRows& x, const RowGroup& group, const KeyBlock& block,
                          const BlockRange& range, std::int64_t head_dim, std::int64_t columns,
                          std::uint16_t* to) {
  KeyCursor keys(x, group, block);
  for (int key = range.begin; key < range.end; ++key) {
    copy_row(keys.row(key), head_dim, columns, to + key / 16 * 16 * columns + key % 16 * 32, 512);
  }
}

/// Changes the sign of rows when the scale is negative (so that scores only grow with products) or
/// makes them 0 when it is 0.
inline void sign_rows(float scale, std::int64_t count, std::uint16_t* rows) {
  if (scale > 0) return;
  for (std::int64_t c = 0; c < count; ++c) {
    // 0 times what is not finite is NaN.
    const bool finite = (rows[c] & 0x7f80) != 0x7f80;
    const std::uint16_t zero = finite ? 0 : 0x7fc0;
    rows[c] = scale == 0 ? zero : static_cast<std::uint16_t>(rows[c] ^ 0x8000);
  }
}

/// Two vectors of floats rounded to bfloat16: word l is {low's lane l, high's lane l}.
inline __m512i pair_lanes(__m512 low, __m512 high) {
  const __m512i order = _mm512_loadu_si512(kPairOrder);
  const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
  return _mm512_permutexvar_epi16(order, bits_of(both));
}

/// Writes a panel's sums [lane / 16][column][16], each lane times scale[lane], as rows of bfloat16,
/// through `rows` [width, columns].
inline void store_panel(const Problem& problem, const TensorRows& x, const RowGroup& group,
                        const Panel& panel, const float* from, std::int64_t columns,
                        const float* scale, float* rows) {
  for (int lane = 0; lane < panel.width; lane += 16) {
    __m512i block[16];
    for (std::int64_t c = 0; c < columns; c += 16) {
      for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_loadu_si512(from + lane * columns + (c + i) * 16);
      }
      transpose_words(block);
      for (int i = 0; i < 16; ++i) {
        _mm512_storeu_si512(rows + (lane + i) * columns + c, block[i]);
      }
    }
  }
  LaneCursor lanes(problem, x, group, panel.lane_begin);
  for (int l = 0; l < panel.lanes; ++l) {
    auto* to = reinterpret_cast<std::uint16_t*>(lanes.at(l));
    const __m512 factor = _mm512_set1_ps(scale[l]);
    for (std::int64_t c = 0; c < problem.head_dim; c += 16) {
      const std::int64_t left = std::min<std::int64_t>(problem.head_dim - c, 16);
      const auto mask = static_cast<__mmask16>((1U << left) - 1);
      // Adding 0 makes -0 into 0, as in finish_forward.
      const __m512 value = _mm512_add_ps(
          _mm512_mul_ps(_mm512_loadu_ps(rows + l * columns + c), factor), _mm512_setzero_ps());
      _mm256_mask_storeu_epi16(to + c, mask, bits_of(_mm512_cvtneps_pbh(value)));
    }
  }
}
