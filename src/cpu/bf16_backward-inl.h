// Compiled once for each engine of bfloat16 products; see bf16_pack-inl.h.

struct Bf16BackwardScratch {
  Bf16BackwardScratch(std::byte* memory, std::int64_t head_dim, std::int64_t lanes)
      : columns(pad(head_dim)) {
    Carver carver(memory);
    const std::int64_t width = pad(lanes);
    q = carver.take<std::uint32_t>(columns / 2 * width);
    dout = carver.take<std::uint32_t>(columns / 2 * width);
    q_pairs = carver.take<std::uint32_t>(width / 2 * columns);
    dout_pairs = carver.take<std::uint32_t>(width / 2 * columns);
    dq = carver.floats(columns * width);
    lse = carver.floats(width);
    delta = carver.floats(width);
    k_rows = carver.take<std::uint16_t>(kBlockKeys * columns);
    v_rows = carver.take<std::uint16_t>(kBlockKeys * columns);
    k_columns = carver.take<std::uint16_t>(kBlockKeys * columns);
    block = carver.take<std::uint16_t>(kBlockKeys * columns);
    pairs = carver.take<std::uint32_t>(kBlockKeys / 2 * columns);
    dk = carver.floats(kBlockKeys * columns);
    dv = carver.floats(kBlockKeys * columns);
    scores = carver.floats(kUnit * kUnit);
    products = carver.floats(kUnit * kUnit);
    weights = carver.take<std::uint16_t>(kBlockKeys * kBackwardLanes);
    dscores = carver.take<std::uint16_t>(kBlockKeys * kBackwardLanes);
    dscore_pairs = carver.take<std::uint32_t>(kBlockKeys / 2 * kBackwardLanes);
    rows = carver.take<std::uint16_t>(kBackwardLanes * columns * 2);
    bytes = carver.bytes();
  }
  // In the layouts of bf16_pack-inl.h unless a shape stands here.
  std::int64_t columns;         // head_dim, padded
  std::uint32_t* q;             // lanes of pairs of columns
  std::uint32_t* dout;          // likewise
  std::uint32_t* q_pairs;       // a panel: columns of pairs of lanes, 0 for what is not finite
  std::uint32_t* dout_pairs;    // likewise
  float* dq;                    // [lane / 16][column][16]
  float* lse;                   // [lanes], in units of log2
  float* delta;                 // [lanes] sums of dout * out
  std::uint16_t* k_rows;        // rows: keys by columns
  std::uint16_t* v_rows;        // likewise
  std::uint16_t* k_columns;     // rows: columns by keys, 0 for what is not finite
  std::uint16_t* block;         // [kBlockKeys, columns], of k when the panels are computed
  std::uint32_t* pairs;         // [kBlockKeys / 2, columns]
  float* dk;                    // [column / 16][key][16] sums of this task
  float* dv;                    // likewise
  float* scores;                // [lane / 16][key][16] of 32 lanes and 32 keys
  float* products;              // likewise, dout . v
  std::uint16_t* weights;       // rows: keys by lanes
  std::uint16_t* dscores;       // likewise
  std::uint32_t* dscore_pairs;  // lanes of pairs of keys
  std::uint16_t* rows;          // two of [kBackwardLanes, columns]
  std::size_t bytes;
};

/// Where element `column` of a row stands in rows of a product of `columns` columns.
inline std::int64_t row_offset(std::int64_t row, std::int64_t column, std::int64_t columns) {
  return row / 16 * 16 * columns + column / 32 * 512 + row % 16 * 32 + column % 32;
}

struct Bf16Gradient {
  __m512 weight;
  __m512 dscore;
};

/// The weight and the score's gradient of 16 lanes at one key.
inline Bf16Gradient gradient(const Problem& problem, const PanelMask& mask, int lane, int key,
                             bool masked, __m512 lse, __m512 delta, __m512 score, __m512 product) {
  const __m512 factor = _mm512_set1_ps(problem.log2_factor());
  __m512 slope = _mm512_set1_ps(1.0f);
  if (problem.cap != 0) {
    const __m512 tangent =
        tanh_bf16(_mm512_mul_ps(score, _mm512_set1_ps(std::fabs(problem.score_scale))));
    slope = _mm512_fnmadd_ps(tangent, tangent, slope);
    score = _mm512_mul_ps(tangent, _mm512_set1_ps(problem.cap));
  }
  Bf16Gradient g;
  g.weight = exp2_bf16(_mm512_fmsub_ps(score, factor, lse));
  g.dscore = _mm512_mul_ps(g.weight, _mm512_sub_ps(product, delta));
  if (problem.cap != 0) g.dscore = _mm512_mul_ps(g.dscore, slope);
  if (masked) {
    const __mmask16 seen = sees_vector(mask, lane, key);
    g.weight = _mm512_maskz_mov_ps(seen, g.weight);
    g.dscore = _mm512_maskz_mov_ps(seen, g.dscore);
  }
  return g;
}

