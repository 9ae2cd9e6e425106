#pragma once

#include "cuda/hopper/common.cuh"

namespace zigzag::cuda::hopper {

/// Types of the backward kernel: tiles, their places in shared memory and the matrix products.
/// T: cutlass::half_t or cutlass::bfloat16_t.
template <typename T, int kWidth>
struct Backward {
  static constexpr int kQueries = kQueryTile;
  static constexpr int kStages = 2;
  static constexpr auto kK = cute::GMMA::Major::K;
  static constexpr auto kMn = cute::GMMA::Major::MN;

  // S^T and dP^T [keys, queries]: each warp group has 64 keys.
  using MmaScores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float, Shape<Int<kKeyTile>, Int<kQueries>, Int<kWidth>>>(),
      Layout<Shape<_2, _1, _1>>{}));
  // dK and dV [keys, width]: P^T and dS^T come from the registers that they were made in.
  using MmaKeys = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<T, T, float, Shape<Int<kKeyTile>, Int<kWidth>, Int<kQueries>>, kK,
                                 kMn>(),
      Layout<Shape<_2, _1, _1>>{}));
  // dQ [queries, width]: 64 columns a warp group, or, where there are no more, the part of dQ that
  // comes of the group's own keys.
  static constexpr bool kShareKeys = kWidth > 64;
  using MmaQueries = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float, Shape<Int<64>, Int<64>, Int<kKeyTile>>, kMn, kMn>(),
      Layout<Shape<_1, std::conditional_t<kShareKeys, _2, _1>, _1>>{}));

  using KeyLayout = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<T>{},
                                                 Shape<Int<kKeyTile>, Int<kWidth>>{}));
  using KeyLayoutT = decltype(cute::composition(
      KeyLayout{}, Layout<Shape<Int<kWidth>, Int<kKeyTile>>, cute::Stride<Int<kKeyTile>, _1>>{}));
  using QueryLayout = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_K_SW128_Atom<T>{}, Shape<Int<kQueries>, Int<kWidth>, Int<kStages>>{}));
  using QueryLayoutT = decltype(cute::composition(
      QueryLayout{}, Layout<Shape<Int<kWidth>, Int<kQueries>, Int<kStages>>,
                            cute::Stride<Int<kQueries>, _1, Int<kQueries * kWidth>>>{}));
  // dS [queries, keys], one a stage, so that one is written while the other is read.
  using ScoreLayout = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_MN_SW128_Atom<T>{}, Shape<Int<kQueries>, Int<kKeyTile>, Int<kStages>>{}));
  using ScoreLayoutT = decltype(cute::composition(
      ScoreLayout{}, Layout<Shape<Int<kKeyTile>, Int<kQueries>, Int<kStages>>,
                            cute::Stride<Int<kQueries>, _1, Int<kQueries * kKeyTile>>>{}));

  struct Shared {
    alignas(1024) T k[kKeyTile * kWidth];
    alignas(1024) T v[kKeyTile * kWidth];
    alignas(1024) T q[kStages * kQueries * kWidth];
    alignas(1024) T dout[kStages * kQueries * kWidth];
    alignas(1024) T scores[kStages * kQueries * kKeyTile];
    alignas(1024) float dq[2 * kQueries * 64];  // of each warp group
    alignas(128) float lse[kStages][kQueries];
    alignas(128) float delta[kStages][kQueries];
    BackwardUnit unit;
    Span span;
    std::uint64_t keys_full;
    std::uint64_t q_full[kStages], q_empty[kStages];
    std::uint64_t dout_full[kStages], dout_empty[kStages];
  };
};

/// Adds `bytes` of float32 sums in shared memory to those in global memory, asynchronously.
__device__ __forceinline__ void bulk_add(float* global, const float* shared, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;\n" ::"l"(global),
      "r"(cute::cast_smem_ptr_to_uint(shared)), "r"(bytes)
      : "memory");
}
/// Until the shared memory of this thread's bulk_adds may be written again.
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
/// Until this thread's bulk_adds have been made.
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

