#pragma once

#include <functional>
#include <string>
#include <vector>

#include "zigzag/communicator.h"

// The groups that the conformance suite runs on: each runs a body once a rank.
namespace zigzag::test {

using RankBody = std::function<void(const Communicator&)>;

struct SelfGroup {
  static std::vector<int> sizes() { return {1}; }
  /// What each rank threw, by rank: "InvalidArgument: ..." or empty.
  static std::vector<std::string> run(int size, const RankBody& body);
};

struct ThreadsGroup {
  static std::vector<int> sizes() { return {1, 2, 3, 4, 5, 8}; }
  static std::vector<std::string> run(int size, const RankBody& body);
};

/// A caller's collectives, simulated over threads without any part of the library.
struct CallbackGroup {
  static std::vector<int> sizes() { return {1, 2, 3, 4, 8}; }
  static std::vector<std::string> run(int size, const RankBody& body);
};

/// One rank's functions over what its peers show on a shared board.
CallbackCollectives simulated_collectives(int rank, int size, void* shared);

/// "InvalidArgument: ..." for the exception that a body throws; empty when it throws none.
std::string outcome(const RankBody& body, const Communicator& communicator);

}  // namespace zigzag::test
