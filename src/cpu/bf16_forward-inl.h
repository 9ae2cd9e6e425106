// Compiled once for each engine of bfloat16 products; see bf16_pack-inl.h.

/// A lane's largest score may grow by this much (log2) before its sums are scaled to it: weights
/// up to 2^8 lose nothing in bfloat16, and sums are hardly ever scaled after the first block.
inline constexpr float kStale = 8;

struct Bf16ForwardScratch {
  Bf16ForwardScratch(std::byte* memory, std::int64_t head_dim, std::int64_t lanes)
      : columns(pad(head_dim)) {
    Carver carver(memory);
    const std::int64_t width = pad(lanes);
    q = carver.take<std::uint32_t>(columns / 2 * width);
    out = carver.floats(columns * width);
    max = carver.floats(width);
    sum = carver.floats(width);
    k_rows = carver.take<std::uint16_t>(kForwardKeys * columns);
    v_columns = carver.take<std::uint16_t>(kForwardKeys * columns);
    block = carver.take<std::uint16_t>(kForwardKeys * columns);
    pairs = carver.take<std::uint32_t>(kForwardKeys / 2 * columns);
    scores = carver.floats(kUnit * kBf16PanelLanes);
    weights = carver.take<std::uint32_t>(kForwardKeys / 2 * kBf16PanelLanes);
    rows = carver.floats(kBf16PanelLanes * columns);
    bytes = carver.bytes();
  }
  // In the layouts of bf16_pack-inl.h unless a shape stands here.
  std::int64_t columns;      // head_dim, padded
  std::uint32_t* q;          // lanes of pairs of columns
  float* out;                // [lane / 16][column][16], not yet divided by the sums
  float* max;                // [lanes], as SoftmaxState in forward-inl.h, up to kStale behind
  float* sum;                // [lanes]
  std::uint16_t* k_rows;     // rows: keys by columns
  std::uint16_t* v_columns;  // rows: columns by keys, 0 for what is not finite
  std::uint16_t* block;      // [kForwardKeys, columns], of v when the panels are computed
  std::uint32_t* pairs;      // [kForwardKeys / 2, columns]
  float* scores;             // [lane / 16][32 keys][16]
  std::uint32_t* weights;    // lanes of pairs of keys
  float* rows;               // [kBf16PanelLanes, columns]
  std::size_t bytes;
};

/// Lanes of a vector that see a key.
inline __mmask16 sees_vector(const PanelMask& mask, int lane, int key) {
  const __m512 position = _mm512_set1_ps(static_cast<float>(key));
  const __mmask16 after =
      _mm512_cmp_ps_mask(position, _mm512_load_ps(mask.first + lane), _CMP_GE_OQ);
  return _mm512_mask_cmp_ps_mask(after, position, _mm512_load_ps(mask.end + lane), _CMP_LT_OQ);
}

/// The part of a block whose weights are there but not yet multiplied with its values, for each 32
/// lanes of a panel.
struct PendingKeys {
  int begin[kBf16PanelLanes / kUnit];
};

/// Adds the products of the weights from the pending ones to `end` with 32 columns of the block's
/// values, for 32 lanes. The order of additions is that of the keys, however they are cut.
inline void add_values(int half, std::int64_t c, int end, const PendingKeys& pending, float* out,
                       const Bf16ForwardScratch& scratch) {
  const int from = pending.begin[half / kUnit];
  if (from >= end) return;
  Engine::multiply(scratch.v_columns + c * kForwardKeys + from * 16, kForwardKeys * 32,
                   scratch.weights + half * kForwardKeys / 2 + from * 8, kForwardKeys * 32,
                   out + half * scratch.columns + c * 16, scratch.columns * 64,
                   (end - from) / kUnit, true);
}

/// Caps and masks a tile's scores of 16 lanes in place.
inline void adjust_scores(const Problem& problem, const PanelMask& mask, int lane, int key,
                          bool full, float* scores) {
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int i = 0; i < kUnit; ++i) {
    float* at = scores + i * 16;
    __m512 s = _mm512_load_ps(at);
    if (problem.cap != 0) {
      const __m512 scaled = _mm512_mul_ps(s, _mm512_set1_ps(std::fabs(problem.score_scale)));
      s = _mm512_mul_ps(tanh_bf16(scaled), _mm512_set1_ps(problem.cap));
    }
    if (!full) s = _mm512_mask_mov_ps(lowest, sees_vector(mask, lane, key + i), s);
    _mm512_store_ps(at, s);
  }
}

