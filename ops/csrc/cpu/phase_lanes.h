// Pieces of the attention in phases: registers whose lanes are R rows of 16 / R tokens.
#pragma once
#include "avx512.h"
#include "phases.h"

namespace pikv::phases {
namespace {

// sum += dot products, of unsigned with signed bytes. As an instruction: GCC 12 copies every sum before and after its intrinsic, 32 copies
// in a loop of 16 products.
inline void add_dots(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

template <int R>
inline __m512 group_max(__m512 x) {
  x = _mm512_max_ps(x, _mm512_permute_ps(x, 0xb1));
  x = _mm512_max_ps(x, _mm512_permute_ps(x, 0x4e));
  if (R <= 2) x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  if (R == 1) x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  return x;
}

template <int R>
inline __m512 group_sum(__m512 x) {
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xb1));
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
  if (R <= 2) x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  if (R == 1) x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  return x;
}

// The same 16 / R numbers for each row.
template <int R>
inline __m512 by_token(__m512 x) {
  return R == 4 ? _mm512_shuffle_f32x4(x, x, 0) : R == 2 ? _mm512_shuffle_f32x4(x, x, 0x44) : x;
}

// Number r of x for all tokens of row r.
template <int R>
inline __m512 by_row(const float* x) {
  const __m512i r = R == 4 ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                           : R == 2 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1) : _mm512_setzero_si512();
  return _mm512_permutexvar_ps(r, _mm512_maskz_loadu_ps((1u << R) - 1, x));
}

