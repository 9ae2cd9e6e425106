#pragma once

#include "cuda/hopper/common.cuh"
#include "cuda/hopper/fetch.cuh"

namespace zigzag::cuda::hopper {

/// Types of the forward kernel: tiles, their places in shared memory and the matrix products.
/// T: cutlass::half_t or cutlass::bfloat16_t.
template <typename T, int kWidth>
struct Forward {
  static constexpr int kStages = 2;
  static constexpr auto kK = cute::GMMA::Major::K;
  static constexpr auto kMn = cute::GMMA::Major::MN;

  // S [queries, keys] and out [queries, width]: each warp group has 64 queries.
  using MmaScores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float,
                                 Shape<Int<kForwardTile>, Int<kKeyTile>, Int<kWidth>>>(),
      Layout<Shape<_2, _1, _1>>{}));
  // P comes from the registers that it was made in.
  using MmaValues = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<T, T, float, Shape<Int<kForwardTile>, Int<kWidth>, Int<kKeyTile>>,
                                 kK, kMn>(),
      Layout<Shape<_2, _1, _1>>{}));

  using QueryLayout = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<T>{},
                                                   Shape<Int<kForwardTile>, Int<kWidth>>{}));
  using KeyLayout = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_K_SW128_Atom<T>{}, Shape<Int<kKeyTile>, Int<kWidth>, Int<kStages>>{}));
  using KeyLayoutT = decltype(cute::composition(
      KeyLayout{}, Layout<Shape<Int<kWidth>, Int<kKeyTile>, Int<kStages>>,
                          cute::Stride<Int<kKeyTile>, _1, Int<kKeyTile * kWidth>>>{}));

  struct Shared {
    alignas(1024) T q[kForwardTile * kWidth];
    alignas(1024) T k[kStages * kKeyTile * kWidth];
    alignas(1024) T v[kStages * kKeyTile * kWidth];
    alignas(1024) T out[kForwardTile * kWidth];
    std::uint64_t q_full, q_empty;
    std::uint64_t k_full[kStages], k_empty[kStages];
    std::uint64_t v_full[kStages], v_empty[kStages];
    std::uint64_t work_full[2], work_empty[2];
    // Volatile: CUTLASS's barriers do not tell the compiler that they order memory.
    volatile int work[2];         // numbers of tiles; negative: there are no more
    volatile int block[kStages];  // of the keys in k
    FetchBuffer fetch;
  };
};

/// A tile of queries.
struct ForwardTile {
  Span span;
  const KeyRun* runs;
  int run_count;
  int head;       // the first
  int first_row;  // of the span
  int live;       // rows of the tile that are the span's
  int blocks;     // of keys
};

__device__ __forceinline__ ForwardTile tile_of(const ForwardParams& params, int number) {
  const int in_section = number % (params.unit_count * params.section);
  const ForwardUnit& unit = params.units[in_section / params.section];
  ForwardTile tile;
  tile.span = params.spans[unit.span];
  tile.runs = params.runs + unit.first_run;
  tile.run_count = unit.run_count;
  tile.head = params.tile_heads * (number / (params.unit_count * params.section) * params.section +
                                   in_section % params.section);
  tile.first_row = unit.first_row;
  tile.live = min(params.tile_tokens, tile.span.q_count - unit.first_row) * params.tile_heads;
  tile.blocks = (unit.end_key + kKeyTile - 1) / kKeyTile - unit.first_block;
  return tile;
}