/// Takes the scores of 16 lanes over a tile of 32 keys into their softmax: masks them and, where
/// they outgrow the lane's max, raises it and scales what was summed with the old one.
inline void raise(const Problem& problem, const PanelMask& mask, const Panel& panel, int lane,
                  int key, bool full, float* scores, PendingKeys& pending, float* out,
                  const Bf16ForwardScratch& scratch) {
  const __m512 factor = _mm512_set1_ps(problem.log2_factor());
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  if (problem.cap != 0 || !full) {
    adjust_scores(problem, mask, lane, key, full, scores);
  }
  __m512 largest[4] = {lowest, lowest, lowest, lowest};
#pragma GCC unroll 8
  for (int i = 0; i < kUnit; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      largest[j] = _mm512_max_ps(largest[j], _mm512_load_ps(scores + (i + j) * 16));
    }
  }
  const __m512 most = _mm512_mul_ps(
      _mm512_max_ps(_mm512_max_ps(largest[0], largest[1]), _mm512_max_ps(largest[2], largest[3])),
      factor);
  float* max_at = scratch.max + panel.offset + lane;
  float* sum_at = scratch.sum + panel.offset + lane;
  const __m512 before = _mm512_load_ps(max_at);
  const __mmask16 moved =
      _mm512_cmp_ps_mask(most, _mm512_add_ps(before, _mm512_set1_ps(kStale)), _CMP_GT_OQ);
  if (moved == 0) return;
  _mm512_store_ps(max_at, _mm512_mask_mov_ps(before, moved, most));
  // Lanes that have seen nothing have sums of 0.
  if (_mm512_cmp_ps_mask(before, lowest, _CMP_NEQ_UQ) == 0) return;
  const __m512 shrink =
      _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), moved, exp2_bf16(_mm512_sub_ps(before, most)));
  _mm512_store_ps(sum_at, _mm512_mul_ps(_mm512_load_ps(sum_at), shrink));
  for (std::int64_t c = 0; c < scratch.columns; c += kUnit) {
    add_values(lane / kUnit * kUnit, c, key, pending, out, scratch);
  }
  pending.begin[lane / kUnit] = std::max(pending.begin[lane / kUnit], key);
  for (std::int64_t c = 0; c < scratch.columns; ++c) {
    float* at = out + lane * scratch.columns + c * 16;
    _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), shrink));
  }
}

/// The scores of 16 lanes over a tile of 32 keys become pairs of weights.
inline void weigh(const Problem& problem, const Panel& panel, int lane, int key,
                  const float* scores, const Bf16ForwardScratch& scratch) {
  const __m512 factor = _mm512_set1_ps(problem.log2_factor());
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  float* sum_at = scratch.sum + panel.offset + lane;
  const __m512 max = _mm512_load_ps(scratch.max + panel.offset + lane);
  const __m512 origin = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(max, lowest, _CMP_NEQ_UQ), max);
  __m512 even = _mm512_load_ps(sum_at);
  __m512 odd = _mm512_setzero_ps();
  std::uint32_t* weights = scratch.weights + lane * kForwardKeys / 2 + key * 8;
#pragma GCC unroll 4
  for (int i = 0; i < kUnit; i += 2) {
    const float* at = scores + i * 16;
    const __m512 low = exp2_bf16(_mm512_fmsub_ps(_mm512_load_ps(at), factor, origin));
    const __m512 high = exp2_bf16(_mm512_fmsub_ps(_mm512_load_ps(at + 16), factor, origin));
    even = _mm512_add_ps(even, low);
    odd = _mm512_add_ps(odd, high);
    _mm512_store_si512(weights + i * 8, pair_lanes(low, high));
  }
  _mm512_store_ps(sum_at, _mm512_add_ps(even, odd));
}

/// What is not finite reaches only lanes that see it, as in forward-inl.h.
inline void add_special(const Problem& problem, const PanelMask& mask, const Panel& panel,
                        const BlockRange& range, float* out, const Bf16ForwardScratch& scratch) {
  for (int key = range.begin; key < range.end; ++key) {
    for (std::int64_t c = 0; c < problem.head_dim; ++c) {
      const float value = from_bfloat16(scratch.block[key * scratch.columns + c]);
      if (std::isfinite(value)) continue;
      for (int l = 0; l < panel.lanes; ++l) {
        const std::int64_t tile = l / 16 * 16;
        const std::uint32_t pair = scratch.weights[tile * kForwardKeys / 2 + key / 2 * 16 + l % 16];
        const float weight = from_bfloat16(static_cast<std::uint16_t>(pair >> (key % 2 * 16)));
        if (mask.sees(l, key)) out[tile * scratch.columns + c * 16 + l % 16] += weight * value;
      }
    }
  }
}