// The 128-bit lanes of x[r] joined into lane r.
template <class Join>
inline __m512 rows_of_lanes(const __m512* x, Join join) {
  const auto halve = [&](__m512 a, __m512 b) { return join(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); };
  const __m512 a = halve(x[0], x[1]), b = halve(x[2], x[3]);
  return join(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// The sum of the lanes of x[r], for all tokens of row r; the largest of them.
template <int R, class Join>
inline __m512 across_lanes(const __m512* x, Join join) {
  if constexpr (R == 4) {
    __m512 y = rows_of_lanes(x, join);
    y = join(y, _mm512_permute_ps(y, 0x4e));
    return join(y, _mm512_permute_ps(y, 0xb1));
  } else {
    __m512 y[R];
    for (int r = 0; r < R; ++r) {
      y[r] = join(x[r], _mm512_shuffle_f32x4(x[r], x[r], 0x4e));
      y[r] = join(y[r], _mm512_shuffle_f32x4(y[r], y[r], 0xb1));
      y[r] = join(y[r], _mm512_permute_ps(y[r], 0x4e));
      y[r] = join(y[r], _mm512_permute_ps(y[r], 0xb1));
    }
    return R == 1 ? y[0] : _mm512_mask_mov_ps(y[0], 0xff00, y[R - 1]);
  }
}
template <int R>
inline __m512 lane_sums(const __m512* x) {
  return across_lanes<R>(x, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
}
template <int R>
inline __m512 lane_tops(const __m512* x) {
  return across_lanes<R>(x, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
}

// The tokens of register i of scores that are seen, by lane.
template <int R>
inline __mmask16 seen(uint64_t visible, int i) {
  constexpr int T = tokens_of(R);
  const unsigned bits = (unsigned)(visible >> (T * i)) & ((1u << T) - 1);
  return (__mmask16)(R == 4 ? bits * 0x1111u : R == 2 ? bits * 0x0101u : bits);
}

// Halves of the 16 / R tokens of register i; hidden ones, which may hold anything, count as 0.
template <int R, bool MASKED>
inline __m512 token_halves(const uint8_t* p, uint64_t visible, int i) {
  constexpr int T = tokens_of(R);
  const uint16_t* at = reinterpret_cast<const uint16_t*>(p) + T * i;
  const __mmask16 m = MASKED ? (__mmask16)((visible >> (T * i)) & ((1u << T) - 1)) : (__mmask16)((1u << T) - 1);
  if constexpr (R == 4) {
    const __m128i x = MASKED ? _mm_maskz_loadu_epi16((__mmask8)m, at) : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    return _mm512_broadcast_f32x4(_mm_cvtph_ps(x));
  } else if constexpr (R == 2) {
    const __m128i x = MASKED ? _mm_maskz_loadu_epi16((__mmask8)m, at) : _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm512_broadcast_f32x8(_mm256_cvtph_ps(x));
  } else {
    return MASKED ? halves(m, at) : halves(at);
  }
}

// The row of each sum, for sums of this row alone.
inline __m512 lane_of_row(const float* lanes, int R, int r) { return _mm512_set1_ps(lanes[r * tokens_of(R)]); }

inline void read_ahead(Ahead& ahead, int lines) {
  const uint8_t* const stop = ahead.at + 64 * (int64_t)lines < ahead.end ? ahead.at + 64 * (int64_t)lines : ahead.end;
  if (ahead.first_level)
    for (; ahead.at < stop; ahead.at += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead.at), _MM_HINT_T0);
  else
    for (; ahead.at < stop; ahead.at += 64) prefetch(ahead.at);
}

// A new largest score: what has been summed shrinks. Rare.
template <int R>
[[gnu::noinline]] inline __m512 raise_top(Rows& rows, const Work& w, __m512 top) {
  const __m512 old = _mm512_load_ps(rows.m);
  const __mmask16 higher = _mm512_cmp_ps_mask(top, old, _CMP_GT_OQ);
  const __m512 next = _mm512_mask_mov_ps(old, higher, top);
  alignas(64) float shrink[16];
  _mm512_store_ps(shrink, _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), higher, exp2_negative(_mm512_sub_ps(old, next))));
  float* const sums[2] = {rows.l, rows.page_l};
  for (float* x : sums) _mm512_store_ps(x, _mm512_mul_ps(_mm512_load_ps(x), _mm512_load_ps(shrink)));
  for (int r = 0; r < R; ++r) {
    const __m512 f = lane_of_row(shrink, R, r);
    float* acc = rows.acc + (size_t)r * w.sums;
    for (int d = 0; d < w.sums; d += 16) _mm512_store_ps(acc + d, _mm512_mul_ps(_mm512_load_ps(acc + d), f));
  }
  _mm512_store_ps(rows.m, next);
  return next;
}

// The largest score of a phase is found, hidden scores become -inf, and rows.m is raised to it. Returns rows.m.
template <int R, bool MASKED>
inline __m512 find_top(Rows& rows, const Phase& phase, Work& w) {
  const int tiles = phase.count / tokens_of(R);
  __m512 top = _mm512_set1_ps(-__builtin_inff()), other = top;
  for (int i = 0; i < tiles; ++i) {
    __m512 s = _mm512_load_ps(w.s + 16 * i);
    if (MASKED) {
      s = _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), seen<R>(phase.visible, i), s);
      _mm512_store_ps(w.s + 16 * i, s);
    }
    if (i & 1) other = _mm512_max_ps(other, s);
    else top = _mm512_max_ps(top, s);
  }
  top = group_max<R>(_mm512_max_ps(top, other));
  const __m512 m = _mm512_load_ps(rows.m);
  return __builtin_expect(_mm512_cmp_ps_mask(top, m, _CMP_GT_OQ), 0) ? raise_top<R>(rows, w, top) : m;
}

// exp2(score - m) of register i.
template <int R, bool MASKED>
inline __m512 weight(const Phase& phase, const Work& w, int i, __m512 m) {
  const __m512 e = exp2_negative(_mm512_sub_ps(_mm512_load_ps(w.s + 16 * i), m));
  return MASKED ? _mm512_maskz_mov_ps(seen<R>(phase.visible, i), e) : e;
}

}  // namespace
}  // namespace pikv::phases
