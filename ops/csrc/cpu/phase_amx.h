// Tiles of AMX for the attention in phases: all eight have 16 rows of 64 bytes, so that any may hold anything.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace pikv::phases {
namespace {

struct alignas(64) TileShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Sums of 16 x 16: rows of 4 rows of the query twice, hi and lo, and eight that mean nothing.
constexpr int kTileWords = 256;

// Dword r of each 16 bytes of 256: what a row of the query has of [16 registers][4 rows][4 tokens].
inline void by_query_row(const uint8_t* from, uint8_t* to, int64_t stride) {
  const __m512i x[4] = {_mm512_load_si512(from), _mm512_load_si512(from + 64), _mm512_load_si512(from + 128), _mm512_load_si512(from + 192)};
  __m512i at = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  for (int r = 0; r < 4; ++r, at = _mm512_add_epi32(at, _mm512_set1_epi32(1))) {
    const __m512i a = _mm512_permutex2var_epi32(x[0], at, x[1]), b = _mm512_permutex2var_epi32(x[2], at, x[3]);
    _mm512_store_si512(to + r * stride, _mm512_shuffle_i64x2(a, b, 0x44));
  }
}

// The tokens of 4 rows [t][r] -> [r][t].
inline __m512i rows_first(__m512i x) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}

}  // namespace
}  // namespace pikv::phases
