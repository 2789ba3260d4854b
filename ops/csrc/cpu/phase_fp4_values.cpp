// Softmax and weighted sums of a phase for fp4 values as integers, with AVX512 BF16 and VBMI beside: the scales of blocks are in the
// weights, of which each block has its own, as 16 bits. Four rows of the query.
#include "phase_fp4.h"

namespace pikv::phases {
namespace {

constexpr int kWeightBytes = 2 * 16 * 64;  // for a register of values: [half][four tokens][row][16]
constexpr int kMost = 65535;               // of a weight

// The scales of values as floats, [eight tokens][register][block][8 tokens], and the largest of each token.
void widen_scales(const Phase& phase, Work& w) {
  const int blocks = fp4_blocks(w.v_dim);
  const __m512i rows_at = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(blocks));
  const __m512i row = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);  // byte 8 b + t of what is asked for is byte 8 t + b
  __m512i by_block = _mm512_setzero_si512();
  for (int t = 7; t >= 0; --t) by_block = _mm512_or_si512(_mm512_slli_epi64(by_block, 8), _mm512_add_epi64(row, _mm512_set1_epi64(8 * t)));
  float* to = w.v_scales;
  for (int t = 0; t < phase.count; t += 8) {
    __m512 top = _mm512_setzero_ps();
    for (int b = 0; b < w.v_blocks; ++b, to += 64) {
      const uint8_t* at = phase.v_scale + (int64_t)t * blocks + kBlocks * b;
      const int left = blocks - kBlocks * b;
      __m512i x = blocks == kBlocks ? _mm512_loadu_si512(at) : _mm512_i64gather_epi64(rows_at, at, 1);
      if (left < kBlocks) x = _mm512_and_si512(x, _mm512_set1_epi64((1ll << 8 * left) - 1));
      x = _mm512_and_si512(_mm512_permutexvar_epi8(by_block, x), _mm512_set1_epi8(0x7f));
      const __m128i part[4] = {_mm512_castsi512_si128(x), _mm512_extracti32x4_epi32(x, 1), _mm512_extracti32x4_epi32(x, 2),
                               _mm512_extracti32x4_epi32(x, 3)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512 scale = scale_values(_mm512_slli_epi32(_mm512_cvtepu8_epi32(part[i]), 20));
        _mm512_store_ps(to + 16 * i, scale);
        top = _mm512_max_ps(top, scale);
      }
    }
    _mm256_store_ps(w.v_tops + t, _mm256_max_ps(_mm512_castps512_ps256(top), _mm512_extractf32x8_ps(top, 1)));
  }
}

// Weights with the scales of a half of the blocks -> their low and high bytes, [row][lane][token].
inline void put_weights(__m512 e, const float* scales, uint8_t* lo, uint8_t* hi) {
  __m512i x[4];
#pragma GCC unroll 4
  for (int lane = 0; lane < 4; ++lane) {
    const __m512 scale = _mm512_broadcast_f32x4(_mm_load_ps(scales + 16 * lane));
    x[lane] = _mm512_cvtps_epi32(_mm512_mul_ps(e, scale));
  }
  const __m512i a = _mm512_packus_epi32(x[0], x[1]), b = _mm512_packus_epi32(x[2], x[3]), low = _mm512_set1_epi16(255);
  _mm512_store_si512(lo, _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low)));
  _mm512_store_si512(hi, _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
}

template <bool MASKED>
void soften_rows(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  Ahead next = ahead;
  widen_scales(phase, w);
  const __m512 m = find_top<4, MASKED>(rows, phase, w);
  __m512 l = _mm512_setzero_ps(), big = l;
#pragma GCC unroll 4
  for (int i = 0; i < phase.count / 4; ++i) {
    read_ahead(next, lines);
    __m512 e = weight<4, MASKED>(phase, w, i, m);
    l = _mm512_add_ps(l, e);
    e = _mm512_mul_ps(e, token_powers<MASKED>(phase.v_zero, phase.visible, i));
    big = _mm512_max_ps(big, _mm512_mul_ps(e, _mm512_broadcast_f32x4(_mm_load_ps(w.v_tops + 4 * i))));
    _mm512_store_ps(w.s + 16 * i, e);
  }
  _mm512_store_ps(rows.l, _mm512_add_ps(_mm512_load_ps(rows.l), l));
  if (phase.page_lse) _mm512_store_ps(rows.page_l, _mm512_add_ps(_mm512_load_ps(rows.page_l), l));
  big = _mm512_max_ps(group_max<4>(big), _mm512_set1_ps(1e-30f));
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(kMost), big);
  _mm512_store_ps(w.w_step, _mm512_mul_ps(big, _mm512_set1_ps(0.5f / kMost)));
