#include "io/deterministic_math.h"

#include <cmath>

namespace zigzag::io {
namespace {

constexpr double kLn2 = 0.693147180559945309417;
// The same in two parts, the first with zeros at its end so that small multiples of it are exact.
constexpr double kLn2High = 0x1.62e42fefa3800p-1;
constexpr double kLn2Low = 0x1.ef35793c76730p-45;
constexpr double kTwoPi = 6.283185307179586476925;
constexpr double kSqrtHalf = 0.707106781186547524401;

}  // namespace

double portable_log(double x) {
  int exponent = 0;
  double m = std::frexp(x, &exponent);  // [0.5, 1)
  if (m < kSqrtHalf) {
    m *= 2;
    --exponent;
  }
  // log m = 2 atanh z with |z| < 0.172: 11 terms of the series reach 1e-17.
  const double z = (m - 1) / (m + 1);
  const double z2 = z * z;
  double sum = 0;
  for (int n = 21; n >= 1; n -= 2) sum = sum * z2 + 1.0 / n;
  return exponent * kLn2High + (exponent * kLn2Low + 2 * z * sum);
}

double portable_exp(double x) {
  const double k = std::floor(x / kLn2 + 0.5);
  const double r = x - k * kLn2High - k * kLn2Low;
  double sum = 1;
  for (int n = 16; n >= 1; --n) sum = 1 + sum * r / n;
  return std::ldexp(sum, static_cast<int>(k));
}

SinCos portable_sin_cos(double turns) {
  const double fraction = turns - std::floor(turns);
  const double quarter = std::floor(4 * fraction + 0.5);
  const double x = kTwoPi * (fraction - 0.25 * quarter);  // [-pi/4, pi/4]
  const double x2 = x * x;
  // Taylor: the first term left out is below 3e-18.
  const double s =
      x * (1 + x2 * (-1.0 / 6 +
                     x2 * (1.0 / 120 +
                           x2 * (-1.0 / 5040 + x2 * (1.0 / 362880 +
                                                     x2 * (-1.0 / 39916800 +
                                                           x2 * (1.0 / 6227020800 +
                                                                 x2 * (-1.0 / 1307674368000))))))));
  const double c =
      1 + x2 * (-1.0 / 2 +
                x2 * (1.0 / 24 +
                      x2 * (-1.0 / 720 + x2 * (1.0 / 40320 +
                                               x2 * (-1.0 / 3628800 +
                                                     x2 * (1.0 / 479001600 +
                                                           x2 * (-1.0 / 87178291200 +
                                                                 x2 * (1.0 / 20922789888000))))))));
  switch (static_cast<int>(quarter) & 3) {
    case 0:
      return {s, c};
    case 1:
      return {c, -s};
    case 2:
      return {-s, -c};
    default:
      return {-c, s};
  }
}

}  // namespace zigzag::io
