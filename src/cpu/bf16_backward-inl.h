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
    k = carver.take<std::uint16_t>(kBlockKeys * columns);
    v = carver.take<std::uint16_t>(kBlockKeys * columns);
    k_columns = carver.take<std::uint16_t>(kBlockKeys * columns);
    pairs = carver.take<std::uint32_t>(kBlockKeys / 2 * columns);
    dk = carver.floats(kBlockKeys * columns);
    dv = carver.floats(kBlockKeys * columns);
    scores = carver.floats(kBlockKeys * kBf16PanelLanes);
    products = carver.floats(kBlockKeys * kBf16PanelLanes);
    weights = carver.take<std::uint16_t>(kBlockKeys * kBf16PanelLanes);
    dscores = carver.take<std::uint16_t>(kBlockKeys * kBf16PanelLanes);
    dscore_pairs = carver.take<std::uint32_t>(kBlockKeys / 2 * kBf16PanelLanes);
    rows = carver.take<std::uint16_t>(kBf16PanelLanes * columns * 2);
    bytes = carver.bytes();
  }
  std::int64_t columns;         // head_dim, padded
  std::uint32_t* q;             // panels of [columns / 2, width] pairs of columns
  std::uint32_t* dout;          // likewise
  std::uint32_t* q_pairs;       // [lanes / 2, columns] pairs of lanes, 0 for what is not finite
  std::uint32_t* dout_pairs;    // likewise
  float* dq;                    // panels of [columns, width]
  float* lse;                   // [lanes], in units of log2
  float* delta;                 // [lanes] sums of dout * out
  std::uint16_t* k;             // [kBlockKeys, columns]
  std::uint16_t* v;             // [kBlockKeys, columns]
  std::uint16_t* k_columns;     // [columns, kBlockKeys], 0 for what is not finite
  std::uint32_t* pairs;         // [kBlockKeys / 2, columns]
  float* dk;                    // [kBlockKeys, columns] sums of this task
  float* dv;                    // [kBlockKeys, columns]
  float* scores;                // [kBlockKeys, width]
  float* products;              // [kBlockKeys, width] dout . v
  std::uint16_t* weights;       // [kBlockKeys, width]
  std::uint16_t* dscores;       // [kBlockKeys, width]
  std::uint32_t* dscore_pairs;  // [kBlockKeys / 2, width] pairs of keys
  std::uint16_t* rows;          // two of [kBf16PanelLanes, columns]
  std::size_t bytes;
};

/// Products of a panel's lanes and a block's rows: to(key, lane) = rows(key) . lanes(lane).
inline void multiply_rows(const std::uint16_t* rows, const std::uint32_t* lanes,
                          std::int64_t columns, int width, const BlockRange& range, float* to) {
  for (std::int64_t key = range.begin; key < range.end; key += kUnit) {
    for (int half = 0; half < width; half += kUnit) {
      Engine::multiply(rows + key * columns, columns * 2, lanes + half, width * 4,
                       to + key * width + half, width * 4, columns / kUnit, false);
    }
  }
}

struct Bf16Gradient {
  __m512 weight;
  __m512 dscore;
};

