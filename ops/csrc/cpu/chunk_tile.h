// The products of chunk.h in registers, for any type of number: 6 rows x 4 registers of tokens or columns, so that a register of keys or
// values is loaded once for 6 rows, and a number of a row once for 64 tokens or columns.
#pragma once
#include <cmath>

#include "avx512.h"
#include "chunk.h"

namespace pikv::chunks {
namespace {

constexpr float kInf = __builtin_inff();

inline __m512i dword(const uint32_t* p) { return _mm512_set1_epi32((int)*p); }

template <class Number, int R>
inline void score_tile(const uint32_t* q, int k_steps, const uint32_t* k, const float* factor, float* s) {
  __m512 x[R][4];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) x[r][c] = _mm512_setzero_ps();
#pragma GCC unroll 2
  for (int i = 0; i < k_steps; ++i, k += kPanel) {
    __m512i key[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) key[c] = _mm512_load_si512(k + 16 * c);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512i y = dword(q + (int64_t)r * k_steps + i);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) x[r][c] = Number::product(x[r][c], key[c], y);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 f = _mm512_load_ps(factor + 16 * c);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) _mm512_store_ps(s + (int64_t)r * kTokens + 16 * c, _mm512_mul_ps(x[r][c], f));
  }
}

template <class Number>
void scores(const uint32_t* q, int rows, int k_steps, const Block& block, float* s) {
  for (int p = 0; p < block.panels; ++p) {
    const uint32_t* k = block.k + (int64_t)p * k_steps * kPanel;
    for (int r = 0; r < rows;) {
      const uint32_t* at = q + (int64_t)r * k_steps;
      float* to = s + (int64_t)r * kTokens + p * kPanel;
      const float* factor = block.k_factor + p * kPanel;
      const int left = rows - r;
      if (left >= 6) score_tile<Number, 6>(at, k_steps, k, factor, to), r += 6;
      else if (left >= 4) score_tile<Number, 4>(at, k_steps, k, factor, to), r += 4;
      else if (left >= 2) score_tile<Number, 2>(at, k_steps, k, factor, to), r += 2;
      else score_tile<Number, 1>(at, k_steps, k, factor, to), r += 1;
    }
  }
}

template <class Number, int R, int C>
inline void add_tile(const float* s, const Block& block, int v_dim, int column, float* out) {
  __m512 x[R][C];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) x[r][c] = _mm512_loadu_ps(out + (int64_t)r * v_dim + column + 16 * c);
  const uint32_t* v = block.v + column;
  for (int t = 0; t < block.panels * kPanel; t += 32) {  // weights of 32 tokens are 32 dwords of any type of number
    const uint32_t* w = reinterpret_cast<const uint32_t*>(s + t);
#pragma GCC unroll 1
    for (int i = 0; i < Number::kSteps; ++i, v += v_dim) {
      __m512i value[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) value[c] = _mm512_loadu_si512(v + 16 * c);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int part = 0; part < 32 / Number::kSteps; ++part) {
          const __m512i y = dword(w + (int64_t)r * kTokens + part * Number::kSteps + i);
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) x[r][c] = Number::product(x[r][c], value[c], y);
        }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) _mm512_storeu_ps(out + (int64_t)r * v_dim + column + 16 * c, x[r][c]);
}

template <class Number, int C>
inline void add_columns(const float* s, int rows, const Block& block, int v_dim, int column, float* out) {
  for (int r = 0; r < rows;) {
    const float* w = s + (int64_t)r * kTokens;
    float* to = out + (int64_t)r * v_dim;
    const int left = rows - r;
    if (left >= 6) add_tile<Number, 6, C>(w, block, v_dim, column, to), r += 6;
    else if (left >= 4) add_tile<Number, 4, C>(w, block, v_dim, column, to), r += 4;
    else if (left >= 2) add_tile<Number, 2, C>(w, block, v_dim, column, to), r += 2;
    else add_tile<Number, 1, C>(w, block, v_dim, column, to), r += 1;
  }
}

template <class Number>
void add(const float* s, int rows, const Block& block, int v_dim, float* out) {
  int column = 0;
  for (; column + 64 <= v_dim; column += 64) add_columns<Number, 4>(s, rows, block, v_dim, column, out);
  for (; column + 32 <= v_dim; column += 32) add_columns<Number, 2>(s, rows, block, v_dim, column, out);
  for (; column < v_dim; column += 16) add_columns<Number, 1>(s, rows, block, v_dim, column, out);
}

