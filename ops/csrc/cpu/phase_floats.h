// Rows of bf16, fp8 and fp4 in registers as pairs of bf16, exactly, for the attention in phases: with AVX512 BF16 and VBMI.
//
// The query lies in the order in which a key comes; weights are bf16 twice, hi + lo, 16 bits of them.
#pragma once
#include "phase_lanes.h"
#include "vnni_tile.h"

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

// What the 16 codes of e2m1 mean under the scales of four blocks, as bf16, which holds all of it: six bits.
inline void fp4_tables(const uint8_t* scales, __m512i& first, __m512i& second) {
  const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
  const auto scaled = [&](int b) { return _mm512_mul_ps(values, _mm512_set1_ps(vnni::kFp8Values.at[scales[b] & 127])); };
  first = (__m512i)_mm512_cvtne2ps_pbh(scaled(1), scaled(0)), second = (__m512i)_mm512_cvtne2ps_pbh(scaled(3), scaled(2));
}

// 64 columns, 32 bytes -> 32 even ones, 32 odd ones.
inline void fp4_columns(const uint8_t* row, const uint8_t* scales, __m512i* x) {
  constexpr int b1 = 0x00100010, b2 = 0x00200020, b3 = 0x00300030;
  const __m512i block = _mm512_setr_epi32(0, 0, 0, 0, b1, b1, b1, b1, b2, b2, b2, b2, b3, b3, b3, b3);
  const __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)row));
  __m512i first, second;
  fp4_tables(scales, first, second);
  x[0] = _mm512_permutex2var_epi16(first, _mm512_ternarylogic_epi32(w, _mm512_set1_epi16(15), block, 0xea), second);
  x[1] = _mm512_permutex2var_epi16(first, _mm512_or_si512(_mm512_srli_epi16(w, 4), block), second);
}

// As add_dots, of pairs of bf16.
inline void add_pairs(__m512& sum, __m512i x, __m512i y) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y)); }

constexpr int unit_bytes(int F) { return 8 * format_bits(F); }  // of 64 columns

// 64 columns of one row -> two registers of 32 bf16. `scales`: of fp4, those of its blocks.
template <int F>
inline void key_columns(const Fp8Tables& tables, const uint8_t* row, const uint8_t* scales, __m512i* x) {
  if constexpr (F == kFp8) {
    __m512i high, low;
    tables.bytes(_mm512_loadu_si512(row), high, low);
    x[0] = _mm512_unpacklo_epi8(low, high), x[1] = _mm512_unpackhi_epi8(low, high);
  } else if constexpr (F == kFp4) {
    fp4_columns(row, scales, x);
  } else {
    x[0] = _mm512_loadu_si512(row), x[1] = _mm512_loadu_si512(row + 64);
  }
}

// 64 columns of two rows -> four registers of 16 columns of both. Scales of fp4 are `blocks` apart.
template <int F>
inline void value_columns(const Fp8Tables& tables, const uint8_t* row, int64_t stride, const uint8_t* scales, int blocks, __m512i* x) {
  if constexpr (F == kFp8) {
    const __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(row + stride);
    __m512i high, low;
    tables.bytes(_mm512_unpacklo_epi8(a, b), high, low);
    x[0] = _mm512_unpacklo_epi8(low, high), x[1] = _mm512_unpackhi_epi8(low, high);
    tables.bytes(_mm512_unpackhi_epi8(a, b), high, low);
    x[2] = _mm512_unpacklo_epi8(low, high), x[3] = _mm512_unpackhi_epi8(low, high);
  } else {
    __m512i a[2], b[2];
    key_columns<F>(tables, row, scales, a), key_columns<F>(tables, row + stride, scales + blocks, b);
    x[0] = _mm512_unpacklo_epi16(a[0], b[0]), x[1] = _mm512_unpackhi_epi16(a[0], b[0]);
    x[2] = _mm512_unpacklo_epi16(a[1], b[1]), x[3] = _mm512_unpackhi_epi16(a[1], b[1]);
  }
}

// 2^(biased - 127) of four tokens of four rows; hidden ones count as 0.
template <bool MASKED>
inline __m512 token_powers(const uint8_t* biased, uint64_t visible, int i) {
  const __m128i x = MASKED ? _mm_maskz_loadu_epi8((__mmask16)(visible >> (4 * i) & 15), biased + 4 * i) : _mm_loadu_si32(biased + 4 * i);
  return _mm512_broadcast_f32x4(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu8_epi32(x), 23)));
}

// What the values of four tokens of four rows are multiplied by: their scales, of fp4 what is common to the blocks of a row.
template <int F, bool MASKED>
inline __m512 row_factor(const uint8_t* scale, const uint8_t* zero, uint64_t visible, int i) {
  if constexpr (F == kFp8) return token_halves<4, MASKED>(scale, visible, i);
  else return token_powers<MASKED>(zero, visible, i);
}

}  // namespace
}  // namespace pikv::phases