template <typename T, int kWidth>
__device__ void load_tiles(const BackwardParams& params,
                           typename Backward<T, kWidth>::Shared& shared) {
  const BackwardUnit unit = shared.unit;
  const Span span = shared.span;
  using Types = Backward<T, kWidth>;
  constexpr int kQueries = Types::kQueries;
  Barrier::arrive_and_expect_tx(&shared.keys_full, 2 * kKeyTile * kWidth * sizeof(T));
  load_tile<kWidth>(params.k, &shared.keys_full, shared.k, kKeyTile, unit.k_row, unit.kv_head);
  load_tile<kWidth>(params.v, &shared.keys_full, shared.v, kKeyTile, unit.k_row, unit.kv_head);
  int n = 0;
  const int first_plane = unit.head >> params.tile_heads_log2;
  const int end_plane = (unit.head + unit.heads) >> params.tile_heads_log2;
  for (int plane = first_plane; plane < end_plane; ++plane) {
    for (int tile = unit.first_tile; tile < unit.end_tile; ++tile, ++n) {
      const int stage = n % Types::kStages;
      const std::uint32_t phase = static_cast<std::uint32_t>(n / Types::kStages + 1) % 2;
      const std::int64_t padded = (plane * params.tiles + span.tile_begin + tile) * kQueries;
      constexpr int kBytes = kQueries * kWidth * sizeof(T) + kQueries * sizeof(float);
      constexpr int kTile = kQueries * kWidth;
      const int row = span.q_begin + (tile * kQueries >> params.tile_heads_log2);
      const int head = plane << params.tile_heads_log2;
      Barrier::wait(&shared.q_empty[stage], phase);
      Barrier::arrive_and_expect_tx(&shared.q_full[stage], kBytes);
      load_tile<kWidth>(params.q, &shared.q_full[stage], shared.q + stage * kTile, kQueries, head,
                        row);
      cute::SM90_BULK_COPY_G2S::copy(params.lse + padded, &shared.q_full[stage], shared.lse[stage],
                                     kQueries * sizeof(float));
      Barrier::wait(&shared.dout_empty[stage], phase);
      Barrier::arrive_and_expect_tx(&shared.dout_full[stage], kBytes);
      load_tile<kWidth>(params.dout, &shared.dout_full[stage], shared.dout + stage * kTile,
                        kQueries, head, row);
      cute::SM90_BULK_COPY_G2S::copy(params.delta + padded, &shared.dout_full[stage],
                                     shared.delta[stage], kQueries * sizeof(float));
    }
  }
}