template <typename T, int kWidth>
__device__ void load_forward(const ForwardParams& params,
                             typename Forward<T, kWidth>::Shared& shared) {
  using Types = Forward<T, kWidth>;
  constexpr int kTileBytes = kKeyTile * kWidth * static_cast<int>(sizeof(T));
  int n = 0;  // blocks of keys given so far
  bool all_here = params.fetch.piece_count == 0;
  const auto give = [&](const CUtensorMap& map, std::uint64_t* full, std::uint64_t* empty, T* tiles,
                        int count, int row, int head, int block = -1) {
    const int stage = count % Types::kStages;
    Barrier::wait(&empty[stage], static_cast<std::uint32_t>(count / Types::kStages + 1) % 2);
    if (block >= 0) shared.block[stage] = block;
    Barrier::arrive_and_expect_tx(&full[stage], kTileBytes);
    load_tile<kWidth>(map, &full[stage], tiles + stage * kKeyTile * kWidth, kKeyTile, row, head);
  };
  for (int i = 0;; ++i) {
    const int number = atomicAdd(params.next_tile, 1);
    const bool live = number < params.tiles;
    Barrier::wait(&shared.work_empty[i % 2], static_cast<std::uint32_t>(i / 2 + 1) % 2);
    shared.work[i % 2] = live ? number : -1;
    Barrier::arrive(&shared.work_full[i % 2]);
    if (!live) break;
    const ForwardTile tile = tile_of(params, number);
    const int kv_head = tile.head / params.group;
    Barrier::wait(&shared.q_empty, static_cast<std::uint32_t>(i + 1) % 2);
    Barrier::arrive_and_expect_tx(&shared.q_full, params.tile_tokens * params.tile_heads * kWidth *
                                                      static_cast<int>(sizeof(T)));
    load_tile<kWidth>(params.q, &shared.q_full, shared.q, kForwardTile, tile.head,
                      tile.span.q_begin + tile.first_row);
    // A block's values are wanted one block later than its keys.
    int before_row = -1;
    bool before_own = false;
    const auto give_values = [&] {
      give(before_own ? params.own_v : params.v, shared.v_full, shared.v_empty, shared.v, n - 1,
           before_row, kv_head);
    };
    for (int r = 0; r < tile.run_count; ++r) {
      const KeyRun run = tile.runs[r];
      for (int block = run.end - 1; block >= run.begin; --block, ++n) {
        const int row = run.row + block * kKeyTile;
        if (!run.own && !all_here) {
          all_here = wait_for_rows(params.fetch, row,
                                   min(row + kKeyTile, tile.span.k_begin + tile.span.k_count));
        }
        give(run.own ? params.own_k : params.k, shared.k_full, shared.k_empty, shared.k, n, row,
             kv_head, block);
        if (before_row >= 0) give_values();
        before_row = row;
        before_own = run.own;
      }
    }
    give_values();
  }
}

template <typename T, int kWidth, bool kSoftcap>
__device__ void compute_forward(const ForwardParams& params,
                                typename Forward<T, kWidth>::Shared& shared) {
  using namespace cute;
  using Types = Forward<T, kWidth>;
  constexpr int kStages = Types::kStages;
  const int thread = static_cast<int>(threadIdx.x) - (kBlockThreads - kComputeThreads);
  const int group = __shfl_sync(0xffffffffu, thread / 128, 0);
  const int in_group = thread % 128;
  const int lane = thread % 32;

  const auto sq = make_tensor(make_smem_ptr(shared.q), typename Types::QueryLayout{});
  const auto sk = make_tensor(make_smem_ptr(shared.k), typename Types::KeyLayout{});
  const auto sv_t = make_tensor(make_smem_ptr(shared.v), typename Types::KeyLayoutT{});
  const auto sout = make_tensor(make_smem_ptr(shared.out), typename Types::QueryLayout{});
  typename Types::MmaScores mma_scores;
  typename Types::MmaValues mma_values;
  const auto scores_slice = mma_scores.get_slice(group * 128);
  const auto values_slice = mma_values.get_slice(group * 128);
  const auto q_tiles = scores_slice.partition_fragment_A(sq);
  const auto k_tiles = scores_slice.partition_fragment_B(sk);
  const auto v_tiles = values_slice.partition_fragment_B(sv_t);
  const auto store_out = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, T>{}, mma_values);
  const auto store_slice = store_out.get_slice(thread);
  auto stored_out = store_slice.partition_D(sout);
  using AsFactor = Layout<Shape<Shape<_2, _2, _2>, _1, Int<kKeyTile / 16>>>;

  auto out = partition_fragment_C(mma_values, Shape<Int<kForwardTile>, Int<kWidth>>{});
  const int row = group * 64 + in_group / 32 * 16 + lane / 4;  // of values 0, 1; the others: + 8
  const int column = lane % 4 * 2;                             // of value 0 of every 8 columns

  // The warp groups take turns in giving work to the tensor cores, so that the softmax of one runs
  // under the products of the other.
  if (group == 1) pass_turn(group);

  int n = 0;  // blocks of keys so far
  for (int i = 0;; ++i) {
    Barrier::wait(&shared.work_full[i % 2], static_cast<std::uint32_t>(i / 2) % 2);
    const int number = shared.work[i % 2];
    Barrier::arrive(&shared.work_empty[i % 2]);
    if (number < 0) break;
    const ForwardTile tile = tile_of(params, number);
    const auto token_of = [&](int tile_row) { return tile_row * params.by_tile_heads >> 16; };
    // Keys are counted from the span's first; rows behind the last are not stored.
    const auto key_of = [&](int tile_row) {
      return position_of(tile.span, tile.first_row + token_of(min(tile_row, tile.live - 1))) -
             tile.span.k_position;
    };
    // What every row sees of the keys: none of them needs a mask.
    const int all_from = key_of(kForwardTile - 1) - params.left;
    const int all_to = min(tile.span.k_count - 1, key_of(0) + params.right);
    int first_key[2];  // that each of this thread's two rows sees
    int last_key[2];
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      first_key[y] = key_of(row + 8 * y) - params.left;
      last_key[y] = min(tile.span.k_count - 1, key_of(row + 8 * y) + params.right);
    }
    float most[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0, 0};

    // Turns scores into weights and `most` and `sum` into those of all keys so far; gives what out
    // is to be multiplied by.
    const auto soften = [&](auto& s, int block, float(&factor)[2]) {
      const int from = block * kKeyTile;
      if constexpr (kSoftcap) {
#pragma unroll
        for (int j = 0; j < size(s); ++j) s(j) = tanh_fast(s(j) * params.cap_scale);
      }
      if (from < all_from || from + kKeyTile - 1 > all_to) {
#pragma unroll
        for (int j = 0; j < size(s); ++j) {
          const int y = j / 2 % 2;
          const int key = from + j / 4 * 8 + column + j % 2;
          if (key < first_key[y] || key > last_key[y]) s(j) = -INFINITY;
        }
      }
      // Several chains side by side: there are too few warps to hide the latency of one.
      float highest[2][2] = {{most[0], most[0]}, {most[1], most[1]}};
#pragma unroll
      for (int j = 0; j < size(s); ++j) {
        float& high = highest[j / 2 % 2][j % 2];
        high = fmaxf(high, s(j));
      }
      float shift[2];
      float added[2][2] = {};
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const float before = most[y];
        most[y] = fmaxf(highest[y][0], highest[y][1]);
        most[y] = fmaxf(most[y], __shfl_xor_sync(0xffffffffu, most[y], 1));
        most[y] = fmaxf(most[y], __shfl_xor_sync(0xffffffffu, most[y], 2));
        // A row without a key so far keeps weights of 0.
        shift[y] = most[y] == -INFINITY ? 0.0f : __fmul_rn(most[y], params.scale_log2);
        // Rounded before it is subtracted, like the shift: exactly 1 where the maximum stays.
        factor[y] = exp2_fast(__fmul_rn(before, params.scale_log2) - shift[y]);
      }