#pragma GCC unroll 1
  for (int i = 0; i < phase.count / 4; ++i) {
    const __m512 e = _mm512_mul_ps(_mm512_load_ps(w.s + 16 * i), inverse);
    for (int b = 0; b < w.v_blocks; ++b) {
      const float* scales = w.v_scales + (size_t)(i / 2 * w.v_blocks + b) * 64 + i % 2 * 4;
      const int at = b * kWeightBytes + 64 * i;
      put_weights(e, scales, w.w_lo + at, w.w_hi + at);
      put_weights(e, scales + 8, w.w_lo + at + kWeightBytes / 2, w.w_hi + at + kWeightBytes / 2);
    }
  }
  ahead = next;
}

void soften(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  if (phase.all) soften_rows<false>(rows, phase, w, ahead, lines);
  else soften_rows<true>(rows, phase, w, ahead, lines);
}

// 32 sums of each row: those of one dword of each lane, both halves of its bytes.
template <int PASS>
inline void add_pass(Rows& rows, const Phase& phase, const Work& w, int block, __mmask64 there, Ahead& ahead, int lines) {
  const __m512i table = halves_by_code(0), lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  __m512i hi[8], lo[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) hi[i] = lo[i] = _mm512_setzero_si512();
  const int64_t at = block * kWeightBytes + PASS / 2 * (kWeightBytes / 2);
  const uint8_t *v = phase.v + 64 * block, *w_hi = w.w_hi + at, *w_lo = w.w_lo + at;
  Ahead next = ahead;
#pragma GCC unroll 1
  for (int t = 0; t < phase.count; t += 4, v += 4 * phase.v_stride, w_hi += 64, w_lo += 64) {
    read_ahead(next, lines);
    __m512i x[2];
    quads<kInt4, false, 2, false>(v, phase.v_stride, there, PASS, x);
    for (int j = 0; j < 2; ++j) x[j] = _mm512_shuffle_epi8(table, x[j]);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m512i y = _mm512_permutexvar_epi32(lanes, _mm512_loadu_si512(w_hi + 16 * r));
      const __m512i z = _mm512_permutexvar_epi32(lanes, _mm512_loadu_si512(w_lo + 16 * r));
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) add_dots(hi[2 * r + j], y, x[j]), add_dots(lo[2 * r + j], z, x[j]);
    }
  }
  ahead = next;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(hi[i], 8), lo[i]));
    float* acc = rows.acc + (size_t)(i / 2) * w.sums + 16 * (8 * block + 2 * PASS + i % 2);
    _mm512_store_ps(acc, _mm512_fmadd_ps(sum, lane_of_row(w.w_step, 4, i / 2), _mm512_load_ps(acc)));
  }
}

void add(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  for (int b = 0; b < w.v_blocks; ++b) {
    const __mmask64 there = b + 1 < w.v_blocks ? ~0ull : w.v_last;
    add_pass<0>(rows, phase, w, b, there, ahead, lines), add_pass<1>(rows, phase, w, b, there, ahead, lines);
    add_pass<2>(rows, phase, w, b, there, ahead, lines), add_pass<3>(rows, phase, w, b, there, ahead, lines);
  }
}

}  // namespace

ValuePhase fp4_value_phase() { return {nullptr, soften, add}; }
int64_t fp4_weight_bytes(int v_blocks) { return (int64_t)v_blocks * kWeightBytes + 64; }

}  // namespace pikv::phases