template <class Number, bool MASKED>
inline void soften_row(float* s, const uint64_t* visible, const Block& block, float& m, float& l, float* out, int v_dim) {
  const int n = block.panels * kPanel / 16;
  const auto seen = [&](int i) { return (__mmask16)(visible[i / 4] >> (i % 4 * 16)); };
  __m512 top = _mm512_set1_ps(-kInf), top2 = top;
  for (int i = 0; i < n; i += 2) {
    __m512 x = _mm512_load_ps(s + 16 * i), x2 = _mm512_load_ps(s + 16 * i + 16);
    if constexpr (MASKED) {
      x = _mm512_mask_mov_ps(_mm512_set1_ps(-kInf), seen(i), x), x2 = _mm512_mask_mov_ps(_mm512_set1_ps(-kInf), seen(i + 1), x2);
      _mm512_store_ps(s + 16 * i, x), _mm512_store_ps(s + 16 * i + 16, x2);
    }
    top = _mm512_max_ps(top, x), top2 = _mm512_max_ps(top2, x2);
  }
  const float highest = _mm512_reduce_max_ps(_mm512_max_ps(top, top2));
  if (highest > m) {
    const __m512 shrink = _mm512_set1_ps(m == -kInf ? 0.0f : std::exp2(m - highest));
    l *= _mm512_cvtss_f32(shrink), m = highest;
    for (int d = 0; d < v_dim; d += 16) _mm512_storeu_ps(out + d, _mm512_mul_ps(_mm512_loadu_ps(out + d), shrink));
  }
  const __m512 base = _mm512_set1_ps(m == -kInf ? 0.0f : m);
  __m512 sum = _mm512_setzero_ps(), sum2 = sum;
  for (int i = 0; i < n; i += 2) {
    __m512 e = exp2_negative(_mm512_sub_ps(_mm512_load_ps(s + 16 * i), base));
    __m512 e2 = exp2_negative(_mm512_sub_ps(_mm512_load_ps(s + 16 * i + 16), base));
    if constexpr (MASKED) e = _mm512_maskz_mov_ps(seen(i), e), e2 = _mm512_maskz_mov_ps(seen(i + 1), e2);
    sum = _mm512_add_ps(sum, e), sum2 = _mm512_add_ps(sum2, e2);
    if (block.v_factor) {  // that of a hidden token may hold anything
      e = _mm512_mul_ps(e, _mm512_load_ps(block.v_factor + 16 * i)), e2 = _mm512_mul_ps(e2, _mm512_load_ps(block.v_factor + 16 * i + 16));
      if constexpr (MASKED) e = _mm512_maskz_mov_ps(seen(i), e), e2 = _mm512_maskz_mov_ps(seen(i + 1), e2);
    }
    Number::store_weights(s + 16 * i, e, e2);
  }
  l += _mm512_reduce_add_ps(_mm512_add_ps(sum, sum2));
}

template <class Number>
void soften(float* s, const uint64_t* visible, const Block& block, float& m, float& l, float* out, int v_dim) {
  if (visible) soften_row<Number, true>(s, visible, block, m, l, out, v_dim);
  else soften_row<Number, false>(s, visible, block, m, l, out, v_dim);
}

// 16 rows of 16 dwords, `stride` apart -> 16 columns, kPanel apart.
inline void transpose16(const uint32_t* from, int64_t stride, uint32_t* to) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + j]: column 4 * lane + j of rows i to i + 3
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i low2 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd), high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_store_si512(to + (0 + j) * kPanel, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_store_si512(to + (8 + j) * kPanel, _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_store_si512(to + (4 + j) * kPanel, _mm512_shuffle_i32x4(low2, high2, 0x88));
    _mm512_store_si512(to + (12 + j) * kPanel, _mm512_shuffle_i32x4(low2, high2, 0xdd));
  }
}

inline void pack_keys(const uint32_t* rows, int tokens, int k_steps, uint32_t* to) {
  for (int t = 0; t < tokens; t += 16)
    for (int i = 0; i < k_steps; i += 16)
      transpose16(rows + (int64_t)t * k_steps + i, k_steps, to + ((int64_t)(t / kPanel) * k_steps + i) * kPanel + t % kPanel);
}

}  // namespace
}  // namespace pikv::chunks
