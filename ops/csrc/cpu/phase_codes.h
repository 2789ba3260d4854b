// Codes of integer formats in registers.
#pragma once
#include "phase_lanes.h"

namespace pikv::phases {
namespace {

// Codes of bits [bits * part, ...) of each byte.
template <int F>
inline __m512i part_of(__m512i codes, int part) {
  constexpr int bits = format_bits(F);
  if constexpr (F == kInt8) return codes;
  else return _mm512_and_si512(_mm512_srli_epi16(codes, bits * part), _mm512_set1_epi8((1 << bits) - 1));
}

// Registers [pass * C, ...) of four tokens: of a register of codes its four quarters by lanes, those of int4 and int2 split by part after
// that. There are 4 * parts of them.
template <int F, int C, bool SIGNED>
inline void quads(const uint8_t* v, int64_t stride, __mmask64 there, int pass, __m512i* x) {
  constexpr int parts = 8 / format_bits(F);
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
