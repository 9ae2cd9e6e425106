// The launches that stand for a rank's attention cover exactly what the mask shows: checked by
// counting (query, key) pairs, without a GPU.
#include "cuda/launch_lists.h"

#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

namespace zigzag::gpu_test {
namespace {

using std::int64_t;
using Pairs = std::map<std::pair<int64_t, int64_t>, int>;
using Rows = std::map<int64_t, std::vector<std::pair<int64_t, int64_t>>>;

void count(Pairs& pairs, const cuda::Launch& launch) {
  for (const cuda::LaunchItem& item : launch.items) {
    for (int64_t i = 0; i < item.q_count; ++i) {
      int64_t end = item.k_count;
      if (launch.mask == cuda::CudnnMask::kTopLeft) end = std::min(end, i + 1);
      if (launch.mask == cuda::CudnnMask::kBottomRight) end = item.k_count - item.q_count + i + 1;
      for (int64_t j = 0; j < end; ++j) ++pairs[{item.q_begin + i, item.k_begin + j}];
    }
  }
}

/// Which (source row) every destination row of a sum takes, as pairs of destination and source.
Rows expand(const cuda::SumTable& table) {
  Rows rows;
  for (int64_t i = 0; i < table.intervals(); ++i) {
    const auto at = static_cast<std::size_t>(i);
    for (int64_t row = table.begins[at]; row < table.begins[at + 1]; ++row) {
      for (int64_t s = 0; s < table.sources; ++s) {
        const int64_t first =
            table.rows[at * static_cast<std::size_t>(table.sources) + static_cast<std::size_t>(s)];
        if (first >= 0) rows[row].push_back({s, first + row - table.begins[at]});
      }
    }
  }
  return rows;
}

Rows sorted(Rows rows) {
  for (auto& entry : rows) std::sort(entry.second.begin(), entry.second.end());
  return rows;
}

void check_pack(const std::vector<int64_t>& lengths, int64_t world_size, const Mask& mask) {
  const Plan plan = Plan::from_lengths(lengths, world_size);
  for (int64_t rank = 0; rank < world_size; ++rank) {
    SCOPED_TRACE("W " + std::to_string(world_size) + " rank " + std::to_string(rank));
    const std::vector<WorkItem> items = plan.work_items(rank, mask);
    AttendArgs args;
    args.plan = &plan;
    args.rank = rank;
    args.items = items;
    args.mask = mask;
    args.q = TensorView::contiguous(nullptr, DType::kBFloat16, {plan.local_tokens(rank), 1, 16});

    Pairs want;
    for (const WorkItem& item : items) {
      for (int64_t i = 0; i < item.q_count; ++i) {
        for (int64_t j = 0; j < item.k_count; ++j) {
          if (item.k_position + j < mask.end_key(item.q_position + i, item.document_length)) {
            ++want[{item.q_begin + i, item.k_begin + j}];
          }
        }
      }
    }
    Pairs forward;
    for (const cuda::Launch& launch : cuda::forward_launches(args)->launches) {
      count(forward, launch);
    }
    EXPECT_TRUE(forward == want) << "forward";

    for (const bool separate : {false, true}) {
      SCOPED_TRACE(separate ? "separate layers" : "rectangles in one layer");
      const auto lists = cuda::backward_launches(args, separate);
      Pairs backward;
      // By destination row: the sources and their rows that must be added up.
      Rows dq;
      Rows dk;
      for (const cuda::Launch& launch : lists->launches) {
        count(backward, launch);
        EXPECT_LT(launch.layer, lists->layers);
        Rows in_launch;
        for (const cuda::LaunchItem& item : launch.items) {
          EXPECT_GT(item.q_count, 0);
          EXPECT_GT(item.k_count, 0);
          for (int64_t i = 0; i < item.q_count; ++i) {
            in_launch[item.q_begin + i].push_back({launch.layer, item.q_begin + i});
          }
          for (int64_t j = 0; j < item.k_count; ++j) {
            dk[item.k_begin + j].push_back({item.dk_source, item.dk_begin + j});
          }
        }
        for (const auto& [row, parts] : in_launch) {
          if (separate) {
            EXPECT_EQ(parts.size(), 1U);
          }
          dq[row].push_back(parts[0]);
        }
      }
      EXPECT_TRUE(backward == want) << "backward";
      EXPECT_TRUE(sorted(expand(lists->dq)) == sorted(dq)) << "dq";
      EXPECT_TRUE(sorted(expand(lists->dkv)) == sorted(dk)) << "dk";
    }
  }
}

TEST(LaunchLists, CoverTheMaskOnce) {
  std::mt19937_64 engine(7);
  for (int trial = 0; trial < 60; ++trial) {
    std::vector<int64_t> lengths(engine() % 5);
    for (int64_t& length : lengths) length = static_cast<int64_t>(engine() % 40);
    for (const int64_t world_size : {1, 2, 3, 4, 5}) {
      check_pack(lengths, world_size, Mask{});
      check_pack(lengths, world_size, Mask{false, -1, -1});
    }
  }
}

TEST(LaunchLists, ManyShortDocumentsAndALongOne) {
  std::vector<int64_t> lengths(40, 3);
  lengths[5] = 300;
  check_pack(lengths, 4, Mask{});
  check_pack(lengths, 1, Mask{});
}

/// Chunks of several tiles, which whole items are cut into blocks for.
TEST(LaunchLists, LongChunks) {
  check_pack({1600, 40}, 2, Mask{});
  check_pack({1900}, 4, Mask{});
}

/// Items of every document but the longest keep all of their keys, so their dq is rounded once.
TEST(LaunchLists, ShortDocumentsAreWhole) {
  std::vector<int64_t> lengths(30, 400);
  lengths[3] = 60000;
  const Plan plan = Plan::from_lengths(lengths, 2);
  for (const int64_t rank : {0, 1}) {
    const std::vector<WorkItem> items = plan.work_items(rank, Mask{});
    AttendArgs args;
    args.plan = &plan;
    args.rank = rank;
    args.items = items;
    args.q = TensorView::contiguous(nullptr, DType::kBFloat16, {plan.local_tokens(rank), 1, 16});
    const auto lists = cuda::backward_launches(args, false);
    ASSERT_EQ(lists->launches.size(), 3U);
    EXPECT_EQ(lists->launches[1].mask, cuda::CudnnMask::kBottomRight);
    EXPECT_EQ(lists->launches[1].items.size(), 58U);
    EXPECT_LE(lists->launches[0].items.size(), 2U);
  }
}

}  // namespace
}  // namespace zigzag::gpu_test