/// One panel against one block of keys.
inline void forward_block(const Problem& problem, const RowGroup& group, const Panel& panel,
                          const KeyBlock& block, const BlockRange& range, bool finite,
                          Prefetcher& ahead, const Bf16ForwardScratch& scratch) {
  const std::int64_t columns = scratch.columns;
  const std::uint32_t* q = scratch.q + columns / 2 * panel.offset;
  float* out = scratch.out + columns * panel.offset;
  PanelMask mask;
  if (!range.full() || !finite) mask.set(problem, group, panel, block);
  PendingKeys pending{{range.begin, range.begin}};
  for (int key = range.begin; key < range.end; key += kUnit) {
    ahead.step();
    for (int half = 0; half < panel.width; half += kUnit) {
      Engine::multiply(scratch.k_rows + key * columns, columns * 32, q + half * columns / 2,
                       columns * 32, scratch.scores + half * kUnit, kUnit * 64, columns / kUnit,
                       false);
    }
    const bool full = range.full(key, kUnit);
    for (int lane = 0; lane < panel.width; lane += 16) {
      raise(problem, mask, panel, lane, key, full, scratch.scores + lane * kUnit, pending, out,
            scratch);
      weigh(problem, panel, lane, key, scratch.scores + lane * kUnit, scratch);
    }
  }
  // All lanes of a panel take a part of the values while it is near.
  for (std::int64_t c = 0; c < columns; c += kUnit) {
    for (int half = 0; half < panel.width; half += kUnit) {
      add_values(half, c, range.end, pending, out, scratch);
    }
  }
  if (!finite) add_special(problem, mask, panel, range, out, scratch);
}

inline void finish_forward(const Problem& problem, const RowGroup& group, const Panel& panel,
                           const Bf16ForwardScratch& scratch) {
  float* sums = scratch.sum + panel.offset;
  LaneCursor lse_rows(problem, problem.lse, group, panel.lane_begin);
  for (int l = 0; l < panel.lanes; ++l) {
    constexpr double kLn2 = 0.6931471805599453;
    const double lse = static_cast<double>(scratch.max[panel.offset + l]) * kLn2 +
                       std::log(static_cast<double>(sums[l]));
    *reinterpret_cast<float*>(lse_rows.at(l)) = static_cast<float>(lse);
    sums[l] = sums[l] == 0 ? 0 : 1 / sums[l];
  }
  store_panel(problem, problem.out, group, panel, scratch.out + scratch.columns * panel.offset,
              scratch.columns, sums, scratch.rows);
}

inline void forward_group(const Problem& problem, const RowGroup& group, std::byte* memory) {
  const Bf16ForwardScratch scratch(memory, problem.head_dim, group.width);
  const std::int64_t columns = scratch.columns;
  [[maybe_unused]] const Engine engine;
  const FlushSubnormals flush;
  const std::int64_t parts = panel_count(group, kBf16PanelLanes);
  Prefetcher first(problem, group, first_block(group.keys, kForwardKeys), parts);
  for_each_panel(problem, group, next_width, [&](const Panel& panel) {
    auto* rows = reinterpret_cast<std::uint16_t*>(scratch.rows);
    first.step();
    copy_lanes(problem, problem.q, group, panel, columns,
               {problem, problem.q, group, panel.lane_begin + panel.lanes}, rows);
    sign_rows(problem.score_scale, columns * panel.width, rows);
    lanes_of_rows(rows, columns, panel.width, scratch.q + columns / 2 * panel.offset);
    std::fill_n(scratch.out + columns * panel.offset, columns * panel.width, 0.0f);
    std::fill_n(scratch.max + panel.offset, panel.width, -std::numeric_limits<float>::infinity());
    std::fill_n(scratch.sum + panel.offset, panel.width, 0.0f);
  });
  const std::int64_t end = group.keys.end;
  for (KeyBlock block = first_block(group.keys, kForwardKeys); block.begin < end;
       block.begin += block.keys) {
    const BlockRange all = block_range(group.keys, group.keys, block, kUnit);
    rows_of_block(problem.k, group, block, all, problem.head_dim, columns, scratch.k_rows);
    const bool finite =
        copy_block(problem.v, group, block, all, problem.head_dim, columns, scratch.block);
    columns_of_block(scratch.block, columns, all, kForwardKeys, !finite, scratch.pairs,
                     scratch.v_columns);
    Prefetcher ahead(problem, group, {block.end(), block.keys},
                     parts * (all.end - all.begin) / kUnit);
    for_each_panel(problem, group, next_width, [&](const Panel& panel) {
      const BlockRange range = block_range(panel.first, panel.last, block, kUnit);
      if (!range.empty())
        forward_block(problem, group, panel, block, range, finite, ahead, scratch);
    });
    ahead.finish();
  }
  for_each_panel(problem, group, next_width,
                 [&](const Panel& panel) { finish_forward(problem, group, panel, scratch); });
}

inline std::size_t forward_scratch(std::int64_t head_dim, std::int64_t lanes) {
  return Bf16ForwardScratch(nullptr, head_dim, lanes).bytes;
}
