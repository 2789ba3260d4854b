// Scores of a phase for integer keys by VNNI, four tokens and up to four rows of the query at a time: 4 x 4 dot products of bytes fill 16
// registers, which one transposing sum turns into one register of 16 scores. A key is loaded and unpacked once for all rows.
#include "phase_codes.h"

namespace pikv::phases {
namespace {

// Words of registers [0, 2 n) -> those of even places, those of odd places: n registers each.
inline void split_words(const __m512i* from, int n, __m512i* even, __m512i* odd) {
  const __m512i fours = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
  const __m512i at = _mm512_or_si512(fours, _mm512_slli_epi32(fours, 16));
  const __m512i evens = _mm512_add_epi32(at, _mm512_set1_epi32(0x00020000)), odds = _mm512_add_epi32(at, _mm512_set1_epi32(0x00030001));
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) {
    even[i] = _mm512_permutex2var_epi16(from[2 * i], evens, from[2 * i + 1]);
    odd[i] = _mm512_permutex2var_epi16(from[2 * i], odds, from[2 * i + 1]);
  }
}

// The halves of D columns in the order in which codes are unpacked, that of query_of(): [block][part][64].
template <int F, bool FOLD>
inline void in_code_order(const uint16_t* from, int D, int width, uint16_t* to) {
  constexpr int parts = parts_of(F, FOLD), registers = (FOLD ? 4 : 2) * parts / (FOLD ? 2 : 1);  // of 32 halves: those of a register of codes
  for (int d = 0; d < width; d += 32 * registers) {
    __m512i x[8], y[8];
#pragma GCC unroll 8
    for (int i = 0; i < registers; ++i) x[i] = d + 32 * i < D ? _mm512_loadu_si512(from + d + 32 * i) : _mm512_setzero_si512();
    split_words(x, registers / 2, y, y + registers / 2);
    if constexpr (F == kInt2 && FOLD) {  // columns 4 i, then 4 i + 2; 4 i + 1, then 4 i + 3
      split_words(y, 1, x, x + 1), split_words(y + 2, 1, x + 2, x + 3);
    } else if constexpr (F == kInt2) {  // parts 0 to 3: columns 4 i, 4 i + 1, ...
      split_words(y, 2, x, x + 4), split_words(y + 4, 2, x + 2, x + 6);
    }
#pragma GCC unroll 8
    for (int i = 0; i < registers; ++i) _mm512_store_si512(to + d + 32 * i, F == kInt2 ? x[i] : y[i]);
  }
}

// Dwords of four registers that were packed by lanes.
inline __m512i in_column_order(__m512i x) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}

// (q * scale) of a group of tokens as hi + lo / 256 int8 (FAST: one int8), and the share of the zeros. What that leaves out of q meets a
// code: its middle value goes into the bias, so that only the distance of the code from it is lost. Scales and zeros are put in order and
// widened once for all rows.
template <int F, bool FOLD, int R, bool FAST>
void start_group(const Rows& rows, const Phase& phase, Work& w) {
  const int width = w.q_width;
  const uint16_t *scale = reinterpret_cast<const uint16_t*>(phase.k_scale), *zero = reinterpret_cast<const uint16_t*>(phase.k_zero);
  if constexpr (F != kInt8) {
    if (w.ordered_of != phase.k_scale) {
      in_code_order<F, FOLD>(scale, w.k_dim, width, w.ordered), in_code_order<F, FOLD>(zero, w.k_dim, width, w.ordered + width);
      w.ordered_of = phase.k_scale;
    }
    scale = w.ordered, zero = w.ordered + width;
  }
  __m512 bias[R], top[R], lost[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) bias[r] = top[r] = lost[r] = _mm512_setzero_ps();
#pragma GCC unroll 2
  for (int d = 0; d < width; d += 16) {
    const __m512 s = halves(scale + d), z = halves(zero + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512 x = _mm512_load_ps(rows.q + (size_t)r * width + d), y = _mm512_mul_ps(x, s);
      bias[r] = _mm512_fmadd_ps(x, z, bias[r]), top[r] = _mm512_max_ps(top[r], _mm512_abs_ps(y));
      _mm512_store_ps(w.product + (size_t)r * width + d, y);
    }
  }
  // Whole numbers of up to 127 * 256 are split into their two bytes, the low one with a sign.
  const __m512 most = _mm512_set1_ps(FAST ? 127.0f : 127.0f * 256.0f);
  const __m512 largest = _mm512_max_ps(lane_tops<R>(top), _mm512_set1_ps(1e-30f)), step = _mm512_div_ps(largest, most);
  alignas(64) float inverse[16];
  _mm512_store_ps(inverse, _mm512_div_ps(most, largest));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m512 factor = lane_of_row(inverse, R, r);
    const float* product = w.product + (size_t)r * width;
    int8_t *hi = w.q_hi + (size_t)r * width, *lo = w.q_lo + (size_t)r * width;
    __m512 lost2 = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int d = 0; d < width; d += 64) {
      __m512i whole[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512 y = _mm512_mul_ps(_mm512_load_ps(product + d + 16 * j), factor);
        whole[j] = _mm512_cvtps_epi32(y);
        __m512& sum = j % 2 ? lost2 : lost[r];
        sum = _mm512_add_ps(sum, _mm512_sub_ps(y, _mm512_cvtepi32_ps(whole[j])));
      }
      const __m512i a = _mm512_packs_epi32(whole[0], whole[1]), b = _mm512_packs_epi32(whole[2], whole[3]);
      if constexpr (FAST) {
        _mm512_store_si512(hi + d, in_column_order(_mm512_packs_epi16(a, b)));
      } else {
        const __m512i half = _mm512_set1_epi16(128), low = _mm512_set1_epi16(255);
        const __m512i upper = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_adds_epi16(a, half), 8), _mm512_srai_epi16(_mm512_adds_epi16(b, half), 8));
        _mm512_store_si512(hi + d, in_column_order(upper));
        _mm512_store_si512(lo + d, in_column_order(_mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low))));
      }
    }
    lost[r] = _mm512_add_ps(lost[r], lost2);
  }
  const __m512 middle = _mm512_mul_ps(step, _mm512_set1_ps(0.5f * format_levels(F)));
  _mm512_store_ps(w.q_step, step), _mm512_store_ps(w.q_bias, _mm512_fmadd_ps(lane_sums<R>(lost), middle, lane_sums<R>(bias)));
}

