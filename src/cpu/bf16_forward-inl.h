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
    k = carver.take<std::uint16_t>(kBlockKeys * columns);
    v = carver.take<std::uint16_t>(kBlockKeys * columns);
    v_columns = carver.take<std::uint16_t>(kBlockKeys * columns);
    pairs = carver.take<std::uint32_t>(kBlockKeys / 2 * columns);
    scores = carver.floats(kBlockKeys * kBf16PanelLanes);
    weights = carver.take<std::uint32_t>(kBlockKeys / 2 * kBf16PanelLanes);
    rows = carver.floats(kBf16PanelLanes * columns);
    bytes = carver.bytes();
  }
  std::int64_t columns;      // head_dim, padded
  std::uint32_t* q;          // panels of [columns / 2, width] pairs of columns
  float* out;                // panels of [columns, width], not yet divided by the sums
  float* max;                // [lanes], as SoftmaxState in forward-inl.h, up to kStale behind
  float* sum;                // [lanes]
  std::uint16_t* k;          // [kBlockKeys, columns]
  std::uint16_t* v;          // [kBlockKeys, columns]
  std::uint16_t* v_columns;  // [columns, kBlockKeys], 0 for what is not finite
  std::uint32_t* pairs;      // [kBlockKeys / 2, columns]
  float* scores;             // [kBlockKeys, width]
  std::uint32_t* weights;    // [kBlockKeys / 2, width] pairs of keys
  float* rows;               // [kBf16PanelLanes, columns]
  std::size_t bytes;
};

/// Products q.k of a panel and a block.
inline void multiply_rows(const std::uint16_t* rows, const std::uint32_t* lanes,
                          std::int64_t columns, int width, const BlockRange& range, float* to) {
  for (std::int64_t key = range.begin; key < range.end; key += kUnit) {
    for (int half = 0; half < width; half += kUnit) {
      Engine::multiply(rows + key * columns, columns * 2, lanes + half, width * 4,
                       to + key * width + half, width * 4, columns / kUnit, false);
    }
  }
}

/// Lanes of a vector that see a key.
inline __mmask16 sees_vector(const PanelMask& mask, int lane, int key) {
  const __m512 position = _mm512_set1_ps(static_cast<float>(key));
  const __mmask16 after = _mm512_cmp_ps_mask(position, _mm512_load_ps(mask.first + lane), _CMP_GE_OQ);
  return _mm512_mask_cmp_ps_mask(after, position, _mm512_load_ps(mask.end + lane), _CMP_LT_OQ);
}

/// Masks and caps scores in place where that is needed; returns the largest of 16 lanes.
inline __m512 largest_scores(const Problem& problem, const PanelMask& mask, int lane, int width,
                             const BlockRange& range, bool masked, float* scores) {
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 largest[4] = {lowest, lowest, lowest, lowest};
  for (int key = range.begin; key < range.end; key += 4) {
    for (int i = 0; i < 4; ++i) {
      float* at = scores + (key + i) * width + lane;
      __m512 s = _mm512_load_ps(at);
      if (problem.cap != 0 || masked) {
        if (problem.cap != 0) {
          const __m512 scaled = _mm512_mul_ps(s, _mm512_set1_ps(std::fabs(problem.score_scale)));
          s = _mm512_mul_ps(tanh_bf16(scaled), _mm512_set1_ps(problem.cap));
        }
        if (masked) s = _mm512_mask_mov_ps(lowest, sees_vector(mask, lane, key + i), s);
        _mm512_store_ps(at, s);
      }
      largest[i] = _mm512_max_ps(largest[i], s);
    }
  }
  return _mm512_max_ps(_mm512_max_ps(largest[0], largest[1]),
                       _mm512_max_ps(largest[2], largest[3]));
}

/// The softmax of 16 lanes of a panel over a block: scores become pairs of weights, and out's rows
/// are scaled when a lane's max moved.
inline void weigh(const Problem& problem, const PanelMask& mask, const Panel& panel, int lane,
                  const BlockRange& range, bool masked, float* out,
                  const Bf16ForwardScratch& scratch) {
  const int width = panel.width;
  const __m512 factor = _mm512_set1_ps(problem.log2_factor());
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  float* max_at = scratch.max + panel.offset + lane;
  float* sum_at = scratch.sum + panel.offset + lane;
  const __m512 largest = _mm512_mul_ps(
      largest_scores(problem, mask, lane, width, range, masked, scratch.scores), factor);
  const __m512 before = _mm512_load_ps(max_at);
  const __mmask16 moved = _mm512_cmp_ps_mask(
      largest, _mm512_add_ps(before, _mm512_set1_ps(kStale)), _CMP_GT_OQ);
  const __m512 max = _mm512_mask_mov_ps(before, moved, largest);
  const __mmask16 seen = _mm512_cmp_ps_mask(max, lowest, _CMP_NEQ_UQ);
  const __m512 origin = _mm512_maskz_mov_ps(seen, max);
  __m512 sum = _mm512_load_ps(sum_at);
  if (moved != 0) {
    const __m512 shrink = _mm512_mask_mov_ps(
        _mm512_set1_ps(1.0f), moved, exp2_bf16(_mm512_sub_ps(before, origin)));
    sum = _mm512_mul_ps(sum, shrink);
    for (std::int64_t c = 0; c < scratch.columns; ++c) {
      float* at = out + c * width + lane;
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), shrink));
    }
    _mm512_store_ps(max_at, max);
  }
  __m512 even = _mm512_setzero_ps();
  __m512 odd = _mm512_setzero_ps();
  for (int key = range.begin; key < range.end; key += 2) {
    const float* at = scratch.scores + key * width + lane;
    const __m512 low = exp2_bf16(_mm512_fmsub_ps(_mm512_load_ps(at), factor, origin));
    const __m512 high = exp2_bf16(_mm512_fmsub_ps(_mm512_load_ps(at + width), factor, origin));
    even = _mm512_add_ps(even, low);
    odd = _mm512_add_ps(odd, high);
    _mm512_store_si512(scratch.weights + key / 2 * width + lane, pair_lanes(low, high));
  }
  _mm512_store_ps(sum_at, _mm512_add_ps(sum, _mm512_add_ps(even, odd)));
}

