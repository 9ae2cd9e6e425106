#pragma once

#include <cstdint>

namespace zigzag::cuda {

/// Elements between rows and between heads of a [rows, heads, head_dim] tensor.
struct RowHeadStrides {
  std::int64_t row;
  std::int64_t head;
};

/// A work item on the device. Positions are inside the document.
struct FmaItem {
  std::int64_t q_begin, q_count, q_position;
  std::int64_t k_begin, k_count, k_position;
};

/// The gathered rows of one document and the work items that may see them (-1: none).
struct FmaKeys {
  std::int64_t begin, count, position;
  std::int64_t items[2];
};

/// What the kernels of plain multiply-adds work on. Types of q, k, v, out, dout, dq are the
/// kernel's own.
struct FmaParams {
  const void* q;     // [local, heads, head_dim]
  const void* k;     // [gathered, kv_heads, head_dim]
  const void* v;     // [gathered, kv_heads, head_dim]
  const void* dout;  // [local, heads, head_dim]
  void* out;         // [local, heads, head_dim], read by the backward
  float* lse;        // [local, heads], read by the backward
  float* delta;      // [local, heads] contiguous: sum over head_dim of out x dout
  void* dq;          // [local, heads, head_dim]
  void* dk;          // [gathered, kv_heads, head_dim], float32 or the kernel's type
  void* dv;          // [gathered, kv_heads, head_dim], float32 or the kernel's type
  RowHeadStrides q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides;
  RowHeadStrides dk_strides, dv_strides, lse_strides;
  const FmaItem* items;
  const std::int64_t* q_tiles;  // [items + 1]: first tile of each item
  std::int64_t item_count;
  const FmaKeys* keys;
  const std::int64_t* k_tiles;  // [documents + 1]: first tile of each document
  std::int64_t key_count;
  std::int64_t local_rows;
  int heads, kv_heads, head_dim;
  float scale;
  float softcap;             // 0: none
  std::int64_t left, right;  // query i sees keys i - left .. i + right; < 0: unbounded
  bool sums_are_float;       // type of dk and dv
  bool aligned;              // every address and stride allows accesses of 4 elements
};

/// Query and key rows of a tile; the same for every head_dim and kernel, since tables count tiles.
constexpr int kFmaTile = 64;

/// Launches the kernels of one element type; src/cuda/fma_instance.cu.in makes one file a type.
template <typename T>
void fma_forward(const FmaParams& params, std::int64_t q_tiles, void* stream);
template <typename T>
void fma_backward(const FmaParams& params, std::int64_t q_tiles, std::int64_t k_tiles,
                  void* stream);

}  // namespace zigzag::cuda