/// The work of warp group kGroup: known to the compiler, so that it takes no registers.
template <typename T, int kWidth, bool kSoftcap, int kGroup>
__device__ void compute(const BackwardParams& params,
                        typename Backward<T, kWidth>::Shared& shared) {
  // Left in shared memory: registers are what this kernel is short of.
  const BackwardUnit& unit = shared.unit;
  const Span& span = shared.span;
  using namespace cute;
  using Types = Backward<T, kWidth>;
  constexpr int kQueries = Types::kQueries;
  constexpr int kStages = Types::kStages;
  constexpr int group = kGroup;
  const int in_group = static_cast<int>(threadIdx.x) % 128;
  const int thread = group * 128 + in_group;
  const int lane = thread % 32;

  const auto sk = make_tensor(make_smem_ptr(shared.k), typename Types::KeyLayout{});
  const auto sv = make_tensor(make_smem_ptr(shared.v), typename Types::KeyLayout{});
  const auto sk_t = make_tensor(make_smem_ptr(shared.k), typename Types::KeyLayoutT{});
  const auto sq = make_tensor(make_smem_ptr(shared.q), typename Types::QueryLayout{});
  const auto sq_t = make_tensor(make_smem_ptr(shared.q), typename Types::QueryLayoutT{});
  const auto sdout = make_tensor(make_smem_ptr(shared.dout), typename Types::QueryLayout{});
  const auto sdout_t = make_tensor(make_smem_ptr(shared.dout), typename Types::QueryLayoutT{});
  const auto scores = make_tensor(make_smem_ptr(shared.scores), typename Types::ScoreLayout{});
  const auto scores_t = make_tensor(make_smem_ptr(shared.scores), typename Types::ScoreLayoutT{});

  typename Types::MmaScores mma_scores;
  typename Types::MmaKeys mma_keys;
  typename Types::MmaQueries mma_queries;
  // Shared memory is divided by warp groups, all of whose threads see the same tiles.
  const auto scores_slice = mma_scores.get_slice(group * 128);
  const auto keys_slice = mma_keys.get_slice(group * 128);
  const auto queries_slice = mma_queries.get_slice(Types::kShareKeys ? group * 128 : 0);
  const auto k_tiles = scores_slice.partition_fragment_A(sk);
  const auto v_tiles = scores_slice.partition_fragment_A(sv);
  const auto q_tiles = scores_slice.partition_fragment_B(sq);
  const auto dout_tiles = scores_slice.partition_fragment_B(sdout);
  const auto q_t_tiles = keys_slice.partition_fragment_B(sq_t);
  const auto dout_t_tiles = keys_slice.partition_fragment_B(sdout_t);
  const auto score_tiles = queries_slice.partition_fragment_A(scores);
  const auto k_t_tiles = queries_slice.partition_fragment_B(sk_t);

  const auto store_scores = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, T>{}, mma_scores);
  const auto store_slice = store_scores.get_slice(thread);
  const auto stored_scores = store_slice.partition_D(scores_t);

  auto dk = partition_fragment_C(mma_keys, Shape<Int<kKeyTile>, Int<kWidth>>{});
  auto dv = partition_fragment_C(mma_keys, Shape<Int<kKeyTile>, Int<kWidth>>{});
  auto s = partition_fragment_C(mma_scores, Shape<Int<kKeyTile>, Int<kQueries>>{});
  clear(dk);
  clear(dv);
  // A result of a product as the first factor of another: 16 columns a step.
  using AsFactor = Layout<Shape<Shape<_2, _2, _2>, _1, Int<kQueries / 16>>>;

  const int key = group * 64 + in_group / 32 * 16 + lane / 4;  // of values 0, 1; the others: + 8
  const int column = lane % 4 * 2;                             // of value 0 of every 8 columns

  // Each group clears the rows of both, so that neither waits for the other.
  Barrier::wait(&shared.keys_full, 0);
  if (unit.k_count < kKeyTile) {
    clear_rows<kKeyTile, kWidth, 128>(shared.k, unit.k_count, in_group);
    clear_rows<kKeyTile, kWidth, 128>(shared.v, unit.k_count, in_group);
    cutlass::arch::fence_view_async_shared();
    group_barrier(group);
  }

  const int tiles = unit.end_tile - unit.first_tile;
  const int total = uniform((unit.heads >> params.tile_heads_log2) * tiles);
  int tile = unit.first_tile;
  // The tile in the padded order.
  int padded = static_cast<int>((unit.head >> params.tile_heads_log2) * params.tiles) +
               span.tile_begin + unit.first_tile;
  for (int n = 0; n < total; ++n) {
    const int stage = uniform(n % kStages);
    Barrier::wait(&shared.q_full[stage], static_cast<std::uint32_t>(n / kStages) % 2);
    multiply<true>(mma_scores, k_tiles, q_tiles(_, _, _, stage), s);
    Barrier::wait(&shared.dout_full[stage], static_cast<std::uint32_t>(n / kStages) % 2);
    // Alike in all lanes, and the compiler is to know it.
    const bool masked = __any_sync(0xffffffffu, tile < unit.first_full || tile >= unit.end_full);
    // Rows behind the document's last belong to others and may hold anything. Scores that are being
    // made of them are not used.
    const int live =
        uniform(masked ? (span.q_count << params.tile_heads_log2) - tile * kQueries : kQueries);
    if (live < kQueries) {
      clear_rows<kQueries, kWidth, 128>(shared.q + stage * (kQueries * kWidth), live, in_group);
      clear_rows<kQueries, kWidth, 128>(shared.dout + stage * (kQueries * kWidth), live, in_group);
      cutlass::arch::fence_view_async_shared();
      group_barrier(group);
    }
    auto dp = partition_fragment_C(mma_scores, Shape<Int<kKeyTile>, Int<kQueries>>{});
    multiply<true>(mma_scores, v_tiles, dout_tiles(_, _, _, stage), dp);
    warpgroup_wait<1>();
    warpgroup_fence_operand(s);

    if constexpr (kSoftcap) {
#pragma unroll
      for (int j = 0; j < size(s); ++j) s(j) = tanh_fast(s(j) * params.cap_scale);
    }
#pragma unroll
    for (int c = 0; c < kQueries / 8; ++c) {
      const float2 lse = *reinterpret_cast<const float2*>(&shared.lse[stage][8 * c + column]);
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        float& first = s(4 * c + 2 * y);
        float& second = s(4 * c + 2 * y + 1);
        first = exp2_fast(first * params.scale_log2 - lse.x);
        second = exp2_fast(second * params.scale_log2 - lse.y);
      }
    }
    if (masked) {
#pragma unroll
      for (int c = 0; c < kQueries / 8; ++c) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const int query = 8 * c + column + x;
          const int row = (tile * kQueries + query) >> params.tile_heads_log2;
          const int at = position_of(span, row) - unit.k_position;
          const int from = at - params.left;
          const int to = query < live ? min(unit.k_count - 1, at + params.right) : -1;
#pragma unroll
          for (int y = 0; y < 2; ++y) {
            if (key + 8 * y < from || key + 8 * y > to) s(4 * c + 2 * y + x) = 0;
          }
        }
      }
    }
    auto p = rounded<T>(s);
    auto p_factor = make_tensor(p.data(), AsFactor{});
    multiply<false>(mma_keys, p_factor, dout_t_tiles(_, _, _, stage), dv);
    warpgroup_wait<1>();
    warpgroup_fence_operand(dp);
