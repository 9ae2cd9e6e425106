#pragma once

#include <functional>
#include <string>
#include <vector>

#include "comm/agree.h"

namespace zigzag::test {

/// One thing that a rank may pass otherwise than its peers, and words of the sentence it gets.
struct Disagreement {
  std::string name;
  std::function<void(comm::Agreement&)> change;
  std::vector<std::string> words;
};

/// A rank's arguments, all right.
comm::Agreement agreed(int size);

/// Every field of an agreement.
std::vector<Disagreement> disagreements();

}  // namespace zigzag::test