/// Weights and score gradients of 32 lanes of a panel and 32 keys of a block.
inline void gradients(const Problem& problem, const PanelMask& mask, const Panel& panel, int lane,
                      int first_key, bool masked, const Bf16BackwardScratch& scratch) {
  __m512 lse[2];
  __m512 delta[2];
  for (int v = 0; v < 2; ++v) {
    lse[v] = _mm512_load_ps(scratch.lse + panel.offset + lane + v * 16);
    delta[v] = _mm512_load_ps(scratch.delta + panel.offset + lane + v * 16);
  }
  for (int local = 0; local < kUnit; local += 2) {
    const int key = first_key + local;
    Bf16Gradient g[2][2];
    for (int i = 0; i < 2; ++i) {
      for (int v = 0; v < 2; ++v) {
        const std::int64_t at = (v * kUnit + local + i) * 16;
        g[i][v] =
            gradient(problem, mask, lane + v * 16, key + i, masked, lse[v], delta[v],
                     _mm512_load_ps(scratch.scores + at), _mm512_load_ps(scratch.products + at));
      }
      const std::int64_t row = row_offset(key + i, lane, panel.width);
      _mm512_store_si512(scratch.weights + row,
                         bits_of(_mm512_cvtne2ps_pbh(g[i][1].weight, g[i][0].weight)));
      _mm512_store_si512(scratch.dscores + row,
                         bits_of(_mm512_cvtne2ps_pbh(g[i][1].dscore, g[i][0].dscore)));
    }
    for (int v = 0; v < 2; ++v) {
      _mm512_store_si512(scratch.dscore_pairs + (lane + v * 16) * kBlockKeys / 2 + key * 8,
                         pair_lanes(g[0][v].dscore, g[1][v].dscore));
    }
  }
}

/// What is not finite reaches only what sees it, as in backward-inl.h.
inline void add_special(const Problem& problem, const PanelMask& mask, const Panel& panel,
                        const BlockRange& range, const Bf16BackwardScratch& scratch) {
  const std::int64_t columns = scratch.columns;
  const float sign = problem.score_scale < 0 ? -1.0f : 1.0f;
  for (int key = range.begin; key < range.end; ++key) {
    for (int l = 0; l < panel.lanes; ++l) {
      if (!mask.sees(l, key)) continue;
      const std::int64_t row = row_offset(key, l, panel.width);
      const float weight = from_bfloat16(scratch.weights[row]);
      const float dscore = from_bfloat16(scratch.dscores[row]);
      const std::int64_t tile = (panel.offset + l) / 16 * 16;
      for (std::int64_t c = 0; c < problem.head_dim; ++c) {
        const auto half = [&](const std::uint32_t* x) {
          const std::uint32_t pair = x[tile * columns / 2 + c / 2 * 16 + l % 16];
          return from_bfloat16(static_cast<std::uint16_t>(pair >> (c % 2 * 16)));
        };
        const float k = from_bfloat16(scratch.block[key * columns + c]);
        const float q = sign * half(scratch.q);
        const float dout = half(scratch.dout);
        const std::int64_t sum = c / 16 * 16 * kBlockKeys + key * 16 + c % 16;
        if (!std::isfinite(k)) scratch.dq[tile * columns + c * 16 + l % 16] += dscore * k;
        if (!std::isfinite(q)) scratch.dk[sum] += dscore * q;
        if (!std::isfinite(dout)) scratch.dv[sum] += weight * dout;
      }
    }
  }
}

/// sums(key, c) += sum over lanes of factors(key, lane) * lanes(lane, c).
inline void add_outer(const std::uint16_t* factors, int width, const std::uint32_t* lanes,
                      std::int64_t columns, const BlockRange& range, float* sums) {
  for (std::int64_t key = range.begin; key < range.end; key += kUnit) {
    for (std::int64_t c = 0; c < columns; c += kUnit) {
      Engine::multiply(factors + key * width, width * 32, lanes + c * width / 2, width * 32,
                       sums + c * kBlockKeys + key * 16, kBlockKeys * 64, width / kUnit, true);
    }
  }
}

