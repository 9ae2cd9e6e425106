#pragma once

#include <cstdint>

namespace zigzag::cuda {

constexpr int kCopyThreads = 256;
/// Vectors that a thread moves: many for long copies, fewer where blocks would be few and the last
/// of them leave the GPU half empty.
constexpr int kCopyUnroll = 8;
constexpr int kCopyShortUnroll = 4;
constexpr std::int64_t kCopyShortBlocks = 4096;
/// Sources of one launch, and entries of a table that travels with the launch itself; few of both
/// make the launch shorter.
constexpr int kMaxSources = 64;
constexpr int kInlineEntries = 48;
constexpr int kFewSources = 4;
constexpr int kFewEntries = 16;

/// Rows [begin, next entry's begin) of the rows of a launch taken end to end.
struct CopyEntry {
  std::int64_t begin;
  std::int64_t source_row;
  std::int64_t destination_row;
  std::int64_t source;
};

/// A tensor as rows of `runs` runs of bytes without gaps.
struct CopySide {
  char* data;
  std::int64_t row_stride;  // bytes
  std::int64_t run_stride;  // bytes
  std::int64_t twin;        // bytes from here to the tensor's twin, which the same launch copies
};

/// One launch. Sizes of a row count vectors of the launch's width.
struct CopyShape {
  CopySide destination;
  const CopyEntry* table;  // null: inline_table
  std::int64_t entries;
  std::int64_t rows;
  std::uint32_t row_vectors;
  std::uint32_t run_vectors;
};

template <int kSources, int kEntries>
struct CopyParamsOf : CopyShape {
  CopySide sources[kSources];
  CopyEntry inline_table[kEntries];
};
using CopyParams = CopyParamsOf<kMaxSources, kInlineEntries>;
using FewCopyParams = CopyParamsOf<kFewSources, kFewEntries>;

}  // namespace zigzag::cuda
