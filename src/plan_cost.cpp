#include <algorithm>
#include <string>

#include "plan_data.h"
#include "zigzag/error.h"

namespace zigzag {

namespace {

using std::int64_t;

/// Sum of 1..n.
Pairs triangle(int64_t n) { return Pairs{n} * (n + 1) / 2; }

/// Visible pairs of query positions [0, x).
Pairs pairs_before(int64_t x, int64_t length, const Mask& mask) {
  const bool right_bounded = mask.causal || mask.window_right >= 0;
  const int64_t right = mask.causal ? 0 : std::min(mask.window_right, length);
  // The first `free` queries end at i + 1 + right; the others see to the document's end.
  const int64_t free = right_bounded ? std::clamp<int64_t>(length - right, 0, x) : 0;
  Pairs result = triangle(free) + Pairs{free} * right + Pairs{x - free} * length;
  // Queries past window_left miss i - window_left keys at the front.
  if (mask.window_left >= 0 && x - 1 > mask.window_left) {
    result -= triangle(x - 1 - mask.window_left);
  }
  return result;
}

/// A sum over documents of functions of the rank that are linear between breakpoints, kept as
/// coefficient differences so that adding a piece costs O(1) whatever its width.
class LinearSum {
 public:
  explicit LinearSum(int64_t ranks)
      : constant_(static_cast<std::size_t>(ranks) + 1),
        slope_(static_cast<std::size_t>(ranks) + 1) {}

  template <typename F>
  void add(const std::vector<int64_t>& breakpoints, const F& value_at) {
    for (std::size_t i = 0; i + 1 < breakpoints.size(); ++i) {
      const int64_t low = breakpoints[i];
      const int64_t high = breakpoints[i + 1];
      const Pairs first = value_at(low);
      const Pairs slope = high - low > 1 ? value_at(low + 1) - first : 0;
      const Pairs constant = first - slope * low;
      constant_[static_cast<std::size_t>(low)] += constant;
      constant_[static_cast<std::size_t>(high)] -= constant;
      slope_[static_cast<std::size_t>(low)] += slope;
      slope_[static_cast<std::size_t>(high)] -= slope;
    }
  }

  template <typename T>
  std::vector<T> values() const {
    std::vector<T> result(constant_.size() - 1);
    Pairs constant = 0;
    Pairs slope = 0;
    for (std::size_t r = 0; r < result.size(); ++r) {
      constant += constant_[r];
      slope += slope_[r];
      result[r] = static_cast<T>(constant + slope * static_cast<int64_t>(r));
    }
    return result;
  }

 private:
  std::vector<Pairs> constant_;
  std::vector<Pairs> slope_;
};

}  // namespace

Pairs Plan::DocumentLayout::pairs(int64_t begin, int64_t end, int64_t length, const Mask& mask) {
  return pairs_before(end, length, mask) - pairs_before(begin, length, mask);
}

std::vector<int64_t> Plan::DocumentLayout::breakpoints(const Mask& mask) const {
  const bool left_bounded = mask.window_left >= 0 && mask.window_left < length;
  const bool right_bounded = !mask.causal && mask.window_right >= 0 && mask.window_right < length;
  std::vector<int64_t> result;
  if (base == 0 && (left_bounded || right_bounded)) {
    // Chunks of one token or none: no order to build on.
    for (int64_t r = 0; r <= ranks; ++r) result.push_back(r);
    return result;
  }
  result = {0, ranks, cursor};
  // Chunk sizes change where the extras begin and end.
  for (const int64_t extras : {early_extras, late_extras}) {
    const int64_t end = cursor + extras;
    result.push_back(end < ranks ? end : end - ranks);
  }
  // A mask's bounds clamp at these positions; the chunk that holds one stands alone.
  const auto isolate = [&](int64_t position) {
    if (position < 0 || position >= length) return;
    const int64_t rank = owner(chunk_at(position));
    for (int64_t r = std::max<int64_t>(0, rank - 1); r <= std::min(rank + 2, ranks); ++r) {
      result.push_back(r);
    }
  };
  if (left_bounded) isolate(mask.window_left);
  if (right_bounded) isolate(length - mask.window_right);
  if (left_bounded && base > 0) {
    // Early and late keys join into one range from some rank on: their gap shrinks with the rank.
    int64_t low = -1;
    int64_t high = ranks;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (keys(chunks(middle), mask).count == 2 ? low : high) = middle;
    }
    result.push_back(high);
  }
  std::sort(result.begin(), result.end());
  result.erase(std::unique(result.begin(), result.end()), result.end());
  return result;
}

double Plan::visible_pairs(int64_t rank, const Mask& mask) const {
  data_->check_rank(rank);
  Pairs total = 0;
  for (int64_t d = 0; d < data_->documents(); ++d) {
    const DocumentLayout layout(*data_, d);
    const RankChunks own = layout.chunks(rank);
    total += DocumentLayout::pairs(own.early_begin, own.early_end, layout.length, mask) +
             DocumentLayout::pairs(own.late_begin, own.late_end, layout.length, mask);
  }
  return static_cast<double>(total);
}

