// Compiled once for each engine of bfloat16 products; see bf16_pack-inl.h.

/// The bits of vectors of bfloat16, whose types compilers do not convert.
inline __m512i bits_of(__m512bh x) {
  __m512i bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline __m256i bits_of(__m256bh x) {
  __m256i bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline __m512bh pairs_of(__m512i bits) {
  __m512bh x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
