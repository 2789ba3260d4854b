// Codes of integer formats in registers.
#pragma once
#include "phase_lanes.h"

namespace pikv::phases {
namespace {

// Registers of 64 codes that 64 bytes of a row have, by the bits of their bytes. FOLD: of a row of at most 32 bytes, whose upper halves of
// bytes come to lie behind the lower ones, so that no register is half empty.
constexpr int parts_of(int F, bool FOLD) { return 8 / format_bits(F) / (FOLD ? 2 : 1); }

// Codes of bits [bits * part, ...) of each byte.
template <int F>
inline __m512i part_of(__m512i codes, int part) {
  constexpr int bits = format_bits(F);
  if constexpr (F == kInt8) return codes;
  else return _mm512_and_si512(_mm512_srli_epi16(codes, bits * part), _mm512_set1_epi8((1 << bits) - 1));
}

inline __m512i folded(__m256i x) { return _mm512_inserti64x4(_mm512_castsi256_si512(x), _mm256_srli_epi16(x, 4), 1); }

template <bool FOLD>
inline __m512i load_codes(const uint8_t* row, __mmask64 there) {
  if constexpr (FOLD) return folded(_mm256_maskz_loadu_epi8((__mmask32)there, row));
  else return _mm512_maskz_loadu_epi8(there, row);
}

// Registers [pass * C, ...) of four tokens: of a register of codes its four quarters by lanes, those of int4 and int2 split by part after
// that. There are 4 * parts_of of them.
template <int F, bool FOLD, int C, bool SIGNED>
inline void quads(const uint8_t* v, int64_t stride, __mmask64 there, int pass, __m512i* x) {
  constexpr int parts = parts_of(F, FOLD);
  if constexpr (FOLD) {
    __m256i r[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) r[j] = _mm256_maskz_loadu_epi8((__mmask32)there, v + j * stride);
    const auto quarter = [&](int q) {
      const __m256i a = q < 2 ? _mm256_unpacklo_epi8(r[0], r[1]) : _mm256_unpackhi_epi8(r[0], r[1]);
      const __m256i b = q < 2 ? _mm256_unpacklo_epi8(r[2], r[3]) : _mm256_unpackhi_epi8(r[2], r[3]);
      return folded(q % 2 ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b));
    };
#pragma GCC unroll 16
    for (int i = 0; i < C; ++i) x[i] = part_of<F>(quarter((pass * C + i) / parts), (pass * C + i) % parts);
    return;
  }
  __m512i r[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_maskz_loadu_epi8(there, v + j * stride);
    if constexpr (SIGNED) r[j] = _mm512_xor_si512(r[j], _mm512_set1_epi8((char)0x80));
  }
  const auto quarter = [&](int q) {
    const __m512i a = q < 2 ? _mm512_unpacklo_epi8(r[0], r[1]) : _mm512_unpackhi_epi8(r[0], r[1]);
    const __m512i b = q < 2 ? _mm512_unpacklo_epi8(r[2], r[3]) : _mm512_unpackhi_epi8(r[2], r[3]);
    return q % 2 ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
  };
#pragma GCC unroll 16
  for (int i = 0; i < C; ++i) x[i] = part_of<F>(quarter((pass * C + i) / parts), (pass * C + i) % parts);
}

}  // namespace
}  // namespace pikv::phases
