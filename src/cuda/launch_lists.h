#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backend.h"
#include "cuda/cudnn_engine.h"
#include "cuda/device.h"
#include "cuda/sum_rows.h"

namespace zigzag::cuda {

/// Names the work of a rank on a pack: plan, rank and mask.
TableKey pack_key(const AttendArgs& args);

/// One item of a cuDNN launch, in rows. In a backward dq and dk/dv of the item go to rows of their
/// own, from `dq_begin` and `dk_begin`.
struct LaunchItem {
  std::int64_t q_begin, q_count, k_begin, k_count;
  std::int64_t dq_begin, dk_begin;
};

/// Items of one launch: like in mask and not too unlike in length.
struct Launch {
  std::vector<LaunchItem> items;
  CudnnMask mask = CudnnMask::kNone;
  std::int64_t max_q = 0;
  std::int64_t max_k = 0;
};

/// A forward as launches of cuDNN: one, or two where a pack has a few long and many short items.
struct ForwardLaunches {
  std::vector<Launch> launches;
};

/// A backward as launches of cuDNN: unmasked rectangles and square diagonal blocks whose gradients
/// add up to the whole (cuDNN computes every masked tile of any other causal form).
struct BackwardLaunches {
  std::vector<Launch> rectangles;
  std::vector<Launch> diagonals;
  std::int64_t rectangle_q = 0, rectangle_k = 0;  // rows of the rectangles' own gradients
  std::int64_t diagonal_q = 0, diagonal_k = 0;    // likewise
  int slots = 0;                                  // rectangles that a row of dq adds up at most
  SumTable dq;                                    // sources: diagonals, then a slot each
  SumTable dkv;                                   // likewise
  bool covers_keys = false;                       // every gathered row has exactly one gradient
};

/// True when cuDNN's launches can express the mask: causal or full, without a window.
bool launches_express(const Mask& mask);

/// Kept for the packs seen lately.
std::shared_ptr<const ForwardLaunches> forward_launches(const AttendArgs& args);
std::shared_ptr<const BackwardLaunches> backward_launches(const AttendArgs& args,
                                                          std::int64_t gathered_rows);

}  // namespace zigzag::cuda
