// 16-, 8- and 4-bit numbers from and to floats, rounding as torch does (to nearest, ties to even). csrc/cpu/numbers.h is the host's version.

namespace pikv {

__device__ __forceinline__ float bf16_to_float(unsigned h) { return __uint_as_float(h << 16); }

__device__ __forceinline__ unsigned float_to_bf16(float x) {
  const unsigned u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}

// Low 16 bits of h.
__device__ __forceinline__ float half_to_float(unsigned h) {
#if defined(PK_HOST_EMU)
  const unsigned magnitude = (h & 0x7fffu) << 13;
  const unsigned finite = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);  // restores the exponent, subnormals included
  return __uint_as_float((h & 0x8000u) << 16 | ((h & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite));
#else
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((unsigned short)h));
  return x;
#endif
}

// The same, computed where it is used: compilers move the conversion of loop constants out of the loop, and out of registers.
__device__ __forceinline__ float half_to_float_here(unsigned h) {
#if defined(PK_HOST_EMU)
  return half_to_float(h);
#else
  float x;
  asm volatile("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((unsigned short)h));
  return x;
#endif
}

__device__ __forceinline__ unsigned float_to_half(float x) {
  const unsigned u = __float_as_uint(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude >= 0x47800000u) return sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u);  // NaN, or 2^16 and beyond
  if (magnitude < 0x38800000u)  // below 2^-14: the sum aligns the last kept bit with the last bit of 0.5
    return sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f));
  const unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return sign | ((rounded >> 13) - (112u << 10));
}

__device__ __forceinline__ float fp8_to_float(unsigned c) {
  return __uint_as_float((c & 0x80u) << 24 | __float_as_uint(__uint_as_float((c & 0x7fu) << 20) * 0x1p120f));
}

// |x| <= 448.
__device__ __forceinline__ unsigned float_to_fp8(float x) {
  const unsigned u = __float_as_uint(x), sign = u >> 24 & 0x80u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7fu;
  if (magnitude < 0x3c800000u)  // below 2^-6: units of 2^-9
    return sign | (__float_as_uint(__uint_as_float(magnitude) + 16384.0f) - __float_as_uint(16384.0f));
  const unsigned rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1);
  return sign | ((rounded >> 20) - (120u << 3));
}

// e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, the sign in bit 3. Its bits in a float's, exponent made right by a product.
__device__ __forceinline__ float fp4_to_float(unsigned c) {
  return __uint_as_float((c & 8u) << 28 | __float_as_uint(__uint_as_float((c & 7u) << 22) * 0x1p126f));
}

// x in units of the scale; a tie goes to the even code, there is no larger one than 6, and one zero only.
__device__ __forceinline__ unsigned float_to_fp4(float x) {
  const float u = fabsf(x);
  const unsigned code = (u > 0.25f) + (u >= 0.75f) + (u > 1.25f) + (u >= 1.75f) + (u > 2.5f) + (u >= 3.5f) + (u > 5.0f);
  return code && x < 0 ? code | 8u : code;
}

// 2^(biased - 127), biased of 1 to 254.
__device__ __forceinline__ float power_of_two(unsigned biased) { return __uint_as_float(biased << 23); }

// NaN stays.
__device__ __forceinline__ float saturate_half(float x) { return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x; }

// type: kFp32, kBf16 or kFp16
__device__ __forceinline__ float load_float(const void* p, int type, long long i) {
  if (type == kFp32) return __ldg(static_cast<const float*>(p) + i);
  const unsigned h = __ldg(static_cast<const unsigned short*>(p) + i);
  return type == kBf16 ? bf16_to_float(h) : half_to_float(h);
}

__device__ __forceinline__ void store_float(void* p, int type, long long i, float x) {
  if (type == kFp32) static_cast<float*>(p)[i] = x;
  else static_cast<unsigned short*>(p)[i] = (unsigned short)(type == kBf16 ? float_to_bf16(x) : float_to_half(x));
}

// 8 stored elements: their bytes, and the 32-bit words that hold them.
template <int FORMAT>
struct Eight {
  static constexpr int bytes = format_bits(FORMAT), words = (bytes + 3) / 4;
};

template <int FORMAT>
__device__ __forceinline__ void load_eight(const unsigned char* from, unsigned* w) {
  if constexpr (FORMAT == kInt2) w[0] = __ldg(reinterpret_cast<const unsigned short*>(from));
  else load_words<Eight<FORMAT>::words>(from, w);
}

// 8 elements as floats; the integer formats give their codes.
template <int FORMAT>
__device__ __forceinline__ void unpack(const unsigned* w, float* x) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if constexpr (FORMAT == kFp32) x[i] = __uint_as_float(w[i]);
    if constexpr (FORMAT == kBf16) x[i] = i % 2 ? __uint_as_float(w[i / 2] & 0xffff0000u) : __uint_as_float(w[i / 2] << 16);
    if constexpr (FORMAT == kFp16) x[i] = half_to_float(i % 2 ? w[i / 2] >> 16 : w[i / 2] & 0xffffu);
    // 2^23 + code, whose low bits are the code: converting integers runs at a quarter of the rate of this.
    if constexpr (FORMAT == kInt8) x[i] = __uint_as_float(__byte_perm(w[i / 4], 0x4b000000u, 0x7440 + i % 4)) - 8388608.0f;
    if constexpr (FORMAT == kInt4) x[i] = __uint_as_float((w[0] >> 4 * i & 0xfu) | 0x4b000000u) - 8388608.0f;
    if constexpr (FORMAT == kInt2) x[i] = __uint_as_float((w[0] >> 2 * i & 3u) | 0x4b000000u) - 8388608.0f;
    if constexpr (FORMAT == kFp4) x[i] = fp4_to_float(w[0] >> 4 * i & 0xfu);
    if constexpr (FORMAT == kFp8) x[i] = fp8_to_float(w[i / 4] >> 8 * (i % 4) & 0xffu);
  }
}

}  // namespace pikv
