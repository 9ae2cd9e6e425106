#pragma once

namespace zigzag::io {

// Elementary functions from IEEE additions, multiplications and divisions alone, so that inputs
// drawn from a seed have the same bits on every machine and with every C library.

/// Natural logarithm of a positive, normal, finite number; relative error below 1e-15.
double portable_log(double x);

/// e to the power x for |x| < 700; relative error below 1e-15.
double portable_exp(double x);

/// The sine and cosine of an angle.
struct SinCos {
  double sin;
  double cos;
};

/// Sine and cosine of 2 pi x `turns`; absolute error below 1e-15 of the reduced angle.
SinCos portable_sin_cos(double turns);

}  // namespace zigzag::io
