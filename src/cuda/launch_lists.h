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

/// One item of a cuDNN launch, in rows. In a backward dq goes to the query's own rows (cuDNN 9.19
/// addresses dq by the offsets of q) and dk/dv to rows of their own from `dk_begin` on.
struct LaunchItem {
  std::int64_t q_begin, q_count, k_begin, k_count;
  std::int64_t dk_begin;
  int dk_source = 0;  // backward: which source of BackwardLaunches::dkv these rows are
};

/// Items of one launch: like in mask and not too unlike in length. Launches of one layer share a
/// dq, to which items with the same query rows add.
struct Launch {
  std::vector<LaunchItem> items;
  CudnnMask mask = CudnnMask::kNone;
  std::int64_t max_q = 0;
  std::int64_t max_k = 0;
  int layer = 0;
  bool early = false;  // backward: needs no keys but the rank's own rows
};

/// A forward as launches of cuDNN: one, or two where a pack has a few long and many short items.
struct ForwardLaunches {
  std::vector<Launch> launches;
  std::int64_t equal_length = 0;  // of all documents, on one rank that owns them whole; else 0
};

/// A backward as launches of cuDNN: square diagonal blocks (layer 0) and unmasked rectangles, whose
/// gradients add up to the whole (cuDNN computes every masked tile of any other causal form).
struct BackwardLaunches {
  std::vector<Launch> launches;
  int layers = 1;  // sources of dq: layer 0, then those of the rectangles
  std::int64_t gathered_rows = 0;
  std::int64_t early_k = 0;       // rows of dk and dv that the early launches write
  std::int64_t late_k = 0;        // likewise the others
  SumTable dq;                    // sources: the layers
  SumTable dkv;                   // sources: early launches, the others, the others once more
  bool one_layer = false;         // a single layer owns every query row
  bool covers_keys = false;       // and every gathered row has exactly one gradient
  std::int64_t equal_length = 0;  // as above
};

/// True when cuDNN's launches can express the mask: causal or full, without a window.
bool launches_express(const Mask& mask);

/// Kept for the packs seen lately.
std::shared_ptr<const ForwardLaunches> forward_launches(const AttendArgs& args);

/// `separate`: items of one layer never share query rows, so that nothing depends on the order in
/// which a launch adds (for a deterministic backward); otherwise rectangles are one layer.
std::shared_ptr<const BackwardLaunches> backward_launches(const AttendArgs& args, bool separate);

}  // namespace zigzag::cuda