#pragma unroll
    for (int c = 0; c < kQueries / 8; ++c) {
      const float2 delta = *reinterpret_cast<const float2*>(&shared.delta[stage][8 * c + column]);
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        float& first = dp(4 * c + 2 * y);
        float& second = dp(4 * c + 2 * y + 1);
        first = s(4 * c + 2 * y) * (first - delta.x);
        second = s(4 * c + 2 * y + 1) * (second - delta.y);
        if constexpr (kSoftcap) {
          // The tanh t of a weight p = 2^(t x scale_log2 - lse), whose slope is 1 - t^2. Where p is
          // 0 there is nothing to scale.
          const float2 lse = *reinterpret_cast<const float2*>(&shared.lse[stage][8 * c + column]);
          const auto slope = [&](float p, float log_sum) {
            const float t = (__log2f(p) + log_sum) * params.one_by_scale_log2;
            return p > 0 ? 1.0f - t * t : 0.0f;
          };
          first *= slope(s(4 * c + 2 * y), lse.x);
          second *= slope(s(4 * c + 2 * y + 1), lse.y);
        }
      }
    }
    auto ds = rounded<T>(dp);
    copy(store_scores, store_slice.retile_S(ds), stored_scores(_, _, _, stage));
    cutlass::arch::fence_view_async_shared();

    auto dq = partition_fragment_C(mma_queries, Shape<Int<kQueries>, Int<kWidth>>{});
    const auto ds_tiles = score_tiles(_, _, _, stage);
    auto ds_factor = make_tensor(ds.data(), AsFactor{});
    group_barrier(group);
    if constexpr (Types::kShareKeys) pass_turn(group, n);
    // The group's own keys first.
    multiply<true, 2>(mma_queries, ds_tiles, k_t_tiles, dq, group);
    if constexpr (Types::kShareKeys) {
      take_turn(group, n);
      multiply<false, 2>(mma_queries, ds_tiles, k_t_tiles, dq, 1 - group);
    }
    multiply<false>(mma_keys, ds_factor, q_t_tiles(_, _, _, stage), dk);
    warpgroup_wait<1>();
    warpgroup_fence_operand(dq);
    Barrier::arrive(&shared.dout_empty[stage]);
    float* const sums = params.dq + std::int64_t{padded} * (kQueries * kWidth) +
                        (Types::kShareKeys ? group * (kQueries * 64) : 0);
    // Put away in the order of fragments: each thread writes 16 bytes beside its neighbour's.
    float* const staged = shared.dq + group * (kQueries * 64);
    if (in_group == 0) bulk_wait_read();
    group_barrier(group);
    static_assert(size(dq) == 32);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      reinterpret_cast<float4*>(staged)[i * 128 + in_group] =
          make_float4(dq(4 * i), dq(4 * i + 1), dq(4 * i + 2), dq(4 * i + 3));
    }
    cutlass::arch::fence_view_async_shared();
    group_barrier(group);
    if (in_group == 0) bulk_add(sums, staged, kQueries * 64 * static_cast<int>(sizeof(float)));
    warpgroup_wait<0>();
    Barrier::arrive(&shared.q_empty[stage]);
    ++padded;
    if (++tile == unit.end_tile) {
      tile = unit.first_tile;
      padded += static_cast<int>(params.tiles) - tiles;
    }
  }
  warpgroup_wait<0>();
  warpgroup_fence_operand(dk);
  warpgroup_fence_operand(dv);

  const auto store = [&](const Rows& rows, const auto& sums, float scale) {
    const std::int64_t split = unit.split * params.split_stride;
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      if (key + 8 * y >= unit.k_count) continue;
      const std::int64_t at =
          split + (unit.dk_row + key + 8 * y) * rows.row + unit.kv_head * rows.head;
#pragma unroll
      for (int c = 0; c < kWidth / 8; ++c) {
        if (8 * c >= params.head_dim) continue;
        const float first = sums(4 * c + 2 * y) * scale;
        const float second = sums(4 * c + 2 * y + 1) * scale;
        if (params.sums_are_float) {
          *reinterpret_cast<float2*>(static_cast<float*>(rows.data) + at + 8 * c + column) =
              make_float2(first, second);
        } else {
          *reinterpret_cast<std::uint32_t*>(static_cast<T*>(rows.data) + at + 8 * c + column) =
              pack(first, second, T{});
        }
      }
    }
  };
  store(params.dv, dv, 1.0f);
  store(params.dk, dk, params.scale);
  if (in_group == 0) bulk_wait();
}

