// Weights and values of a phase for integer values by VNNI. Four tokens of a column come to lie in one lane, once for all rows of the query,
// and meet their weights in a dot product of bytes; sums stay in registers for the whole phase.
#include <algorithm>

#include "phase_codes.h"

namespace pikv::phases {
namespace {

// Weights become bytes in units of w.w_step: hi + lo / 256 int8, or with FAST one uint8 whose values are signed (int8 codes less 128). What
// that leaves out of a weight meets the middle code, in the zeros, so that only the distance of the code from it is lost.
template <int F, int R, bool FAST, bool MASKED>
void soften_rows(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  Ahead next = ahead;
  const int tiles = phase.count / tokens_of(R);
  const __m512 m = find_top<R, MASKED>(rows, phase, w);
  __m512 l = _mm512_setzero_ps(), zero = l, big = l;
#pragma GCC unroll 4
  for (int i = 0; i < tiles; ++i) {
    read_ahead(next, lines);
    __m512 e = weight<R, MASKED>(phase, w, i, m);
    l = _mm512_add_ps(l, e);
    zero = _mm512_fmadd_ps(e, token_halves<R, MASKED>(phase.v_zero, phase.visible, i), zero);
    e = _mm512_mul_ps(e, token_halves<R, MASKED>(phase.v_scale, phase.visible, i));
    big = _mm512_max_ps(big, e);
    _mm512_store_ps(w.s + 16 * i, e);
  }
  _mm512_store_ps(rows.l, _mm512_add_ps(_mm512_load_ps(rows.l), l));
  if (phase.page_lse) _mm512_store_ps(rows.page_l, _mm512_add_ps(_mm512_load_ps(rows.page_l), l));
  big = _mm512_max_ps(group_max<R>(big), _mm512_set1_ps(1e-30f));
  constexpr float full = FAST ? 255.0f : 127.0f;
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(full), big);
  const __m512 step = _mm512_mul_ps(big, _mm512_set1_ps(FAST ? 1 / full : 1 / (full * 256.0f)));
  __m512 lost = _mm512_setzero_ps(), whole = lost;
#pragma GCC unroll 4
  for (int i = 0; i < tiles; ++i) {
    read_ahead(next, lines);
    const __m512 y = _mm512_mul_ps(_mm512_load_ps(w.s + 16 * i), inverse), q = _mm512_roundscale_ps(y, 8);
    _mm_store_si128((__m128i*)(w.w_hi + 16 * i), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(q)));
    if constexpr (FAST) {
      lost = _mm512_add_ps(lost, _mm512_sub_ps(y, q));
      if (F == kInt8) whole = _mm512_add_ps(whole, q);
    } else {
      const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(y, q), _mm512_set1_ps(256.0f));
      const __m512i low = _mm512_min_epi32(_mm512_cvtps_epi32(rest), _mm512_set1_epi32(127));
      lost = _mm512_add_ps(lost, _mm512_sub_ps(rest, _mm512_cvtepi32_ps(low)));
      _mm_store_si128((__m128i*)(w.w_lo + 16 * i), _mm512_cvtepi32_epi8(low));
    }
  }
  zero = _mm512_fmadd_ps(_mm512_mul_ps(lost, step), _mm512_set1_ps(0.5f * format_levels(F)), zero);
  if (FAST && F == kInt8) zero = _mm512_fmadd_ps(_mm512_mul_ps(whole, step), _mm512_set1_ps(128.0f), zero);
  _mm512_store_ps(w.w_step, step), _mm512_store_ps(w.w_zero, group_sum<R>(zero));
  ahead = next;
}

template <int F, int R, bool FAST>
void soften(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  if (phase.all) soften_rows<F, R, FAST, false>(rows, phase, w, ahead, lines);
  else soften_rows<F, R, FAST, true>(rows, phase, w, ahead, lines);
}