// Adds the products of four tokens with R rows: x[r * T + t]. BLOCKS registers of a key, or as many as w says.
template <int F, bool FOLD, int R, int BLOCKS>
inline void products(const uint8_t* k, int64_t stride, const int8_t* q, const Work& w, __m512i* x) {
  constexpr int T = tokens_of(R), parts = parts_of(F, FOLD);
  const int blocks = BLOCKS ? BLOCKS : FOLD ? 1 : w.k_blocks;
#pragma GCC unroll 2
  for (int b = 0; b < blocks; ++b) {
    const __mmask64 there = b + 1 < blocks ? ~0ull : w.k_last;
#pragma GCC unroll 4
    for (int t0 = 0; t0 < T; t0 += 4) {
      __m512i codes[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) codes[t] = load_codes<FOLD>(k + (t0 + t) * stride + 64 * b, there);
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) {
        __m512i c[4];
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) c[t] = part_of<F>(codes[t], p);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m512i y = _mm512_load_si512(q + (size_t)r * w.q_width + 64 * (b * parts + p));
#pragma GCC unroll 4
          for (int t = 0; t < 4; ++t) add_dots(x[r * T + t0 + t], c[t], y);
        }
      }
    }
  }
}

template <int F, bool FOLD, int R, bool FAST, int BLOCKS>
void scores(const Rows&, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  constexpr int T = tokens_of(R);
  const uint8_t* k = phase.k;
  const int64_t stride = phase.k_stride;
  const __m512 step = _mm512_load_ps(w.q_step), bias = _mm512_load_ps(w.q_bias);
  const int8_t *hi = w.q_hi, *lo = w.q_lo;
  float* s = w.s;
  Ahead next = ahead;
#pragma GCC unroll 1
  for (int t = 0; t < phase.count; t += T, k += T * stride, s += 16) {
    __m512i x[16];
    read_ahead(next, lines);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = _mm512_setzero_si512();
    products<F, FOLD, R, BLOCKS>(k, stride, hi, w, x);
    if constexpr (!FAST) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) x[i] = _mm512_slli_epi32(x[i], 8);
      products<F, FOLD, R, BLOCKS>(k, stride, lo, w, x);
    }
    _mm512_store_ps(s, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums16(x)), step, bias));
  }
  ahead = next;
}

template <int F, bool FOLD, bool FAST, int BLOCKS>
const KeyPhase* of_size(int size) {
  static constexpr KeyPhase all[kSizes] = {{nullptr, nullptr, start_group<F, FOLD, 1, FAST>, scores<F, FOLD, 1, FAST, BLOCKS>},
                                           {nullptr, nullptr, start_group<F, FOLD, 2, FAST>, scores<F, FOLD, 2, FAST, BLOCKS>},
                                           {nullptr, nullptr, start_group<F, FOLD, 4, FAST>, scores<F, FOLD, 4, FAST, BLOCKS>}};
  return &all[size];
}

// BLOCKS: registers of a row known at compile time, for heads of 128 and of 64.
template <int F, bool FOLD, int BLOCKS>
const KeyPhase* of_blocks(bool fast, int size, int blocks) {
  if (BLOCKS && blocks == BLOCKS) return fast ? of_size<F, FOLD, true, BLOCKS>(size) : of_size<F, FOLD, false, BLOCKS>(size);
  return fast ? of_size<F, FOLD, true, 0>(size) : of_size<F, FOLD, false, 0>(size);
}

}  // namespace

const KeyPhase* int_key_phase(int format, bool fold, bool fast, int size, int blocks) {
  switch (format) {
    case kInt8: return of_blocks<kInt8, false, 2>(fast, size, blocks);
    case kInt4: return fold ? of_blocks<kInt4, true, 0>(fast, size, blocks) : of_blocks<kInt4, false, 1>(fast, size, blocks);
    default: return fold ? of_blocks<kInt2, true, 0>(fast, size, blocks) : of_blocks<kInt2, false, 0>(fast, size, blocks);
  }
}

}  // namespace pikv::phases
