// Rows of a tile in registers: what the kernels for keys and for values share.
//
// F is the format of the rows. Integer keys meet the query with VNNI, the others are widened to f32 in registers, once for all rows of the
// query. bf16 dot products would round the query and are no faster (2 cycles each on Emerald Rapids, where two FMAs take one). DC is a width
// known at compile time, or 0.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "avx512.h"
#include "numbers.h"
#include "vnni.h"

namespace pikv::vnni {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kFp8Factor = 256.0f;  // fp8_to_half leaves it out

inline __mmask16 mask16(int left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }
inline __mmask64 mask64(int left) { return left >= 64 ? ~0ull : (1ull << left) - 1; }
inline __mmask32 mask32(int left) { return left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1; }

// e4m3 bytes as floats, for the scales of fp4 blocks, which have no sign. Made by the compiler: code that runs when the library is loaded
// must not need AVX512.
struct Fp8Values {
  float at[128] = {};
  constexpr Fp8Values() {
    for (int c = 0; c < 128; ++c) {
      const int exponent = c >> 3, fraction = c & 7;
      at[c] = (exponent ? 8 + fraction : fraction) * 0x1p-9f;
      for (int i = 1; i < exponent; ++i) at[c] *= 2;
    }
  }
};
constexpr Fp8Values kFp8Values;

// 2^(biased - 127) of 16 tokens.
inline __m512 powers_of_two(__mmask16 m, const uint8_t* biased) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, biased)), 23));
}

// The fp16 scales or zeros of 16 tokens.
inline __m512 token_halves(__mmask16 m, const uint8_t* p) { return halves(m, reinterpret_cast<const uint16_t*>(p)); }

// Columns [d, d + 16 * W) of one row as f32, even and odd apart for the formats in pairs; without scales but those of fp4 blocks, which are
// at `scale`, and fp8 without kFp8Factor. `left` columns are there.
template <int F, int W, bool FULL>
inline void load_columns(const uint8_t* row, const uint8_t* scale, int d, int left, __m512* v) {
  if constexpr (F == kFp32) {
    const float* x = reinterpret_cast<const float*>(row) + d;
    for (int j = 0; j < W; ++j) v[j] = FULL ? _mm512_loadu_ps(x + 16 * j) : _mm512_maskz_loadu_ps(mask16(left - 16 * j), x + 16 * j);
  } else if constexpr (F == kFp16) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(row) + d;
    for (int j = 0; j < W; ++j) v[j] = FULL ? halves(x + 16 * j) : halves(mask16(left - 16 * j), x + 16 * j);
  } else if constexpr (F == kFp8) {
    for (int j = 0; j < W; j += 2) {
      const uint8_t* x = row + d + 16 * j;
      const __m512i h = fp8_to_half(FULL ? _mm256_loadu_si256((const __m256i*)x) : _mm256_maskz_loadu_epi8(mask32(left - 16 * j), x));
      v[j] = _mm512_cvtph_ps(_mm512_castsi512_si256(h));
      v[j + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
    }
  } else if constexpr (F == kInt8) {
    for (int j = 0; j < W; ++j) {
      const __m128i c = FULL ? _mm_loadu_si128((const __m128i*)(row + d + 16 * j))
                             : _mm_maskz_loadu_epi8(mask16(left - 16 * j), row + d + 16 * j);
      v[j] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(c));
    }
  } else if constexpr (F == kInt4) {
    for (int j = 0; j < W; j += 2) {
      const uint8_t* p = row + d / 2 + 8 * j;
      const __m128i c = FULL ? _mm_loadu_si128((const __m128i*)p) : _mm_maskz_loadu_epi8(mask16((left - 16 * j) / 2), p);
      const __m512i x = _mm512_cvtepu8_epi32(c);
      v[j] = _mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(15)));
      v[j + 1] = _mm512_cvtepi32_ps(_mm512_srli_epi32(x, 4));
    }
  } else if constexpr (F == kInt2) {
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);  // indexed by 4 bits, of which 2 are the code
    for (int j = 0; j < W; ++j) {
      uint32_t codes = 0;
      if (FULL || left - 16 * j >= 16) std::memcpy(&codes, row + d / 4 + 4 * j, 4);
      else if (left > 16 * j) std::memcpy(&codes, row + d / 4 + 4 * j, 2);
      v[j] = _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32((int)codes), shifts), values);
    }
  } else if constexpr (F == kFp4) {
    const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
    for (int j = 0; j < W; j += 2) {
      const uint8_t* p = row + d / 2 + 8 * j;
      const __m512i c = _mm512_cvtepu8_epi32(FULL ? _mm_loadu_si128((const __m128i*)p) : _mm_maskz_loadu_epi8(mask16((left - 16 * j) / 2), p));
      // Of 32 columns, even or odd, the first 8 lanes lie in one block; a second one beyond the row only meets zeros.
      const uint8_t* s = scale + (d + 16 * j) / kFp4Block;
      const __m512 blocks = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(kFp8Values.at[s[0] & 127]), _mm512_set1_ps(kFp8Values.at[s[1] & 127]));
      v[j] = _mm512_mul_ps(_mm512_permutexvar_ps(c, values), blocks);
      v[j + 1] = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(c, 4), values), blocks);
    }
  } else {
    const uint16_t* h = reinterpret_cast<const uint16_t*>(row);
    for (int j = 0; j < W; j += 2) {
      const __m512i x = FULL ? _mm512_loadu_si512(h + d + 16 * j) : _mm512_maskz_loadu_epi16(mask32(left - 16 * j), h + d + 16 * j);
      v[j] = even_bf16(x), v[j + 1] = odd_bf16(x);
    }
  }
}

// One line per call, until `end`: spread through the arithmetic, so that the core keeps reading while it computes.
struct Prefetch {
  const uint8_t *at, *end;
  bool first_level = false;
  inline void lines(int count) {
    for (int i = 0; i < count; ++i, at += 64) {
      if (at >= end) continue;
      if (first_level) _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
      else prefetch(at);
    }
  }
};

inline void add_to(float* sums, int row, __m512 x) { _mm512_store_ps(sums + row * 16, _mm512_add_ps(_mm512_load_ps(sums + row * 16), x)); }

}  // namespace
}  // namespace pikv::vnni
