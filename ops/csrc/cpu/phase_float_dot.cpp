// A phase of bf16, fp8 or fp4 keys or values with AVX512 BF16: 4 rows of the query, scores of 4 tokens at a time, values by pairs of tokens.
#include <cstring>

#include "phase_floats.h"

namespace pikv::phases {
namespace {

template <int F>
void scores(const Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  const Fp8Tables tables;
  const uint8_t *k = phase.k, *scales = phase.k_scale;
  const __m512 scale = _mm512_set1_ps(w.scale);
  const int blocks = w.q_width / kFp4Block;
  Ahead next = ahead;
#pragma GCC unroll 1
  for (int i = 0; i < phase.count / 4; ++i, k += 4 * phase.k_stride, scales += 4 * blocks) {
    __m512 x[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) x[j] = _mm512_setzero_ps();
    read_ahead(next, lines);
    const uint16_t* q = rows.q_bf16;
    for (int part = 0; part < w.q_parts; ++part)
      for (int u = 0; u < w.q_width / 64; ++u) {
        __m512i key[4][2];
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t)
          key_columns<F>(tables, k + t * phase.k_stride + u * unit_bytes(F), F == kFp4 ? scales + t * blocks + 4 * u : nullptr, key[t]);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j, q += 4 * 32)
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) {
            const __m512i y = _mm512_load_si512(q + 32 * r);
#pragma GCC unroll 4
            for (int t = 0; t < 4; ++t) add_pairs(x[r * 4 + t], key[t][j], y);
          }
      }
    __m512 s = _mm512_mul_ps(sums16(x), scale);
    if constexpr (F != kBf16) s = _mm512_mul_ps(s, row_factor<F, false>(phase.k_scale, phase.k_zero, 0, i));
    _mm512_store_ps(w.s + 16 * i, s);
  }
  ahead = next;
}

template <int F>
void add(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  const Fp8Tables tables;
  const int blocks = w.v_dim / kFp4Block;
  Ahead next = ahead;
  for (int d = 0; d < w.sums; d += 64) {  // 16 sums in registers: 64 columns of 4 rows
    const uint8_t *v = phase.v + d / 64 * unit_bytes(F), *scales = F == kFp4 ? phase.v_scale + d / kFp4Block : nullptr;
    float* acc = rows.acc + d;
    __m512 c[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) c[i] = _mm512_load_ps(acc + (size_t)(i / 4) * w.sums + 16 * (i % 4));
#pragma GCC unroll 1
    for (int p = 0; p < phase.count / 2; ++p, v += 2 * phase.v_stride) {
      __m512i x[4];
      if (p % 2 == 0) read_ahead(next, lines);
      value_columns<F>(tables, v, phase.v_stride, F == kFp4 ? scales + 2 * p * blocks : nullptr, blocks, x);
      const uint8_t *hi = w.w_hi + 32 * (p / 2) + 4 * (p % 2), *lo = w.w_lo + 32 * (p / 2) + 4 * (p % 2);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const __m512i y = four_bytes((const int8_t*)hi + 8 * r), z = four_bytes((const int8_t*)lo + 8 * r);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) add_pairs(c[4 * r + j], x[j], y);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) add_pairs(c[4 * r + j], x[j], z);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_ps(acc + (size_t)(i / 4) * w.sums + 16 * (i % 4), c[i]);
  }
  ahead = next;
}

template <int F, bool MASKED>
void soften_rows(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  Ahead next = ahead;
  const __m512 m = find_top<4, MASKED>(rows, phase, w);
  __m512 l = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < phase.count / 4; ++i) {
    read_ahead(next, lines);
    __m512 e = weight<4, MASKED>(phase, w, i, m);
    l = _mm512_add_ps(l, e);
    if constexpr (F != kBf16) e = _mm512_mul_ps(e, row_factor<F, MASKED>(phase.v_scale, phase.v_zero, phase.visible, i));
    const __m256i hi = (__m256i)_mm512_cvtneps_pbh(e);
    const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(hi), 16));
    _mm256_store_si256((__m256i*)(w.w_hi + 32 * i), hi);
    _mm256_store_si256((__m256i*)(w.w_lo + 32 * i), (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(e, back)));
  }
  _mm512_store_ps(rows.l, _mm512_add_ps(_mm512_load_ps(rows.l), l));
  if (phase.page_lse) _mm512_store_ps(rows.page_l, _mm512_add_ps(_mm512_load_ps(rows.page_l), l));
  ahead = next;
}

template <int F>
void soften(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  if (phase.all) soften_rows<F, false>(rows, phase, w, ahead, lines);
  else soften_rows<F, true>(rows, phase, w, ahead, lines);
}

template <int F>
constexpr KeyPhase kKeys = {nullptr, nullptr, nullptr, scores<F>};
template <int F>
constexpr ValuePhase kValues = {nullptr, soften<F>, add<F>};

}  // namespace

const KeyPhase* float_key_phase(int format) { return format == kFp8 ? &kKeys<kFp8> : format == kFp4 ? &kKeys<kFp4> : &kKeys<kBf16>; }
const ValuePhase* float_value_phase(int format) {
  return format == kFp8 ? &kValues<kFp8> : format == kFp4 ? &kValues<kFp4> : &kValues<kBf16>;
}

}  // namespace pikv::phases