#pragma unroll
      for (int j = 0; j < size(s); ++j) {
        const int y = j / 2 % 2;
        s(j) = exp2_fast(s(j) * params.scale_log2 - shift[y]);
        added[y][j % 2] += s(j);
      }
#pragma unroll
      for (int y = 0; y < 2; ++y) sum[y] = sum[y] * factor[y] + (added[y][0] + added[y][1]);
    };
    const auto wait_full = [&](std::uint64_t* full, int count) {
      Barrier::wait(&full[count % kStages], static_cast<std::uint32_t>(count / kStages) % 2);
    };
    const auto leave = [&](std::uint64_t* empty, int count) {
      Barrier::arrive(&empty[count % kStages]);
    };

    Barrier::wait(&shared.q_full, static_cast<std::uint32_t>(i) % 2);
    float factor[2];
    auto s = partition_fragment_C(mma_scores, Shape<Int<kForwardTile>, Int<kKeyTile>>{});
    wait_full(shared.k_full, n);
    int block = shared.block[n % kStages];
    take_turn(group);
    multiply<true>(mma_scores, q_tiles, k_tiles(_, _, _, n % kStages), s);
    pass_turn(group);
    // Values behind the document's last belong to others and may hold anything. The last block
    // comes first.
    if (tile.span.k_count - block * kKeyTile < kKeyTile) {
      wait_full(shared.v_full, n);
      clear_rows<kKeyTile, kWidth, kComputeThreads>(shared.v + n % kStages * (kKeyTile * kWidth),
                                                    tile.span.k_count - block * kKeyTile, thread);
      cutlass::arch::fence_view_async_shared();
      compute_barrier();
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(s);
    leave(shared.k_empty, n);
    soften(s, block, factor);
    auto p = rounded<T>(s);
    clear(out);
    for (int left = tile.blocks - 1; left > 0; --left, ++n) {
      auto next = partition_fragment_C(mma_scores, Shape<Int<kForwardTile>, Int<kKeyTile>>{});
      auto p_factor = make_tensor(p.data(), AsFactor{});
      wait_full(shared.k_full, n + 1);
      block = shared.block[(n + 1) % kStages];
      take_turn(group);
      multiply<true>(mma_scores, q_tiles, k_tiles(_, _, _, (n + 1) % kStages), next);
      wait_full(shared.v_full, n);
      multiply<false>(mma_values, p_factor, v_tiles(_, _, _, n % kStages), out);
      pass_turn(group);
      warpgroup_wait<1>();
      warpgroup_fence_operand(next);
      leave(shared.k_empty, n + 1);
      soften(next, block, factor);
      // Never so: a wait moves up to the last branch before it, and the weights are to be made
      // while the product goes on.
      if (sum[0] + sum[1] < 0) __nanosleep(1000);
      warpgroup_wait<0>();
      warpgroup_fence_operand(out);
      leave(shared.v_empty, n);
      round_into(next, p);
      // The maxima of most rows stay as they are after a few blocks.
      if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int j = 0; j < size(out); ++j) out(j) *= factor[j / 2 % 2];
      }
    }
    Barrier::arrive(&shared.q_empty);
    auto p_factor = make_tensor(p.data(), AsFactor{});
    wait_full(shared.v_full, n);
    multiply<false>(mma_values, p_factor, v_tiles(_, _, _, n % kStages), out);
    float lse[2];
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      sum[y] += __shfl_xor_sync(0xffffffffu, sum[y], 1);
      sum[y] += __shfl_xor_sync(0xffffffffu, sum[y], 2);
      // log2 to log: x ln 2.
      lse[y] = (__fmul_rn(most[y], params.scale_log2) + __log2f(sum[y])) * 0.6931471805599453f;
      if (sum[y] == 0) lse[y] = -INFINITY;
      factor[y] = sum[y] == 0 ? 0.0f : 1.0f / sum[y];
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(out);
    leave(shared.v_empty, n);
    ++n;
