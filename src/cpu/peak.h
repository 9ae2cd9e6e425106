#pragma once

namespace zigzag::cpu {

/// Rates of this machine, in 10^9 floating-point operations a second.
struct Peak {
  double wall = 0;  ///< by the clock on the wall
  double cpu = 0;   ///< by the processor time that the threads were given, times their number
};

/// The rate of independent float32 multiply-adds in registers on `threads` threads of their own
/// (two operations each), with the selected target's widest vectors. About `seconds` long.
Peak fma_peak(int threads, double seconds);

/// fma_peak(threads, 0.1).wall.
double fma_peak_gflops(int threads);

}  // namespace zigzag::cpu
