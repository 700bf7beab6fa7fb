// Elementary functions in arithmetic that vectorizes.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// exp, and log for positive normal x: errors below 2 units in the last place.
inline float exp_of(float x) {
  bool overflows = x > 88.0f;
  x = x < -87.0f ? -87.0f : overflows ? 88.0f : x;
  float n = std::nearbyintf(x * 1.44269504f);
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return overflows ? INFINITY : p * scale;
}

inline float log_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  int32_t exponent = (bits - 0x3f3504f3) >> 23;  // so that the rest lies in [√½, √2)
  bits -= exponent << 23;
  float f, e = static_cast<float>(exponent);
  std::memcpy(&f, &bits, sizeof f);
  f -= 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  float square = f * f;
  float rest = p * f * square - e * 2.12194440e-4f - 0.5f * square;
  float found = f + rest + e * 0.693359375f;
  return x == x && x < INFINITY ? found : x;
}

// tanh: near 0 by its series, whose next term is below the rounding.
inline float tanh_of(float x) {
  float square = x * x;
  float series = x * (1.0f + square * (-3.33333333e-1f + square * (1.33333333e-1f + square * (-5.39682540e-2f +
                 square * (2.18694885e-2f - square * 8.86323553e-3f)))));
  float far = 1.0f - 2.0f / (exp_of(2.0f * x) + 1.0f);
  return square < 0.0625f ? series : far;
}

inline double exp_of(double x) { return std::exp(x); }
inline double log_of(double x) { return std::log(x); }
inline double tanh_of(double x) { return std::tanh(x); }

// log(1 + u) for u ≥ 0, exact for small u too (Kahan).
template <class T>
inline T log1p_of(T u) {
  T w = T(1) + u;
  T ratio = u / (w == T(1) ? T(1) : w - T(1));
  return w == T(1) ? u : log_of(w) * ratio;
}
