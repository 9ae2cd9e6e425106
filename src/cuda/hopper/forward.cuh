#pragma once

#include "cuda/hopper/common.cuh"
#include "cuda/hopper/fetch.cuh"

namespace zigzag::cuda::hopper {

/// A tile of queries as the warp groups that compute see it. Keys are counted from the span's
/// first.
struct ForwardTile {
  int row;         // of the shard: the first
  int live;        // rows of the tile that are the span's
  int head;        // the first
  int blocks;      // of keys; 0: there are no more tiles
  int keys;        // of the span
  int early_rows;  // tokens before this one stand at early_key + token, the others at late_key +
  int early_key;
  int late_key;
};

/// Types of the forward kernel: tiles, their places in shared memory and the matrix products.
/// T: cutlass::half_t or cutlass::bfloat16_t.
template <typename T, int kWidth>
struct Forward {
  static constexpr int kStages = 2;  // of queries, keys and values
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

  using QueryLayout = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_K_SW128_Atom<T>{}, Shape<Int<kForwardTile>, Int<kWidth>, Int<kStages>>{}));
  using KeyLayout = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_K_SW128_Atom<T>{}, Shape<Int<kKeyTile>, Int<kWidth>, Int<kStages>>{}));
  using KeyLayoutT = decltype(cute::composition(
      KeyLayout{}, Layout<Shape<Int<kWidth>, Int<kKeyTile>, Int<kStages>>,
                          cute::Stride<Int<kKeyTile>, _1, Int<kKeyTile * kWidth>>>{}));

  struct Shared {
    // The results of a tile are put where its queries were, row by row.
    alignas(1024) T q[kStages * kForwardTile * kWidth];
    alignas(1024) T k[kStages * kKeyTile * kWidth];
    alignas(1024) T v[kStages * kKeyTile * kWidth];
    std::uint64_t q_full[kStages], q_empty[kStages];
    std::uint64_t k_full[kStages], k_empty[kStages];
    std::uint64_t v_full[kStages], v_empty[kStages];
    std::uint64_t tile_full[kStages], tile_empty[kStages];
    // Volatile: CUTLASS's barriers do not tell the compiler that they order memory.
    volatile ForwardTile tile[kStages];
    volatile int block[kStages];  // of the keys in k
    FetchBuffer fetch;
  };
};

/// The tile of queries with a number.
__device__ __forceinline__ const ForwardUnit& unit_of(const ForwardParams& params, int number,
                                                      int& head) {
  const int in_section = number % (params.unit_count * params.section);
  head = params.tile_heads * (number / (params.unit_count * params.section) * params.section +
                              in_section % params.section);
  return params.units[in_section / params.section];
}

/// What the warp groups that compute are told of a tile.
__device__ __forceinline__ void tell(volatile ForwardTile& told, const ForwardParams& params,
                                     const ForwardUnit& unit, const Span& span, int head) {
  const int end_block = (unit.end_key + kKeyTile - 1) / kKeyTile;
  told.row = span.q_begin + unit.first_row;
  told.live = min(params.tile_tokens, span.q_count - unit.first_row) * params.tile_heads;
  told.head = head;
  told.blocks = end_block - unit.first_block;
  told.keys = span.k_count;
  told.early_rows = span.q_early - unit.first_row;
  told.early_key = span.early_position + unit.first_row - span.k_position;
  told.late_key = span.late_position + unit.first_row - span.q_early - span.k_position;
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
  // A block's values are wanted one block later than its keys. Those of a tile's last block do not
  // wait for the next tile's queries, which have to wait until they have been worked on.
  struct {
    int row, head;
    bool own;
  } before{};
  const auto give_values = [&] {
    give(before.own ? params.own_v : params.v, shared.v_full, shared.v_empty, shared.v, n - 1,
         before.row, before.head);
  };
  int number = atomicAdd(params.next_tile, 1);
  for (int i = 0;; ++i) {
    const int slot = i % Types::kStages;
    const auto phase = static_cast<std::uint32_t>(i / Types::kStages + 1) % 2;
    const bool live = number < params.tiles;
    Barrier::wait(&shared.tile_empty[slot], phase);
    if (!live) {
      shared.tile[slot].blocks = 0;
      Barrier::arrive(&shared.tile_full[slot]);
      if (n > 0) give_values();
      return;
    }
    int head = 0;
    const ForwardUnit& unit = unit_of(params, number, head);
    const Span& span = params.spans[unit.span];
    tell(shared.tile[slot], params, unit, span, head);
    Barrier::arrive(&shared.tile_full[slot]);
    if (n > 0) give_values();
    const int kv_head = head / params.group;
    Barrier::wait(&shared.q_empty[slot], phase);
    Barrier::arrive_and_expect_tx(&shared.q_full[slot], params.tile_tokens * params.tile_heads *
                                                            kWidth * static_cast<int>(sizeof(T)));
    load_tile<kWidth>(params.q, &shared.q_full[slot], shared.q + slot * (kForwardTile * kWidth),
                      kForwardTile, head, span.q_begin + unit.first_row);
    bool first = true;
    int left = (unit.end_key + kKeyTile - 1) / kKeyTile - unit.first_block;
#pragma unroll 1
    for (int r = 0; r < kKeyRuns; ++r) {
      const KeyRun run = unit.runs[r];
      for (int block = run.end - 1; block >= run.begin; --block, ++n) {
        // While there is nothing else to do; earlier, tiles would be dealt less evenly.
        if (--left == 0) number = atomicAdd(params.next_tile, 1);
        const int row = run.row + block * kKeyTile;
        if (!run.own && !all_here) {
          all_here =
              wait_for_rows(params.fetch, row, min(row + kKeyTile, span.k_begin + span.k_count));
        }
        give(run.own ? params.own_k : params.k, shared.k_full, shared.k_empty, shared.k, n, row,
             kv_head, block);
        if (!first) give_values();
        first = false;
        before = {row, kv_head, run.own != 0};
      }
    }
  }
}