std::vector<double> Plan::visible_pairs_all(const Mask& mask) const {
  LinearSum sum(data_->ranks);
  for (int64_t d = 0; d < data_->documents(); ++d) {
    const DocumentLayout layout(*data_, d);
    if (layout.length == 0) continue;
    sum.add(layout.breakpoints(mask), [&](int64_t rank) {
      const RankChunks own = layout.chunks(rank);
      return DocumentLayout::pairs(own.early_begin, own.early_end, layout.length, mask) +
             DocumentLayout::pairs(own.late_begin, own.late_end, layout.length, mask);
    });
  }
  return sum.values<double>();
}

std::vector<int64_t> Plan::gathered_tokens_all(const Mask& mask) const {
  LinearSum sum(data_->ranks);
  std::vector<int64_t> every;
  for (int64_t d = 0; d < data_->documents(); ++d) {
    const DocumentLayout layout(*data_, d);
    if (layout.length == 0) continue;
    const auto rows = [&](int64_t rank) {
      const KeyRanges keys = layout.keys(layout.chunks(rank), mask);
      Pairs total = 0;
      for (std::size_t i = 0; i < keys.count; ++i) {
        total += keys.ranges[i].second - keys.ranges[i].first;
      }
      return total;
    };
    sum.add(layout.breakpoints(mask), rows);
  }
  return sum.values<int64_t>();
}

double Plan::flops(int64_t rank, int64_t heads, int64_t head_dim, const Mask& mask) const {
  return 4.0 * static_cast<double>(heads) * static_cast<double>(head_dim) *
         visible_pairs(rank, mask);
}

double Plan::balance(const Mask& mask) const {
  const std::vector<double> pairs = visible_pairs_all(mask);
  const double most = *std::max_element(pairs.begin(), pairs.end());
  double sum = 0;
  for (const double value : pairs) sum += value;
  return most == 0 ? 1.0 : sum / static_cast<double>(pairs.size()) / most;
}

namespace {

void check_row(int64_t kv_heads, int64_t head_dim, int64_t item_size) {
  if (kv_heads >= 1 && head_dim >= 1 && item_size >= 1) return;
  throw InvalidArgument("rows have " + std::to_string(kv_heads) + " KV heads, head_dim " +
                        std::to_string(head_dim) + " and elements of " + std::to_string(item_size) +
                        " bytes; each must be at least 1");
}

double kv_bytes(int64_t rows, int64_t kv_heads, int64_t head_dim, int64_t item_size) {
  return 2.0 * static_cast<double>(rows) * static_cast<double>(kv_heads) *
         static_cast<double>(head_dim) * static_cast<double>(item_size);
}

}  // namespace

double Plan::gathered_bytes(int64_t rank, int64_t kv_heads, int64_t head_dim, int64_t item_size,
                            const Mask& mask) const {
  check_row(kv_heads, head_dim, item_size);
  // Every query sees its own key, so all of the rank's rows are among the gathered ones.
  return kv_bytes(gathered_tokens(rank, mask) - local_tokens(rank), kv_heads, head_dim, item_size);
}

std::vector<double> Plan::gathered_bytes_all(int64_t kv_heads, int64_t head_dim, int64_t item_size,
                                             const Mask& mask) const {
  check_row(kv_heads, head_dim, item_size);
  const std::vector<int64_t> gathered = gathered_tokens_all(mask);
  std::vector<double> result;
  result.reserve(gathered.size());
  for (int64_t r = 0; r < data_->ranks; ++r) {
    result.push_back(kv_bytes(gathered[static_cast<std::size_t>(r)] - local_tokens(r), kv_heads,
                              head_dim, item_size));
  }
  return result;
}

PredictedTime predict(const Plan& plan, const CostModel& model, int64_t heads, int64_t kv_heads,
                      int64_t head_dim, int64_t item_size, const Mask& mask) {
  if (!(model.tflops > 0) || !(model.gbps > 0)) {
    throw InvalidArgument("the cost model has tflops " + std::to_string(model.tflops) +
                          " and gbps " + std::to_string(model.gbps) + "; both must be above 0");
  }
  const std::vector<double> pairs = plan.visible_pairs_all(mask);
  const std::vector<double> gathered = plan.gathered_bytes_all(kv_heads, head_dim, item_size, mask);
  // Gradients come back as float32 partials, as many rows as were gathered.
  const double reduce_ratio = 4.0 / static_cast<double>(item_size);
  PredictedTime time;
  for (std::size_t r = 0; r < pairs.size(); ++r) {
    const double flops =
        4.0 * static_cast<double>(heads) * static_cast<double>(head_dim) * pairs[r];
    const double compute = flops / (model.tflops * 1e12);
    const double gather = gathered[r] / (model.gbps * 1e9);
    const double reduce = gather * reduce_ratio;
    time.forward_compute = std::max(time.forward_compute, compute);
    time.forward_exchange = std::max(time.forward_exchange, gather);
    time.forward = std::max(time.forward, std::max(compute, gather));
    time.backward_compute = std::max(time.backward_compute, 2.5 * compute);
    time.backward_exchange = std::max(time.backward_exchange, gather + reduce);
    time.backward = std::max(time.backward, std::max(2.5 * compute, gather + reduce));
  }
  return time;
}

}  // namespace zigzag
