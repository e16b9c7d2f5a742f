// Storage types and branch-free maths that the compiler vectorises without -ffast-math.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "isa.h"

namespace fastdis {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The dtype of statistics and accumulators: float64 for float64, else float32.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
FASTDIS_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

FASTDIS_INLINE float load(const float* p, int64_t i) { return p[i]; }
FASTDIS_INLINE double load(const double* p, int64_t i) { return p[i]; }
FASTDIS_INLINE float load(const bfloat16* p, int64_t i) {
  return bit_cast<float>(static_cast<uint32_t>(p[i].bits) << 16);
}
FASTDIS_INLINE float load(const float16* p, int64_t i) {
  const uint32_t half = p[i].bits;
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  // Normal numbers, infinity and NaN: move the exponent's bias from 15 to 127; infinity's needs twice the move.
  const uint32_t bias = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;
  const uint32_t normal = (magnitude << 13) + bias;
  // Subnormal numbers: the integer times 2^-24, exact in float32.
  const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return bit_cast<float>(sign | (magnitude < 0x0400u ? subnormal : normal));
}

FASTDIS_INLINE void store(float* p, int64_t i, float value) { p[i] = value; }
FASTDIS_INLINE void store(double* p, int64_t i, double value) { p[i] = value; }
FASTDIS_INLINE void store(bfloat16* p, int64_t i, float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  p[i].bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}
FASTDIS_INLINE void store(float16* p, int64_t i, float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal range: rebias, round to nearest even on the 13 dropped bits; a carry moves into the exponent as it should.
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 aligns the subnormal's last bit with float32's, and the addition rounds to nearest even.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  p[i].bits = static_cast<uint16_t>(sign | half);
}

// e^x to 2 ulp from -87 (float64: -708) up; infinity from 88.4 (709.4) on, a little early; below the range not 0 but
// 1e-38 (1e-308), which no sum that holds a 1 feels; NaN for NaN.
FASTDIS_INLINE float exponential(float x) {
  constexpr float magic = 0x1.8p23f;
  float z = x > 89.0f ? 89.0f : x;  // this order of comparison lets NaN through
  z = z < -87.0f ? -87.0f : z;
  const float shifted = z * 0x1.715476p0f + magic;  // round(x / ln 2) in the low bits
  const float n = shifted - magic;
  const float r = (z - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 0x1.6c16c2p-10f;  // 1/6!
  p = p * r + 0x1.111112p-7f;
  p = p * r + 0x1.555556p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // n = 128 makes the exponent of infinity.
  return p * bit_cast<float>((bit_cast<int32_t>(shifted) - bit_cast<int32_t>(magic) + 127) << 23);
}

FASTDIS_INLINE double exponential(double x) {
  constexpr double magic = 0x1.8p52;
  double z = x > 710.0 ? 710.0 : x;
  z = z < -708.0 ? -708.0 : z;
  const double shifted = z * 0x1.71547652b82fep0 + magic;
  const double n = shifted - magic;
  const double r = (z - n * 0x1.62e42fefap-1) - n * 0x1.cf79abc9e3b3ap-40;
  double p = 1.6059043836821613e-10;  // 1/13!
  p = p * r + 2.08767569878681e-09;
  p = p * r + 2.505210838544172e-08;
  p = p * r + 2.755731922398589e-07;
  p = p * r + 2.7557319223985893e-06;
  p = p * r + 2.48015873015873e-05;
  p = p * r + 1.984126984126984e-04;
  p = p * r + 1.388888888888889e-03;
  p = p * r + 8.333333333333333e-03;
  p = p * r + 4.1666666666666664e-02;
  p = p * r + 1.6666666666666666e-01;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p * bit_cast<double>((bit_cast<int64_t>(shifted) - bit_cast<int64_t>(magic) + 1023) << 52);
}

// A share of a softmax, e^x with x <= 0; not below e^-69 = 1e-30, so that products with it do not become subnormal
// numbers, which take a processor a hundred times as long.
template <class A>
FASTDIS_INLINE A share_of_softmax(A x) {
  return exponential(x < A(-69) ? A(-69) : x);
}

template <class A>
FASTDIS_INLINE A logistic(A x) {
  return A(1) / (A(1) + exponential(-x));
}

// 2^x to 2 ulp from -100 (float64: -1000) to 127 (1023); 1e-30 (1e-301) and not 0 below that range, as for
// share_of_softmax; NaN for NaN.
FASTDIS_INLINE float power_of_two(float x) {
  constexpr float magic = 0x1.8p23f;
  const float z = x < -100.0f ? -100.0f : x;
  const float shifted = z + magic;
  const float r = z - (shifted - magic);
  float p = 1.5403530e-4f;  // ln(2)^n / n!
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return p * bit_cast<float>((bit_cast<int32_t>(shifted) - bit_cast<int32_t>(magic) + 127) << 23);
}

FASTDIS_INLINE double power_of_two(double x) { return exponential((x < -1000.0 ? -1000.0 : x) * 0x1.62e42fefa39efp-1); }

// log(1 + x) for x from sqrt(1/2) - 1 to sqrt(2) - 1, to 2 ulp.
FASTDIS_INLINE float logarithm_near_one(float x) {
  float p = 7.0376836292e-2f;  // Cephes, logf
  p = p * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const float square = x * x;
  return x + (p * x * square - 0.5f * square);
}

// A positive normal number as (1 + rest) 2^exponent, its first factor from sqrt(1/2) to sqrt(2).
struct Scaled {
  float rest, exponent;
};

FASTDIS_INLINE Scaled scaled(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // of x / sqrt(1/2)
  return {bit_cast<float>(bits - (exponent << 23)) - 1.0f, static_cast<float>(exponent)};
}

// log(x) of positive normal numbers, to 2 ulp.
FASTDIS_INLINE float logarithm(Scaled x) { return logarithm_near_one(x.rest) + x.exponent * 0x1.62e430p-1f; }

FASTDIS_INLINE float logarithm(float x) { return logarithm(scaled(x)); }

FASTDIS_INLINE double logarithm(double x) {
  const int64_t bits = bit_cast<int64_t>(x);
  const int64_t exponent = (bits - 0x3fe6a09e667f3bcd) >> 52;  // of x / sqrt(1/2)
  const double mantissa = bit_cast<double>(bits - (exponent << 52));
  const double s = (mantissa - 1.0) / (mantissa + 1.0);  // log((1 + s) / (1 - s)) = 2 (s + s^3 / 3 + s^5 / 5 + ...)
  const double square = s * s;
  double p = 1.0 / 21.0;
  p = p * square + 1.0 / 19.0;
  p = p * square + 1.0 / 17.0;
  p = p * square + 1.0 / 15.0;
  p = p * square + 1.0 / 13.0;
  p = p * square + 1.0 / 11.0;
  p = p * square + 1.0 / 9.0;
  p = p * square + 1.0 / 7.0;
  p = p * square + 1.0 / 5.0;
  p = p * square + 1.0 / 3.0;
  return 2.0 * (s + p * square * s) + static_cast<double>(exponent) * 0x1.62e42fefa39efp-1;
}

}  // namespace fastdis
