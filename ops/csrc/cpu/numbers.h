// 16-bit and 8-bit floats in plain C++, rounding as torch does (to nearest, ties to even).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace pikv {
namespace {

inline float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float bf16_to_float(uint16_t h) { return from_bits((uint32_t)h << 16); }

inline uint16_t float_to_bf16(float x) {
  const uint32_t u = to_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

// Scaling by 2^112 restores the exponent, subnormals included.
inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
  const uint32_t finite = to_bits(from_bits(magnitude) * 0x1p112f);
  return from_bits(((uint32_t)(h & 0x8000) << 16) | ((h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : finite));
}

inline uint16_t float_to_half(float x) {
  const uint32_t u = to_bits(x), sign = u >> 16 & 0x8000;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude >= 0x47800000u) return (uint16_t)(sign | (magnitude > 0x7f800000u ? 0x7e00 : 0x7c00));  // NaN, or 2^16 and beyond
  if (magnitude < 0x38800000u)  // below 2^-14: the sum aligns the last kept bit with the last bit of 0.5
    return (uint16_t)(sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f)));
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return (uint16_t)(sign | ((rounded >> 13) - (112u << 10)));
}

inline float fp8_to_float(uint8_t c) {
  return from_bits((uint32_t)(c & 0x80) << 24 | to_bits(from_bits((uint32_t)(c & 0x7f) << 20) * 0x1p120f));
}

// |x| <= 448.
inline uint8_t float_to_fp8(float x) {
  const uint32_t u = to_bits(x), sign = u >> 24 & 0x80, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint8_t)(sign | 0x7f);
  if (magnitude < 0x3c800000u)  // below 2^-6: units of 2^-9
    return (uint8_t)(sign | (to_bits(from_bits(magnitude) + 16384.0f) - to_bits(16384.0f)));
  const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1);
  return (uint8_t)(sign | ((rounded >> 20) - (120u << 3)));
}

constexpr float kHalfMax = 65504.0f;

// NaN stays.
inline uint16_t saturated_half(float x) { return float_to_half(x > kHalfMax ? kHalfMax : x < -kHalfMax ? -kHalfMax : x); }

// e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, the sign in bit 3.
inline float fp4_to_float(unsigned c) {
  static constexpr float values[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  return values[c];
}

// x in units of the scale; a tie goes to the even code, there is no larger one than 6, and one zero only.
inline uint8_t float_to_fp4(float x) {
  const float u = std::fabs(x);
  const int code = (u > 0.25f) + (u >= 0.75f) + (u > 1.25f) + (u >= 1.75f) + (u > 2.5f) + (u >= 3.5f) + (u > 5.0f);
  return (uint8_t)(code && x < 0 ? code | 8 : code);
}

// 2^(biased - 127), biased of 1 to 254.
inline float power_of_two(unsigned biased) { return from_bits(biased << 23); }

// type: kFp32, kBf16 or kFp16
inline float load_float(const void* p, int type, int64_t i) {
  if (type == 0) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return type == 1 ? bf16_to_float(h) : half_to_float(h);
}

}  // namespace
}  // namespace pikv
