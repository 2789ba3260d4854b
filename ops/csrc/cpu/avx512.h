// Small AVX512 pieces of the hand-written kernels.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace pikv {

namespace {

// 2^x for x <= 0, about 1e-7 relative; anything below -126 counts as -126.
inline __m512 exp2_negative(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
  const __m512 n = _mm512_roundscale_ps(x, 8), f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Lane t of the result = the sum of all lanes of a[t].
inline __m512 sums16(const __m512* a) {
  __m512 b[8], c[4];
  for (int i = 0; i < 8; ++i) b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const __m512 d0 = _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
  const __m512 d1 = _mm512_add_ps(_mm512_shuffle_f32x4(c[2], c[3], 0x88), _mm512_shuffle_f32x4(c[2], c[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(d0, d1, 0x88), _mm512_shuffle_f32x4(d0, d1, 0xdd));
}

inline __m512i sums16(const __m512i* a) {
  __m512i b[8], c[4];
  for (int i = 0; i < 16; i += 2) b[i / 2] = _mm512_add_epi32(_mm512_unpacklo_epi32(a[i], a[i + 1]), _mm512_unpackhi_epi32(a[i], a[i + 1]));
  for (int i = 0; i < 8; i += 2) c[i / 2] = _mm512_add_epi32(_mm512_unpacklo_epi64(b[i], b[i + 1]), _mm512_unpackhi_epi64(b[i], b[i + 1]));
  const __m512i d0 = _mm512_add_epi32(_mm512_shuffle_i32x4(c[0], c[1], 0x88), _mm512_shuffle_i32x4(c[0], c[1], 0xdd));
  const __m512i d1 = _mm512_add_epi32(_mm512_shuffle_i32x4(c[2], c[3], 0x88), _mm512_shuffle_i32x4(c[2], c[3], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(d0, d1, 0x88), _mm512_shuffle_i32x4(d0, d1, 0xdd));
}

// The same four bytes in every lane.
inline __m512i four_bytes(const int8_t* p) {
  int x;
  __builtin_memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}

// bf16 pairs to f32: the even elements, the odd elements.
inline __m512 even_bf16(__m512i w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
inline __m512 odd_bf16(__m512i w) { return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000))); }

inline __m512 halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline __m512 halves(__mmask16 m, const uint16_t* p) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }

// 32 e4m3 codes -> 32 fp16 of value / 256, exact, subnormals included: sign-extended and shifted, only the copied sign bit is too many.
inline __m512i fp8_to_half(__m256i c) {
  return _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(c), 7), _mm512_set1_epi16((int16_t)0xbf80));
}

// 32 bytes of nibble pairs -> 32 even columns, then 32 odd columns.
inline __m512i split_nibbles(__m256i w) {
  const __m256i low = _mm256_set1_epi8(15);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(w, low)), _mm256_and_si256(_mm256_srli_epi16(w, 4), low), 1);
}

// 64 bytes in column order -> the order of split_nibbles.
inline __m512i split_columns(__m512i x) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(x)), _mm512_cvtepi16_epi8(_mm512_srli_epi16(x, 8)), 1);
}

// 16 bytes of four 2-bit codes each -> 64 columns.
inline __m512i split_crumbs(__m128i w) {
  __m512i x = _mm512_cvtepu8_epi32(w);
  x = _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi32(x, 12)), _mm512_set1_epi32(0x000f000f));
  return _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi32(x, 6)), _mm512_set1_epi32(0x03030303));
}

// Into the second level. The first one waits for so few lines that reading through it is slower: to a third of the memory's rate on Zen 4
// (one query row in bf16: 10 instead of 20 GB/s), 10 % on Granite Rapids.
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace pikv