/// One panel against one block of keys.
inline void forward_block(const Problem& problem, const RowGroup& group, const Panel& panel,
                          std::int64_t block, const BlockRange& range, bool finite,
                          const Bf16ForwardScratch& scratch) {
  const std::int64_t columns = scratch.columns;
  const int width = panel.width;
  float* out = scratch.out + columns * panel.offset;
  PanelMask mask;
  const bool masked = !range.full();
  if (masked || !finite) mask.set(problem, group, panel, block);
  multiply_rows(scratch.k, scratch.q + columns / 2 * panel.offset, columns, width, range,
                scratch.scores);
  for (int lane = 0; lane < width; lane += 16) {
    weigh(problem, mask, panel, lane, range, masked, out, scratch);
  }
  for (std::int64_t c = 0; c < columns; c += kUnit) {
    for (int half = 0; half < width; half += kUnit) {
      Engine::multiply(scratch.v_columns + c * kBlockKeys + range.begin, kBlockKeys * 2,
                       scratch.weights + range.begin / 2 * width + half, width * 4,
                       out + c * width + half, width * 4, (range.end - range.begin) / kUnit, true);
    }
  }
  if (finite) return;
  // As in forward-inl.h: what is not finite reaches only lanes that see it.
  for (int key = range.begin; key < range.end; ++key) {
    for (std::int64_t c = 0; c < problem.head_dim; ++c) {
      const float value = from_bfloat16(scratch.v[key * columns + c]);
      if (std::isfinite(value)) continue;
      for (int l = 0; l < panel.lanes; ++l) {
        const std::uint32_t pair = scratch.weights[key / 2 * width + l];
        const float weight = from_bfloat16(static_cast<std::uint16_t>(pair >> (key % 2 * 16)));
        if (mask.sees(l, key)) out[c * width + l] += weight * value;
      }
    }
  }
}

inline void finish_forward(const Problem& problem, const RowGroup& group, const Panel& panel,
                           const Bf16ForwardScratch& scratch) {
  float* sums = scratch.sum + panel.offset;
  for (int l = 0; l < panel.lanes; ++l) {
    constexpr double kLn2 = 0.6931471805599453;
    const double lse = static_cast<double>(scratch.max[panel.offset + l]) * kLn2 +
                       std::log(static_cast<double>(sums[l]));
    *reinterpret_cast<float*>(lane_pointer(problem, problem.args->lse, group, panel, l)) =
        static_cast<float>(lse);
    sums[l] = sums[l] == 0 ? 0 : 1 / sums[l];
  }
  store_panel(problem, problem.args->out, group, panel,
              scratch.out + scratch.columns * panel.offset, scratch.columns, sums, scratch.rows);
}

inline void forward_group(const Problem& problem, const RowGroup& group, std::byte* memory) {
  const Bf16ForwardScratch scratch(memory, problem.head_dim, group.lane_end - group.lane_begin);
  const std::int64_t columns = scratch.columns;
  const AttendArgs& args = *problem.args;
  [[maybe_unused]] const Engine engine;
  for_each_panel(problem, group, next_width, [&](const Panel& panel) {
    auto* rows = reinterpret_cast<std::uint16_t*>(scratch.rows);
    copy_lanes(problem, args.q, group, panel, columns, rows);
    sign_rows(problem.score_scale, columns * panel.width, rows);
    transpose_words(reinterpret_cast<const std::uint32_t*>(rows), columns / 2, panel.width,
                    columns / 2, scratch.q + columns / 2 * panel.offset, panel.width);
    std::fill_n(scratch.out + columns * panel.offset, columns * panel.width, 0.0f);
    std::fill_n(scratch.max + panel.offset, panel.width, -std::numeric_limits<float>::infinity());
    std::fill_n(scratch.sum + panel.offset, panel.width, 0.0f);
  });
  const std::int64_t end = group.keys.end;
  for (std::int64_t block = group.keys.first / kBlockKeys; block * kBlockKeys < end; ++block) {
    const BlockRange all = block_range(group.keys, group.keys, block, kUnit);
    copy_block(args.k, group, block, all, problem.head_dim, columns, scratch.k);
    const bool finite =
        copy_block(args.v, group, block, all, problem.head_dim, columns, scratch.v);
    transpose_block(scratch.v, columns, all, !finite, scratch.pairs, scratch.v_columns);
    for_each_panel(problem, group, next_width, [&](const Panel& panel) {
      const BlockRange range = block_range(panel.first, panel.last, block, kUnit);
      if (!range.empty()) forward_block(problem, group, panel, block, range, finite, scratch);
    });
  }
  for_each_panel(problem, group, next_width, [&](const Panel& panel) {
    finish_forward(problem, group, panel, scratch);
  });
}

inline std::size_t forward_scratch(std::int64_t head_dim, std::int64_t lanes) {
  return Bf16ForwardScratch(nullptr, head_dim, lanes).bytes;
}
