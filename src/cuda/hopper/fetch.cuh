#pragma once

#include "cuda/hopper/common.cuh"

// How the forward kernel fetches other ranks' rows while it computes: one thread of every block
// takes piece after piece through shared memory, the copies made by the copy unit of its
// multiprocessor. Nobody waits for a block that has not started: whoever runs fetches.
namespace zigzag::cuda::hopper {

struct FetchBuffer {
  alignas(128) char k[kFetchBytes];
  alignas(128) char v[kFetchBytes];
  std::uint64_t full;
};

/// Between what this thread has seen and what the copy units read or have written.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ __forceinline__ int load_acquire(const int* address) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void add_release(int* address, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

/// One thread's part of the work.
__device__ __forceinline__ void fetch_rows(const FetchParams& fetch, FetchBuffer& buffer) {
  for (std::uint32_t phase = 0; fetch.piece_count > 0; phase ^= 1) {
    const int number = atomicAdd(fetch.next_piece, 1);
    if (number >= fetch.piece_count) return;
    const FetchPiece piece = fetch.pieces[number];
    const int bytes = piece.rows * fetch.row_bytes;
    const std::int64_t from = std::int64_t{piece.source_row} * fetch.row_bytes;
    const std::int64_t to = std::int64_t{piece.row} * fetch.row_bytes;
    Barrier::arrive_and_expect_tx(&buffer.full, static_cast<std::uint32_t>(2 * bytes));
    cute::SM90_BULK_COPY_G2S::copy(fetch.k[piece.source] + from, &buffer.full, buffer.k, bytes);
    cute::SM90_BULK_COPY_G2S::copy(fetch.v[piece.source] + from, &buffer.full, buffer.v, bytes);
    Barrier::wait(&buffer.full, phase);
    cute::SM90_BULK_COPY_S2G::copy(buffer.k, fetch.gathered_k + to, bytes);
    cute::SM90_BULK_COPY_S2G::copy(buffer.v, fetch.gathered_v + to, bytes);
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
    fence_copies();
    add_release(&fetch.arrived[piece.row / kKeyTile], piece.rows);
    add_release(fetch.arrived_rows, piece.rows);
  }
}

/// Waits until gathered rows [row, end) can be loaded; true when all are there, so that there is
/// nothing more to wait for.
__device__ __forceinline__ bool wait_for_rows(const FetchParams& fetch, int row, int end) {
  const int first = row / kKeyTile;
  const int last = (end - 1) / kKeyTile;
  bool all = false;
  while (true) {
    all = load_acquire(fetch.arrived_rows) == fetch.rows;
    if (all || (load_acquire(&fetch.arrived[first]) == fetch.wanted[first] &&
                load_acquire(&fetch.arrived[last]) == fetch.wanted[last])) {
      break;
    }
    __nanosleep(64);
  }
  fence_copies();
  return all;
}

}  // namespace zigzag::cuda::hopper
