// Rows of bf16 and fp8 in registers as pairs of bf16, exactly, for the attention in phases: with AVX512 BF16 and VBMI.
//
// The query lies in the order in which a key comes; weights are bf16 twice, hi + lo, 16 bits of them.
#pragma once
#include "phase_lanes.h"

namespace pikv::phases {
namespace {

// The two bytes of the bf16 of an e4m3 magnitude. Made by the compiler: code that runs when the library is loaded must not need AVX512.
struct Fp8Bytes {
  alignas(64) uint8_t high[128] = {}, low[128] = {};
  constexpr Fp8Bytes() {
    for (int c = 1; c < 128; ++c) {
      int exponent = c >> 3, fraction = c & 7;
      if (!exponent) {  // subnormal: units of 2^-9
        exponent = 1;
        while (fraction < 8) fraction *= 2, --exponent;
        fraction &= 7;
      }
      const int bits = (exponent + 120) << 7 | fraction << 4;
      high[c] = (uint8_t)(bits >> 8), low[c] = (uint8_t)(bits & 255);
    }
  }
};
constexpr Fp8Bytes kFp8Bytes;

struct Fp8Tables {
  __m512i h0 = _mm512_load_si512(kFp8Bytes.high), h1 = _mm512_load_si512(kFp8Bytes.high + 64);
  __m512i l0 = _mm512_load_si512(kFp8Bytes.low), l1 = _mm512_load_si512(kFp8Bytes.low + 64);
  inline void bytes(__m512i c, __m512i& high, __m512i& low) const {
    high = _mm512_permutex2var_epi8(h0, c, h1), low = _mm512_permutex2var_epi8(l0, c, l1);
    high = _mm512_ternarylogic_epi32(high, c, _mm512_set1_epi8((char)0x80), 0xf8);  // the sign: high | c & 0x80
  }
};

// 64 bytes of one row -> its registers of 32 bf16: 1 of bf16, 2 of fp8.
template <int F>
inline void key_row(const Fp8Tables& tables, const uint8_t* row, __m512i* x) {
  x[0] = _mm512_loadu_si512(row);
  if constexpr (F == kFp8) {
    __m512i high, low;
    tables.bytes(x[0], high, low);
    x[0] = _mm512_unpacklo_epi8(low, high), x[1] = _mm512_unpackhi_epi8(low, high);
  }
}

// 64 bytes of two rows -> registers of 16 columns of both: 2 of bf16, 4 of fp8.
template <int F>
inline void value_pairs(const Fp8Tables& tables, const uint8_t* row, int64_t stride, __m512i* x) {
  const __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(row + stride);
  if constexpr (F == kFp8) {
    __m512i high, low;
    tables.bytes(_mm512_unpacklo_epi8(a, b), high, low);
    x[0] = _mm512_unpacklo_epi8(low, high), x[1] = _mm512_unpackhi_epi8(low, high);
    tables.bytes(_mm512_unpackhi_epi8(a, b), high, low);
    x[2] = _mm512_unpacklo_epi8(low, high), x[3] = _mm512_unpackhi_epi8(low, high);
  } else {
    x[0] = _mm512_unpacklo_epi16(a, b), x[1] = _mm512_unpackhi_epi16(a, b);
  }
}

// Registers of key_row and of value_pairs from 64 bytes.
constexpr int key_registers(int F) { return F == kFp8 ? 2 : 1; }
constexpr int pair_registers(int F) { return F == kFp8 ? 4 : 2; }

// Factors of the scores of four tokens of four rows.
template <int F, bool MASKED>
inline __m512 key_factor(const Phase& phase, __m512 scale, int i) {
  if constexpr (F == kFp8) return _mm512_mul_ps(scale, token_halves<4, MASKED>(phase.k_scale, phase.visible, i));
  else return scale;
}

}  // namespace
}  // namespace pikv::phases