/// What the two rows of a thread see of the keys of a tile, which are counted from the span's
/// first.
struct ForwardMask {
  int first_key[2];
  int last_key[2];
  int all_from;  // what every row of the tile sees
  int all_to;
};

/// Of the two rows of a thread: the highest score so far and the sum of weights that are relative
/// to it.
struct ForwardSums {
  float most[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};
};

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
  typename Types::MmaScores mma_scores;
  typename Types::MmaValues mma_values;
  const auto scores_slice = mma_scores.get_slice(group * 128);
  const auto values_slice = mma_values.get_slice(group * 128);
  const auto q_tiles = scores_slice.partition_fragment_A(sq);
  const auto k_tiles = scores_slice.partition_fragment_B(sk);
  const auto v_tiles = values_slice.partition_fragment_B(sv_t);
  const auto store_out = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, T>{}, mma_values);
  const auto store_slice = store_out.get_slice(thread);
  using AsFactor = Layout<Shape<Shape<_2, _2, _2>, _1, Int<kKeyTile / 16>>>;

  auto out = partition_fragment_C(mma_values, Shape<Int<kForwardTile>, Int<kWidth>>{});
  const int row = group * 64 + in_group / 32 * 16 + lane / 4;  // of values 0, 1; the others: + 8
  const int column = lane % 4 * 2;                             // of value 0 of every 8 columns

  const auto token_of = [&](int tile_row) { return tile_row * params.by_tile_heads >> 16; };
  const auto mask_of = [&](const ForwardTile& tile) {
    // Rows behind the last are not stored.
    const auto key_of = [&](int tile_row) {
      const int token = token_of(min(tile_row, tile.live - 1));
      return token + (token < tile.early_rows ? tile.early_key : tile.late_key);
    };
    ForwardMask mask;
    mask.all_from = key_of(kForwardTile - 1) - params.left;
    mask.all_to = min(tile.keys - 1, key_of(0) + params.right);
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      mask.first_key[y] = key_of(row + 8 * y) - params.left;
      mask.last_key[y] = min(tile.keys - 1, key_of(row + 8 * y) + params.right);
    }
    return mask;
  };

  // Turns scores into weights and `sums` into those of all keys so far; gives what out is to be
  // multiplied by.
  const auto soften = [&](auto& s, int block, const ForwardMask& mask, ForwardSums& sums,
                          float(&factor)[2]) {
    const int from = block * kKeyTile;
    if constexpr (kSoftcap) {
#pragma unroll
      for (int j = 0; j < size(s); ++j) s(j) = tanh_fast(s(j) * params.cap_scale);
    }
    if (from < mask.all_from || from + kKeyTile - 1 > mask.all_to) {
#pragma unroll
      for (int j = 0; j < size(s); ++j) {
        const int y = j / 2 % 2;
        const int key = from + j / 4 * 8 + column + j % 2;
        if (key < mask.first_key[y] || key > mask.last_key[y]) s(j) = -INFINITY;
      }
    }
    // Several chains side by side: there are too few warps to hide the latency of one.
    float highest[2][2] = {{sums.most[0], sums.most[0]}, {sums.most[1], sums.most[1]}};
#pragma unroll
    for (int j = 0; j < size(s); ++j) {
      float& high = highest[j / 2 % 2][j % 2];
      high = fmaxf(high, s(j));
    }
    float shift[2];
    float added[2][2] = {};
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const float before = sums.most[y];
      float most = fmaxf(highest[y][0], highest[y][1]);
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      sums.most[y] = most;
      // A row without a key so far keeps weights of 0.
      shift[y] = most == -INFINITY ? 0.0f : __fmul_rn(most, params.scale_log2);
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
    for (int y = 0; y < 2; ++y) {
      sums.sum[y] = sums.sum[y] * factor[y] + (added[y][0] + added[y][1]);
    }
  };
  const auto wait_full = [&](std::uint64_t* full, int count) {
    Barrier::wait(&full[count % kStages], static_cast<std::uint32_t>(count / kStages) % 2);
  };
  const auto leave = [&](std::uint64_t* empty, int count) {
    Barrier::arrive(&empty[count % kStages]);
  };
  const auto take_tile = [&](int count) {
    wait_full(shared.tile_full, count);
    const volatile ForwardTile& told = shared.tile[count % kStages];
    const ForwardTile tile{told.row,  told.live,       told.head,      told.blocks,
                           told.keys, told.early_rows, told.early_key, told.late_key};
    leave(shared.tile_empty, count);
    return tile;
  };
  // Values behind the document's last belong to others and may hold anything. The last block comes
  // first. Each warp group clears them for itself.
  const auto clear_values = [&](const ForwardTile& tile, int block, int count) {
    const int keys = tile.keys - block * kKeyTile;
    if (keys >= kKeyTile) return;
    wait_full(shared.v_full, count);
    clear_rows<kKeyTile, kWidth, 128>(shared.v + count % kStages * (kKeyTile * kWidth), keys,
                                      in_group);
    cutlass::arch::fence_view_async_shared();
    group_barrier(group);
  };
  // The sums of all keys; gives what out is to be multiplied by.
  const auto finish_sums = [&](const ForwardTile& tile, ForwardSums& sums, float(&factor)[2]) {
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      float sum = sums.sum[y];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      factor[y] = sum == 0 ? 0.0f : 1.0f / sum;
      if (lane % 4 != 0 || row + 8 * y >= tile.live) continue;
      // log2 to log: x ln 2.
      const float lse = sum == 0 ? -INFINITY
                                 : (__fmul_rn(sums.most[y], params.scale_log2) + __log2f(sum)) *
                                       0.6931471805599453f;
      const int token = token_of(row + 8 * y);
      const int head = tile.head + row + 8 * y - token * params.tile_heads;
      params.lse[(tile.row + token) * params.lse_row + head] = lse;
    }
  };
  // Writes out where the queries were, and from there to its place.
  const auto store = [&](const ForwardTile& tile, int slot, const float(&factor)[2]) {
    const auto sout = sq(_, _, slot);
#pragma unroll
    for (int j = 0; j < size(out); ++j) out(j) *= factor[j / 2 % 2];
    auto results = rounded<T>(out);
    auto stored_out = store_slice.partition_D(sout);
    copy(store_out, store_slice.retile_S(results), stored_out);
    cutlass::arch::fence_view_async_shared();
    group_barrier(group);
    constexpr int kPacks = kWidth / 8;
    // Unknown to the compiler, which would keep the places of all passes in registers.
    int first = in_group;
    asm volatile("" : "+r"(first));
#pragma unroll
    for (int pass = 0; pass < 64 * kPacks / 128; ++pass) {
      const int at = pass * 128 + first;
      const int out_row = group * 64 + at / kPacks;
      const int out_column = at % kPacks * 8;
      if (out_row >= tile.live || out_column >= params.head_dim) continue;
      const int token = token_of(out_row);
      const int head = tile.head + out_row - token * params.tile_heads;
      T* const target = static_cast<T*>(params.out.data) + (tile.row + token) * params.out.row +
                        head * params.out.head + out_column;
      *reinterpret_cast<uint4*>(target) =
          *reinterpret_cast<const uint4*>(&sout(out_row, out_column));
    }
    Barrier::arrive(&shared.q_empty[slot]);
  };

  // The warp groups take turns in giving work to the tensor cores, so that the softmax of one runs
  // under the products of the other.
  if (group == 1) pass_turn(group);

  int n = 0;  // blocks of keys so far
  ForwardTile tile = take_tile(0);
  ForwardMask mask;
  ForwardSums sums;
  float factor[2];
  auto p = make_tensor<T>(
      partition_fragment_C(mma_scores, Shape<Int<kForwardTile>, Int<kKeyTile>>{}).layout());
  auto p_factor = make_tensor(p.data(), AsFactor{});
  if (tile.blocks > 0) {
    mask = mask_of(tile);
    auto s = partition_fragment_C(mma_scores, Shape<Int<kForwardTile>, Int<kKeyTile>>{});
    wait_full(shared.q_full, 0);
    wait_full(shared.k_full, 0);
    const int block = shared.block[0];
    take_turn(group);
    multiply<true>(mma_scores, q_tiles(_, _, _, 0), k_tiles(_, _, _, 0), s);
    pass_turn(group);
    clear_values(tile, block, 0);
    warpgroup_wait<0>();
    warpgroup_fence_operand(s);
    leave(shared.k_empty, 0);
    soften(s, block, mask, sums, factor);
    round_into(s, p);
    clear(out);
  }
  for (int i = 0; tile.blocks > 0; ++i) {
    const int slot = i % kStages;
    const int next_slot = (i + 1) % kStages;
    for (int left = tile.blocks - 1; left > 0; --left, ++n) {
      auto next = partition_fragment_C(mma_scores, Shape<Int<kForwardTile>, Int<kKeyTile>>{});
      wait_full(shared.k_full, n + 1);
      const int block = shared.block[(n + 1) % kStages];
      take_turn(group);
      multiply<true>(mma_scores, q_tiles(_, _, _, slot), k_tiles(_, _, _, (n + 1) % kStages), next);
      wait_full(shared.v_full, n);
      multiply<false>(mma_values, p_factor, v_tiles(_, _, _, n % kStages), out);
      pass_turn(group);
      warpgroup_wait<1>();
      warpgroup_fence_operand(next);
      leave(shared.k_empty, n + 1);
      soften(next, block, mask, sums, factor);
      // Never so: a wait moves up to the last branch before it, and the weights are to be made
      // while the product goes on.
      if (sums.sum[0] + sums.sum[1] < 0) __nanosleep(1000);
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
    const ForwardTile next_tile = take_tile(i + 1);
    if (next_tile.blocks == 0) {
      wait_full(shared.v_full, n);
      multiply<false>(mma_values, p_factor, v_tiles(_, _, _, n % kStages), out);
      finish_sums(tile, sums, factor);
      warpgroup_wait<0>();
      warpgroup_fence_operand(out);
      leave(shared.v_empty, n);
      store(tile, slot, factor);
      break;
    }
    // The next tile's first scores and their softmax go together with the last values of this one.
    auto next = partition_fragment_C(mma_scores, Shape<Int<kForwardTile>, Int<kKeyTile>>{});
    mask = mask_of(next_tile);
    wait_full(shared.q_full, i + 1);
    wait_full(shared.k_full, n + 1);
    const int block = shared.block[(n + 1) % kStages];
    take_turn(group);
    multiply<true>(mma_scores, q_tiles(_, _, _, next_slot), k_tiles(_, _, _, (n + 1) % kStages),
                   next);
    wait_full(shared.v_full, n);
    multiply<false>(mma_values, p_factor, v_tiles(_, _, _, n % kStages), out);
    pass_turn(group);
    float last_factor[2];
    finish_sums(tile, sums, last_factor);
    sums = {};
    clear_values(next_tile, block, n + 1);
    warpgroup_wait<1>();
    warpgroup_fence_operand(next);
    leave(shared.k_empty, n + 1);
    soften(next, block, mask, sums, factor);
    if (sums.sum[0] + sums.sum[1] < 0) __nanosleep(1000);  // as above
    warpgroup_wait<0>();
    warpgroup_fence_operand(out);
    leave(shared.v_empty, n);
    store(tile, slot, last_factor);
    ++n;
    round_into(next, p);
    clear(out);
    tile = next_tile;
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
    Barrier::init(&shared.fetch.full, 1);
    for (int stage = 0; stage < Types::kStages; ++stage) {
      for (std::uint64_t* full : {shared.q_full, shared.k_full, shared.v_full, shared.tile_full}) {
        Barrier::init(full + stage, 1);
      }
      for (std::uint64_t* empty :
           {shared.q_empty, shared.k_empty, shared.v_empty, shared.tile_empty}) {
        Barrier::init(empty + stage, kReaders);
      }
    }
    cutlass::arch::fence_barrier_init();
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