// Sums of C registers of columns for R rows over all tokens of the phase, hi and lo: at most 16 registers.
template <int F, bool FOLD, int R, bool FAST, int C, int PASS>
inline void add_pass(Rows& rows, const Phase& phase, const Work& w, int block, __mmask64 there, Ahead& ahead, int lines) {
  constexpr int T = tokens_of(R), quads_of = T / 4;
  constexpr bool is_signed = FAST && F == kInt8;
  __m512i hi[R * C], lo[FAST ? 1 : R * C];
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) {
    hi[i] = _mm512_setzero_si512();
    if (!FAST) lo[i] = hi[i];
  }
  const uint8_t* v = phase.v + 64 * block;
  const uint8_t *w_hi = w.w_hi, *w_lo = w.w_lo;
  Ahead next = ahead;
#pragma GCC unroll 1
  for (int t = 0; t < phase.count; t += T, w_hi += 16, w_lo += 16) {
    read_ahead(next, lines);
#pragma GCC unroll 4
    for (int j = 0; j < quads_of; ++j, v += 4 * phase.v_stride) {
      __m512i x[C];
      quads<F, FOLD, C, is_signed>(v, phase.v_stride, there, PASS, x);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i p = four_bytes(reinterpret_cast<const int8_t*>(w_hi) + 4 * (r * quads_of + j));
#pragma GCC unroll 4
        for (int i = 0; i < C; ++i)
          add_dots(hi[r * C + i], FAST ? p : x[i], FAST ? x[i] : p);
        if constexpr (!FAST) {
          const __m512i p2 = four_bytes(reinterpret_cast<const int8_t*>(w_lo) + 4 * (r * quads_of + j));
#pragma GCC unroll 4
          for (int i = 0; i < C; ++i) add_dots(lo[r * C + i], x[i], p2);
        }
      }
    }
  }
  ahead = next;
  constexpr int parts = parts_of(F, FOLD);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m512 step = lane_of_row(w.w_step, R, r), zero = lane_of_row(w.w_zero, R, r);
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) {
      const __m512i sum = FAST ? hi[r * C + i] : _mm512_add_epi32(_mm512_slli_epi32(hi[r * C + i], 8), lo[r * C + i]);
      float* acc = rows.acc + (size_t)r * w.sums + 16 * (4 * parts * block + PASS * C + i);
      _mm512_store_ps(acc, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), step, _mm512_add_ps(_mm512_load_ps(acc), zero)));
    }
  }
}

template <int F, bool FOLD, int R, bool FAST, int C, int PASS>
inline void passes(Rows& rows, const Phase& phase, const Work& w, int block, __mmask64 there, Ahead& ahead, int lines) {
  if constexpr (PASS * C < 4 * parts_of(F, FOLD)) {
    add_pass<F, FOLD, R, FAST, C, PASS>(rows, phase, w, block, there, ahead, lines);
    passes<F, FOLD, R, FAST, C, PASS + 1>(rows, phase, w, block, there, ahead, lines);
  }
}

template <int F, bool FOLD, int R, bool FAST>
void add(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  constexpr int C = R == 4 && !FAST ? 2 : 4;
  for (int b = 0; b < w.v_blocks; ++b) passes<F, FOLD, R, FAST, C, 0>(rows, phase, w, b, b + 1 < w.v_blocks ? ~0ull : w.v_last, ahead, lines);
}

template <int F, bool FOLD, bool FAST>
const ValuePhase* of_size(int size) {
  static constexpr ValuePhase all[kSizes] = {{nullptr, soften<F, 1, FAST>, add<F, FOLD, 1, FAST>},
                                             {nullptr, soften<F, 2, FAST>, add<F, FOLD, 2, FAST>},
                                             {nullptr, soften<F, 4, FAST>, add<F, FOLD, 4, FAST>}};
  return &all[size];
}

template <int F, bool FOLD>
const ValuePhase* of_precision(bool fast, int size) {
  return fast ? of_size<F, FOLD, true>(size) : of_size<F, FOLD, false>(size);
}

}  // namespace

const ValuePhase* int_value_phase(int format, bool fold, bool fast, int size) {
  switch (format) {
    case kInt8: return of_precision<kInt8, false>(fast, size);
    case kInt4: return fold ? of_precision<kInt4, true>(fast, size) : of_precision<kInt4, false>(fast, size);
    default: return fold ? of_precision<kInt2, true>(fast, size) : of_precision<kInt2, false>(fast, size);
  }
}

}  // namespace pikv::phases