/// One panel against one block of keys, as backward_block in backward-inl.h.
inline void backward_block(const Problem& problem, const RowGroup& group, const Panel& panel,
                           const KeyBlock& block, const BlockRange& range, bool finite,
                           Prefetcher& ahead, const Bf16BackwardScratch& scratch) {
  const std::int64_t columns = scratch.columns;
  const int width = panel.width;
  const std::int64_t at = columns / 2 * panel.offset;
  float* dq = scratch.dq + columns * panel.offset;
  PanelMask mask;
  // Empty lanes add to dk and dv, so they must be masked too.
  const bool masked = !range.full() || panel.lanes < width;
  if (masked || !finite) mask.set(problem, group, panel, block);
  const int tiles =
      (range.end - range.begin) / kUnit * ((width + kBf16PanelLanes - 1) / kBf16PanelLanes);
  for (int tile = 0; tile < tiles; ++tile) {
    ahead.step();
    // As many lanes as stay in the nearest cache go through all keys.
    const int rows = (range.end - range.begin) / kUnit;
    const int key = range.begin + tile % rows * kUnit;
    const int first = tile / rows * kBf16PanelLanes;
    for (int lane = first; lane < std::min(width, first + kBf16PanelLanes); lane += kUnit) {
      Engine::multiply(scratch.k_rows + key * columns, columns * 32,
                       scratch.q + at + lane * columns / 2, columns * 32, scratch.scores,
                       kUnit * 64, columns / kUnit, false);
      Engine::multiply(scratch.v_rows + key * columns, columns * 32,
                       scratch.dout + at + lane * columns / 2, columns * 32, scratch.products,
                       kUnit * 64, columns / kUnit, false);
      gradients(problem, mask, panel, lane, key, masked, scratch);
    }
  }
  add_outer(scratch.weights, width, scratch.dout_pairs + at, columns, range, scratch.dv);
  add_outer(scratch.dscores, width, scratch.q_pairs + at, columns, range, scratch.dk);
  for (std::int64_t c = 0; c < columns; c += kUnit) {
    for (int half = 0; half < width; half += kUnit) {
      Engine::multiply(scratch.k_columns + c * kBlockKeys + range.begin * 16, kBlockKeys * 32,
                       scratch.dscore_pairs + half * kBlockKeys / 2 + range.begin * 8,
                       kBlockKeys * 32, dq + half * columns + c * 16, columns * 64,
                       (range.end - range.begin) / kUnit, true);
    }
  }
  if (!finite) add_special(problem, mask, panel, range, scratch);
}

/// Rows [width, columns] of lanes to columns of pairs of lanes.
inline void columns_of_rows(const std::uint16_t* rows, std::int64_t columns, int width, bool finite,
                            std::uint32_t* to) {
  for (int l = 0; l < width; l += 2) {
    pair_rows(rows + l * columns, rows + (l + 1) * columns, columns, !finite, to + l / 2 * 16,
              width / 2 * 16);
  }
}

/// Loads a panel's q and dout, lse and delta. Returns whether all are finite.
inline bool start_backward(const Problem& problem, const RowGroup& group, const Panel& panel,
                           const Bf16BackwardScratch& scratch) {
  const std::int64_t columns = scratch.columns;
  const std::int64_t at = columns / 2 * panel.offset;
  const int width = panel.width;
  std::uint16_t* rows = scratch.rows;
  std::uint16_t* out_rows = scratch.rows + width * columns;
  const bool finite_q = copy_lanes(problem, problem.q, group, panel, columns,
                                   {problem, problem.dout, group, panel.lane_begin}, rows);
  columns_of_rows(rows, columns, width, finite_q, scratch.q_pairs + at);
  sign_rows(problem.score_scale, columns * width, rows);
  lanes_of_rows(rows, columns, width, scratch.q + at);
  const bool finite_dout = copy_lanes(problem, problem.dout, group, panel, columns,
                                      {problem, problem.out, group, panel.lane_begin}, rows);
  columns_of_rows(rows, columns, width, finite_dout, scratch.dout_pairs + at);
  lanes_of_rows(rows, columns, width, scratch.dout + at);
  copy_lanes(problem, problem.out, group, panel, columns,
             {problem, problem.q, group, panel.lane_begin + panel.lanes}, out_rows);
  LaneCursor lse_rows(problem, problem.lse, group, panel.lane_begin);
  for (int l = 0; l < width; ++l) {
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t c = 0; c < columns; c += 16) {
      const auto load = [&](const std::uint16_t* x) {
        const __m256i half =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + l * columns + c));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      };
      sum = _mm512_fmadd_ps(load(rows), load(out_rows), sum);
    }
    scratch.delta[panel.offset + l] = _mm512_reduce_add_ps(sum);
    scratch.lse[panel.offset + l] =
        l < panel.lanes ? log2_lse(*reinterpret_cast<const float*>(lse_rows.at(l))) : 0.0f;
  }
  std::fill_n(scratch.dq + columns * panel.offset, columns * width, 0.0f);
  return finite_q && finite_dout;
}

