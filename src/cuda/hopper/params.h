#pragma once

#include <cstdint>

#include <cuda.h>

namespace zigzag::cuda::hopper {

/// Compiled head widths are 64 and 128; a head_dim takes the narrowest that holds it.
constexpr int width_of(std::int64_t head_dim) { return head_dim <= 64 ? 64 : 128; }
/// Rows of a tile of the backward: tokens, each with several of the query heads that share a KV
/// head one after another. A tile that spans few tokens has few keys that some of its rows do not
/// see, and few rows behind a document's last.
constexpr int kQueryTile = 64;
/// Keys of a tile.
constexpr int kKeyTile = 128;

/// A document's query rows on this rank: its early rows and then its late ones, one after another
/// in the shard. In the padded order of lse, delta and sums of dq, [heads / heads of a tile, tiles,
/// kQueryTile], every document starts a tile.
struct Span {
  std::int32_t q_begin;         // row of the shard
  std::int32_t q_count;         // early and late rows
  std::int32_t q_early;         // early rows
  std::int32_t early_position;  // position in the document of the first early row
  std::int32_t late_position;   // likewise of the first late row
  std::int32_t tile_begin;      // backward: first tile of the padded order
  std::int32_t k_begin;         // forward: first row of the gathered keys that these rows may see
  std::int32_t k_count;         // forward: rows of gathered keys from there on
  std::int32_t k_position;      // forward: position in the document of the first of them
};

/// What stands for no bound of a window; positions are below it.
constexpr std::int32_t kFar = std::int32_t{1} << 30;

/// Rows of a tile of the forward, likewise.
constexpr int kForwardTile = 128;
/// Heads of a tile at most.
constexpr int kMaxTileHeads = 16;

/// Blocks [begin, end) of kKeyTile keys of a span, counted from its first key; block b stands at
/// row `row` + b x kKeyTile of the gathered keys or, where `own`, of the rank's own.
struct KeyRun {
  std::int32_t begin;
  std::int32_t end;
  std::int32_t row;
  std::int32_t own;
};

/// Tokens whose tiles see no keys but those from the span's block `first_block` of keys on and
/// before its key `end_key`.
struct ForwardUnit {
  std::int32_t span;
  std::int32_t first_row;  // of the span
  std::int32_t first_block;
  std::int32_t end_key;
  // Runs of these blocks in the order in which they are worked on, each from its end down; the last
  // block of all comes first.
  std::int32_t first_run;
  std::int32_t run_count;
};

/// Rows of K and of V that are fetched by one copy each. They lie in one block of kKeyTile gathered
/// rows.
struct FetchPiece {
  std::int32_t source;  // the rank that lets its rows be read
  std::int32_t source_row;
  std::int32_t row;  // of the gathered keys
  std::int32_t rows;
};
/// Bytes of a piece's rows of K, or of V, at most.
constexpr int kFetchBytes = 16384;
/// Ranks that rows are fetched from at most.
constexpr int kFetchRanks = 16;

/// Rows that the forward kernel fetches from other ranks while it computes.
struct FetchParams {
  const FetchPiece* pieces;
  int piece_count;  // 0: K and V are complete before the launch
  int row_bytes;
  int rows;                    // of all pieces
  const std::int32_t* wanted;  // of each kKeyTile gathered rows: rows that pieces bring
  int* arrived;  // of each kKeyTile gathered rows: those that are there. 0 before the launch, as
                 // the others
  int* arrived_rows;  // of all of them
  int* next_piece;
  const char* k[kFetchRanks];  // rows of each rank, without gaps
  const char* v[kFetchRanks];
  char* gathered_k;  // likewise
  char* gathered_v;
};

/// Work of one block of threads in a backward: up to kKeyTile keys of one KV head against the query
/// tiles of a document that see any of them, for `heads` query heads.
struct BackwardUnit {
  std::int32_t span;
  std::int32_t k_row;       // first row of k and v
  std::int32_t k_count;     // 1..kKeyTile
  std::int32_t k_position;  // of the first key in its document
  std::int32_t dk_row;      // first row of dk and dv
  std::int32_t first_tile;  // query tiles [first_tile, end_tile) of the span
  std::int32_t end_tile;
  std::int32_t first_full;  // of these, tiles [first_full, end_full) have all of their rows see
  std::int32_t end_full;    // all keys of a whole tile of keys
  std::int32_t kv_head;
  std::int32_t head;   // first query head
  std::int32_t heads;  // number of query heads
  std::int32_t split;  // which of several sums of dk and dv these heads add to
};

/// A tensor [rows, heads, head_dim] whose elements of a head lie side by side.
struct Rows {
  void* data;
  std::int64_t row;   // elements from row to row
  std::int64_t head;  // elements from head to head
};

/// What the forward kernel works on; the maps are those of make_tensor_map.
struct ForwardParams {
  CUtensorMap q;             // [local, heads, head_dim], boxes of tile_tokens x tile_heads
  CUtensorMap k, v;          // [keys, kv_heads, head_dim], boxes of kKeyTile rows
  CUtensorMap own_k, own_v;  // [local, kv_heads, head_dim], likewise; only where rows are fetched
  FetchParams fetch;
  const Span* spans;
  const ForwardUnit* units;
  const KeyRun* runs;
  int unit_count;
  int tiles;    // units x heads / tile_heads
  int section;  // tiles of a unit that are numbered unit after unit before its others are
  int tile_tokens;
  int tile_heads;
  int by_tile_heads;  // a row of a tile times this / 2^16 is its token
  int* next_tile;     // 0 before the launch
  Rows out;           // [local, heads, head_dim]
  float* lse;         // [local, heads]
  std::int64_t lse_row;
  int group;  // query heads of a KV head
  int head_dim;
  float scale_log2;  // (scale or, with a softcap, softcap) x log2(e), positive
  float cap_scale;   // with a softcap: scale / softcap
  int left, right;   // a query at i sees keys at i - left .. i + right; kFar: no bound
};

/// What the backward kernel works on; the maps are those of make_tensor_map.
struct BackwardParams {
  CUtensorMap q, dout;  // [local, heads, head_dim], boxes of tile_heads x kQueryTile / tile_heads
  CUtensorMap k, v;     // [keys, kv_heads, head_dim], boxes of kKeyTile rows
  const Span* spans;
  const BackwardUnit* units;
  const float* lse;           // in the padded order, x log2(e); +inf where there is no row
  const float* delta;         // in the padded order
  float* dq;                  // in the padded order, tiles of width columns as fragments lie
  Rows dk, dv;                // [keys, kv_heads, head_dim]
  std::int64_t split_stride;  // elements from one split's dk and dv to the next
  std::int64_t tiles;
  int tile_heads_log2;
  int head_dim;
  float scale;
  float scale_log2;  // (scale or, with a softcap, softcap) x log2(e)
  float one_by_scale_log2;
  float cap_scale;      // with a softcap: scale / softcap
  bool sums_are_float;  // dk and dv; otherwise the kernel's type
  int left, right;      // a query at i sees keys at i - left .. i + right; kFar: no bound
};

/// What the passes before and after the backward kernel work on.
struct PassParams {
  const Span* spans;
  const std::int32_t* tile_span;  // [tiles]: the span of each tile
  std::int64_t tiles;
  int tile_heads_log2;
  int heads;
  int head_dim;
  Rows out, dout, dq;
  const float* lse;  // [local, heads]
  std::int64_t lse_row;
  float* lse_log2;  // in the padded order
  float* delta;     // likewise
  float* dq_sums;   // likewise, tiles of width columns as fragments lie
  float scale;
};

/// Launches the kernel for element type T, with or without a softcap, with `blocks` blocks, at most
/// one a multiprocessor. forward_instance.cu.in makes one file a type, width and kind of softcap;
/// backward_instance.cu.in likewise.
template <typename T, int kWidth, bool kSoftcap>
void run_forward(const ForwardParams& params, int blocks, void* stream);

/// Launches the kernel for element type T, with or without a softcap, a block a unit.
template <typename T, int kWidth, bool kSoftcap>
void run_backward(const BackwardParams& params, std::int64_t units, void* stream);

/// delta, lse in the padded order, and sums of dq cleared.
template <typename T>
void run_before(const PassParams& params, int width, void* stream);
/// dq in the tensors' type from its sums.
template <typename T>
void run_after(const PassParams& params, int width, void* stream);

}  // namespace zigzag::cuda::hopper