template <typename T, int kWidth, bool kSoftcap>
__global__ void __launch_bounds__(kBlockThreads, 1)
    backward_kernel(const __grid_constant__ BackwardParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Types = Backward<T, kWidth>;
  auto& shared = shared_memory<typename Types::Shared>();
  if (threadIdx.x == 0) {
    shared.unit = params.units[blockIdx.x];
    shared.span = params.spans[shared.unit.span];
    Barrier::init(&shared.keys_full, 1);
    for (int stage = 0; stage < Types::kStages; ++stage) {
      Barrier::init(&shared.q_full[stage], 1);
      Barrier::init(&shared.dout_full[stage], 1);
      // Every thread that computes says for itself that it has read (forward.cuh).
      Barrier::init(&shared.q_empty[stage], kComputeThreads);
      Barrier::init(&shared.dout_empty[stage], kComputeThreads);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kBlockThreads - kComputeThreads) {
    cutlass::arch::warpgroup_reg_dealloc<24>();
    if (threadIdx.x == 0) load_tiles<T, kWidth>(params, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<240>();
    if (threadIdx.x < kBlockThreads - 128) {
      compute<T, kWidth, kSoftcap, 0>(params, shared);
    } else {
      compute<T, kWidth, kSoftcap, 1>(params, shared);
    }
  }
#else
  __trap();  // engine.cpp does not launch what was built for another architecture
#endif
}

}  // namespace zigzag::cuda::hopper
