// One fixed case a run, for callgrind.py: forward, backward or short.
#include <cstdio>
#include <cstring>

#include "kernel_cases.h"

namespace {

using zigzag::DType;
using zigzag::benchmarks::KernelCase;

}  // namespace

// Instructions are counted inside of this function alone.
extern "C" __attribute__((noinline)) void zigzag_measured(KernelCase& problem, bool backward) {
  if (backward) {
    problem.backward();
  } else {
    problem.forward();
  }
}

int main(int count, char** arguments) {
  const char* name = count == 2 ? arguments[1] : "";
  if (std::strcmp(name, "forward") == 0) {
    KernelCase problem(1, 1024, 4, 2, 128, DType::kFloat32);
    zigzag_measured(problem, false);
  } else if (std::strcmp(name, "backward") == 0) {
    KernelCase problem(1, 768, 4, 2, 128, DType::kFloat32);
    problem.forward();
    zigzag_measured(problem, true);
  } else if (std::strcmp(name, "short") == 0) {
    KernelCase problem(64, 64, 4, 4, 64, DType::kBFloat16);
    zigzag_measured(problem, false);
  } else {
    std::fprintf(stderr, "usage: callgrind_cases forward|backward|short\n");
    return 2;
  }
  return 0;
}