/// The weight and the score's gradient of 16 lanes at one key.
inline Bf16Gradient gradient(const Problem& problem, const PanelMask& mask, int lane, int key,
                             bool masked, __m512 lse, __m512 delta, __m512 score,
                             __m512 product) {
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

/// Weights and score gradients of 32 lanes of a panel over a block.
inline void gradients(const Problem& problem, const PanelMask& mask, const Panel& panel, int lane,
                      const BlockRange& range, bool masked, const Bf16BackwardScratch& scratch) {
  const int width = panel.width;
  __m512 lse[2];
  __m512 delta[2];
  for (int v = 0; v < 2; ++v) {
    lse[v] = _mm512_load_ps(scratch.lse + panel.offset + lane + v * 16);
    delta[v] = _mm512_load_ps(scratch.delta + panel.offset + lane + v * 16);
  }
  for (int key = range.begin; key < range.end; key += 2) {
    Bf16Gradient g[2][2];
    for (int i = 0; i < 2; ++i) {
      const std::int64_t at = (key + i) * width + lane;
      for (int v = 0; v < 2; ++v) {
        g[i][v] = gradient(problem, mask, lane + v * 16, key + i, masked, lse[v], delta[v],
                           _mm512_load_ps(scratch.scores + at + v * 16),
                           _mm512_load_ps(scratch.products + at + v * 16));
      }
      _mm512_store_si512(scratch.weights + at,
                         bits_of(_mm512_cvtne2ps_pbh(g[i][1].weight, g[i][0].weight)));
      _mm512_store_si512(scratch.dscores + at,
                         bits_of(_mm512_cvtne2ps_pbh(g[i][1].dscore, g[i][0].dscore)));
    }
    for (int v = 0; v < 2; ++v) {
      _mm512_store_si512(scratch.dscore_pairs + key / 2 * width + lane + v * 16,
                         pair_lanes(g[0][v].dscore, g[1][v].dscore));
    }
  }
}

/// What is not finite reaches only what sees it, as in backward-inl.h.
inline void add_special(const Problem& problem, const PanelMask& mask, const Panel& panel,
                        const BlockRange& range, const Bf16BackwardScratch& scratch) {
  const std::int64_t columns = scratch.columns;
  const int width = panel.width;
  float* dq = scratch.dq + columns * panel.offset;
  const std::uint32_t* q = scratch.q + columns / 2 * panel.offset;
  const std::uint32_t* dout = scratch.dout + columns / 2 * panel.offset;
  const float sign = problem.score_scale < 0 ? -1.0f : 1.0f;
  for (int key = range.begin; key < range.end; ++key) {
    for (int l = 0; l < panel.lanes; ++l) {
      if (!mask.sees(l, key)) continue;
      const float weight = from_bfloat16(scratch.weights[key * width + l]);
      const float dscore = from_bfloat16(scratch.dscores[key * width + l]);
      for (std::int64_t c = 0; c < problem.head_dim; ++c) {
        const auto half = [&](const std::uint32_t* x) {
          return from_bfloat16(static_cast<std::uint16_t>(x[c / 2 * width + l] >> (c % 2 * 16)));
        };
        const float k = from_bfloat16(scratch.k[key * columns + c]);
        const float q_value = sign * half(q);
        const float dout_value = half(dout);
        if (!std::isfinite(k)) dq[c * width + l] += dscore * k;
        if (!std::isfinite(q_value)) scratch.dk[key * columns + c] += dscore * q_value;
        if (!std::isfinite(dout_value)) scratch.dv[key * columns + c] += weight * dout_value;
      }
    }
  }
}

/// sums(key, c) += sum over lanes of factors(key, lane) * lanes(lane, c).
inline void add_outer(const std::uint16_t* factors, int width, const std::uint32_t* lanes,
                      std::int64_t columns, const BlockRange& range, float* sums) {
  for (std::int64_t key = range.begin; key < range.end; key += kUnit) {
    for (std::int64_t c = 0; c < columns; c += kUnit) {
      Engine::multiply(factors + key * width, width * 2, lanes + c, columns * 4,
                       sums + key * columns + c, columns * 4, width / kUnit, true);
    }
  }
}

/// One panel against one block of keys, as backward_block in backward-inl.h.
inline void backward_block(const Problem& problem, const RowGroup& group, const Panel& panel,
                           const KeyBlock& block, const BlockRange& range, bool finite,
                           const Bf16BackwardScratch& scratch) {
  const std::int64_t columns = scratch.columns;
  const int width = panel.width;
  const std::int64_t at = columns / 2 * panel.offset;
  float* dq = scratch.dq + columns * panel.offset;
  PanelMask mask;
  // Empty lanes add to dk and dv, so they must be masked too.
  const bool masked = !range.full() || panel.lanes < width;
  if (masked || !finite) mask.set(problem, group, panel, block);
  multiply_rows(scratch.k, scratch.q + at, columns, width, range, scratch.scores);
  multiply_rows(scratch.v, scratch.dout + at, columns, width, range, scratch.products);
  for (int lane = 0; lane < width; lane += kUnit) {
    gradients(problem, mask, panel, lane, range, masked, scratch);
  }
  add_outer(scratch.weights, width, scratch.dout_pairs + at, columns, range, scratch.dv);
  add_outer(scratch.dscores, width, scratch.q_pairs + at, columns, range, scratch.dk);
  for (std::int64_t c = 0; c < columns; c += kUnit) {
    for (int half = 0; half < width; half += kUnit) {
      Engine::multiply(scratch.k_columns + c * kBlockKeys + range.begin, kBlockKeys * 2,
                       scratch.dscore_pairs + range.begin / 2 * width + half, width * 4,
                       dq + c * width + half, width * 4, (range.end - range.begin) / kUnit, true);
    }
  }
  if (!finite) add_special(problem, mask, panel, range, scratch);
}

/// Both layouts of a panel's rows: pairs of columns for products with keys, pairs of lanes for sums
/// over lanes. `rows` [width, columns] holds them already.
inline void pack_lanes(const std::uint16_t* rows, std::int64_t columns, int width, bool finite,
                       std::uint32_t* lane_pairs) {
  for (int l = 0; l < width; l += 2) {
    pair_rows(rows + l * columns, rows + (l + 1) * columns, columns, !finite,
              lane_pairs + l / 2 * columns);
  }
}

/// Loads a panel's q and dout, lse and delta. Returns whether all are finite.
inline bool start_backward(const Problem& problem, const RowGroup& group, const Panel& panel,
                           const Bf16BackwardScratch& scratch) {
  const AttendBackwardArgs& args = *problem.backward;
  const std::int64_t columns = scratch.columns;
  const std::int64_t at = columns / 2 * panel.offset;
  const int width = panel.width;
  std::uint16_t* rows = scratch.rows;
  std::uint16_t* out_rows = scratch.rows + width * columns;
  const bool finite_q = copy_lanes(problem, args.q, group, panel, columns, rows);
  pack_lanes(rows, columns, width, finite_q, scratch.q_pairs + at);
  sign_rows(problem.score_scale, columns * width, rows);
  transpose_words(reinterpret_cast<const std::uint32_t*>(rows), columns / 2, width, columns / 2,
                  scratch.q + at, width);
  const bool finite_dout = copy_lanes(problem, args.dout, group, panel, columns, rows);
  pack_lanes(rows, columns, width, finite_dout, scratch.dout_pairs + at);
  transpose_words(reinterpret_cast<const std::uint32_t*>(rows), columns / 2, width, columns / 2,
                  scratch.dout + at, width);
  copy_lanes(problem, args.out, group, panel, columns, out_rows);
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
    constexpr float kLog2E = 1.4426950408889634f;
    scratch.lse[panel.offset + l] =
        l < panel.lanes
            ? *reinterpret_cast<const float*>(lane_pointer(problem, args.lse, group, panel, l)) *
                  kLog2E
            : 0.0f;
  }
  std::fill_n(scratch.dq + columns * panel.offset, columns * width, 0.0f);
  return finite_q && finite_dout;
}