#pragma unroll
    for (int j = 0; j < size(out); ++j) out(j) *= factor[j / 2 % 2];
    if (lane % 4 == 0) {
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        if (row + 8 * y >= tile.live) continue;
        const int token = token_of(row + 8 * y);
        const int head = tile.head + row + 8 * y - token * params.tile_heads;
        params.lse[(tile.span.q_begin + tile.first_row + token) * params.lse_row + head] = lse[y];
      }
    }
    auto results = rounded<T>(out);
    // The rows that this group put here for the last tile have been read.
    group_barrier(group);
    copy(store_out, store_slice.retile_S(results), stored_out);
    group_barrier(group);
    constexpr int kPacks = kWidth / 8;
#pragma unroll
    for (int pass = 0; pass < 64 * kPacks / 128; ++pass) {
      const int at = pass * 128 + in_group;
      const int out_row = group * 64 + at / kPacks;
      const int out_column = at % kPacks * 8;
      if (out_row >= tile.live || out_column >= params.head_dim) continue;
      const int token = token_of(out_row);
      const int head = tile.head + out_row - token * params.tile_heads;
      T* const target = static_cast<T*>(params.out.data) +
                        (tile.span.q_begin + tile.first_row + token) * params.out.row +
                        head * params.out.head + out_column;
      *reinterpret_cast<uint4*>(target) =
          *reinterpret_cast<const uint4*>(&sout(out_row, out_column));
    }
  }
  // The other group's last arrival is taken, so that no barrier is left half full.
  if (group == 0) take_turn(group);
}

template <typename T, int kWidth, bool kSoftcap>
__global__ void __launch_bounds__(kBlockThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Types = Forward<T, kWidth>;
  auto& shared = shared_memory<typename Types::Shared>();
  if (threadIdx.x == 0) {
    // Every thread says for itself that it has read: one a warp costs as much, and race checkers do
    // not see that it speaks for the others.
    constexpr int kReaders = kComputeThreads;
    Barrier::init(&shared.q_full, 1);
    Barrier::init(&shared.q_empty, kReaders);
    Barrier::init(&shared.fetch.full, 1);
    for (int stage = 0; stage < Types::kStages; ++stage) {
      Barrier::init(&shared.k_full[stage], 1);
      Barrier::init(&shared.v_full[stage], 1);
      Barrier::init(&shared.k_empty[stage], kReaders);
      Barrier::init(&shared.v_empty[stage], kReaders);
    }
    for (int slot = 0; slot < 2; ++slot) {
      Barrier::init(&shared.work_full[slot], 1);
      Barrier::init(&shared.work_empty[slot], kReaders);
    }
    cutlass::arch::fence_barrier_init();
  }
  // Rows that no tile has: a NaN left there would have its warp scale out at every block of keys.
  const int rows = params.tile_tokens * params.tile_heads;
  if (rows < kForwardTile) {
    clear_rows<kForwardTile, kWidth, kBlockThreads>(shared.q, rows, static_cast<int>(threadIdx.x));
    cutlass::arch::fence_view_async_shared();
  }
  __syncthreads();
  if (threadIdx.x < kBlockThreads - kComputeThreads) {
    cutlass::arch::warpgroup_reg_dealloc<24>();
    if (threadIdx.x == 0) load_forward<T, kWidth>(params, shared);
    if (threadIdx.x == 32) fetch_rows(params.fetch, shared.fetch);
  } else {
    cutlass::arch::warpgroup_reg_alloc<240>();
    compute_forward<T, kWidth, kSoftcap>(params, shared);
  }
#else
  __trap();  // engine.cpp does not launch what was built for another architecture
#endif
}

}  // namespace zigzag::cuda::hopper