/// Adds a task's dK and dV of one block to the unit's.
inline void add_gradients(const Problem& problem, const RowGroup& group, const KeyBlock& block,
                          const GradientSums& sums, const Bf16BackwardScratch& scratch) {
  const __m512 scale = _mm512_set1_ps(static_cast<float>(problem.scale));
  for_each_sum(group, block, sums, [&](std::int64_t key, float* dk, float* dv, bool fresh) {
    for (std::int64_t c = 0; c < problem.head_dim; c += 16) {
      const std::int64_t left = std::min<std::int64_t>(problem.head_dim - c, 16);
      const auto part = static_cast<__mmask16>((1U << left) - 1);
      const auto old = static_cast<__mmask16>(fresh ? 0 : part);
      const std::int64_t from = c * kBlockKeys + key * 16;
      const __m512 old_dk = _mm512_maskz_loadu_ps(old, dk + c);
      const __m512 old_dv = _mm512_maskz_loadu_ps(old, dv + c);
      // Not fused: a first addition rounds what a later one adds, so that sums of several ranks are
      // the same whether each has its own first or not.
      const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(scratch.dk + from), scale);
      _mm512_mask_storeu_ps(dk + c, part, _mm512_add_ps(scaled, old_dk));
      _mm512_mask_storeu_ps(dv + c, part, _mm512_add_ps(_mm512_load_ps(scratch.dv + from), old_dv));
    }
  });
}

inline void backward_group(const Problem& problem, const BackwardTask& task, std::byte* memory) {
  const RowGroup& group = *task.group;
  const Bf16BackwardScratch scratch(memory, problem.head_dim, group.width);
  const std::int64_t columns = scratch.columns;
  [[maybe_unused]] const Engine engine;
  const FlushSubnormals flush;
  bool finite_rows = true;
  const std::int64_t parts = panel_count(group, kBackwardLanes);
  Prefetcher first(problem, group, first_block(group.keys, kBlockKeys), parts);
  for_each_panel(problem, group, backward_width, [&](const Panel& panel) {
    first.step();
    finite_rows &= start_backward(problem, group, panel, scratch);
  });
  const std::int64_t end = group.keys.end;
  for (KeyBlock block = first_block(group.keys, kBlockKeys); block.begin < end;
       block.begin += block.keys) {
    const BlockRange all = block_range(group.keys, group.keys, block, kUnit);
    rows_of_block(problem.v, group, block, all, problem.head_dim, columns, scratch.v_rows);
    const bool finite_k =
        copy_block(problem.k, group, block, all, problem.head_dim, columns, scratch.block);
    rows_of_block(problem.k, group, block, all, problem.head_dim, columns, scratch.k_rows);
    columns_of_block(scratch.block, columns, all, kBlockKeys, !finite_k, scratch.pairs,
                     scratch.k_columns);
    std::fill_n(scratch.dk, kBlockKeys * columns, 0.0f);
    std::fill_n(scratch.dv, kBlockKeys * columns, 0.0f);
    const std::int64_t tiles =
        parts * (kBackwardLanes / kBf16PanelLanes) * (all.end - all.begin) / kUnit;
    Prefetcher ahead(problem, group, {block.end(), block.keys}, tiles, &task.sums, block);
    for_each_panel(problem, group, backward_width, [&](const Panel& panel) {
      const BlockRange range = block_range(panel.first, panel.last, block, kUnit);
      if (range.empty()) return;
      backward_block(problem, group, panel, block, range, finite_k && finite_rows, ahead, scratch);
    });
    ahead.finish();
    task.turns->wait(task.index, block);
    add_gradients(problem, group, block, task.sums, scratch);
    task.turns->done(task.index, block.end());
  }
  alignas(64) float scale[kBackwardLanes];
  std::fill_n(scale, kBackwardLanes, static_cast<float>(problem.scale));
  for_each_panel(problem, group, backward_width, [&](const Panel& panel) {
    store_panel(problem, problem.dq, group, panel, scratch.dq + columns * panel.offset, columns,
                scale, reinterpret_cast<float*>(scratch.rows));
  });
}

inline std::size_t backward_scratch(std::int64_t head_dim, std::int64_t lanes) {
  return Bf16BackwardScratch(nullptr, head_dim, lanes).bytes;
}