/// Adds a task's dK and dV of one block to the unit's.
inline void add_gradients(const Problem& problem, const RowGroup& group, const KeyBlock& block,
                          const BlockRange& range, const GradientSums& sums,
                          const Bf16BackwardScratch& scratch) {
  const WorkItem& item = *group.item;
  const auto scale = static_cast<float>(problem.args->scale);
  for (std::int64_t key = range.begin; key < range.end; ++key) {
    const std::int64_t row = block.begin + key - item.k_position;
    if (row < 0 || row >= item.k_count) continue;
    const std::int64_t at = item.k_begin + row - sums.first_row;
    float* dk = sums.dk + at * sums.stride_k;
    float* dv = sums.dv + at * sums.stride_v;
    const float* dk_task = scratch.dk + key * scratch.columns;
    const float* dv_task = scratch.dv + key * scratch.columns;
    for (std::int64_t c = 0; c < problem.head_dim; ++c) {
      dk[c] += dk_task[c] * scale;
      dv[c] += dv_task[c];
    }
  }
}

inline void backward_group(const Problem& problem, const BackwardTask& task, std::byte* memory) {
  const RowGroup& group = *task.group;
  const Bf16BackwardScratch scratch(memory, problem.head_dim, group.lane_end - group.lane_begin);
  const std::int64_t columns = scratch.columns;
  const AttendBackwardArgs& args = *problem.backward;
  [[maybe_unused]] const Engine engine;
  const FlushSubnormals flush;
  bool finite_rows = true;
  for_each_panel(problem, group, next_width, [&](const Panel& panel) {
    finite_rows &= start_backward(problem, group, panel, scratch);
  });
  const std::int64_t end = group.keys.end;
  for (KeyBlock block = first_block(group.keys, kBlockKeys); block.begin < end; block.begin += block.keys) {
    const BlockRange all = block_range(group.keys, group.keys, block, kUnit);
    const bool finite_k =
        copy_block(args.k, group, block, all, problem.head_dim, columns, scratch.k);
    copy_block(args.v, group, block, all, problem.head_dim, columns, scratch.v);
    transpose_block(scratch.k, columns, all, kBlockKeys, !finite_k, scratch.pairs, scratch.k_columns);
    std::fill(scratch.dk + all.begin * columns, scratch.dk + all.end * columns, 0.0f);
    std::fill(scratch.dv + all.begin * columns, scratch.dv + all.end * columns, 0.0f);
    for_each_panel(problem, group, next_width, [&](const Panel& panel) {
      const BlockRange range = block_range(panel.first, panel.last, block, kUnit);
      if (range.empty()) return;
      backward_block(problem, group, panel, block, range, finite_k && finite_rows, scratch);
    });
    task.turns->wait(task.index, block);
    add_gradients(problem, group, block, all, task.sums, scratch);
    task.turns->done(task.index, block.end());
  }
  alignas(64) float scale[kBf16PanelLanes];
  std::fill_n(scale, kBf16PanelLanes, static_cast<float>(args.scale));
  for_each_panel(problem, group, next_width, [&](const Panel& panel) {
    store_panel(problem, args.dq, group, panel, scratch.dq + columns * panel.offset, columns,
                scale, reinterpret_cast<float*>(scratch.rows));
  });
}

inline std::size_t backward_scratch(std::int64_t head_dim, std::int64_t lanes) {
  return Bf16BackwardScratch(nullptr, head_dim, lanes).bytes;
}
