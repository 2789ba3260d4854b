// Scores of a phase for integer keys by VNNI, four tokens and up to four rows of the query at a time: 4 x 4 dot products of bytes fill 16
// registers, which one transposing sum turns into one register of 16 scores. A key is loaded and unpacked once for all rows.
#include <algorithm>

#include "phase_codes.h"

namespace pikv::phases {
namespace {

// 128 bytes in column order -> those of even columns, those of odd columns.
inline void even_odd(const int8_t* from, int8_t* even, int8_t* odd) {
  const __m512i a = _mm512_load_si512(from), b = _mm512_load_si512(from + 64);
  const auto both = [](__m256i x, __m256i y) { return _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1); };
  const __m512i e = both(_mm512_cvtepi16_epi8(a), _mm512_cvtepi16_epi8(b));
  const __m512i o = both(_mm512_cvtepi16_epi8(_mm512_srli_epi16(a, 8)), _mm512_cvtepi16_epi8(_mm512_srli_epi16(b, 8)));
  _mm512_store_si512(even, e), _mm512_store_si512(odd, o);
}

// 64 bytes -> 32 of even, 32 of odd places.
inline void split(const int8_t* from, int8_t* to) { _mm512_store_si512(to, split_columns(_mm512_load_si512(from))); }

// The bytes of a row of the query in the order in which codes are unpacked: [block][part][64].
template <int F, bool FOLD>
inline void in_code_order(int8_t* q, int width) {
  alignas(64) int8_t even[128], odd[128];
  if constexpr (F == kInt4 && FOLD) {
    split(q, q);
  } else if constexpr (F == kInt4) {
    for (int d = 0; d < width; d += 128) even_odd(q + d, q + d, q + d + 64);
  } else if constexpr (F == kInt2 && FOLD) {  // columns 4 i, then 4 i + 2; 4 i + 1, then 4 i + 3
    even_odd(q, even, odd), split(even, q), split(odd, q + 64);
  } else if constexpr (F == kInt2) {
    for (int d = 0; d < width; d += 256) {  // parts 0 to 3: columns 4 i, 4 i + 1, ...
      even_odd(q + d, even, odd), even_odd(q + d + 128, even + 64, odd + 64);
      even_odd(even, q + d, q + d + 128), even_odd(odd, q + d + 64, q + d + 192);
    }
  }
}

// Dwords of four registers that were packed by lanes.
inline __m512i in_column_order(__m512i x) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}

inline __mmask16 mask_of(int left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }

// (q * scale) of a group of tokens as hi + lo / 256 int8 (FAST: one int8), and the share of the zeros. What that leaves out of q meets a
// code: its middle value goes into the bias, so that only the distance of the code from it is lost.
template <int F, bool FOLD, int R, bool FAST>
void start_group(const Rows& rows, const Phase& phase, Work& w) {
  const int width = w.q_width, D = w.k_dim;
  const uint16_t *scale = reinterpret_cast<const uint16_t*>(phase.k_scale), *zero = reinterpret_cast<const uint16_t*>(phase.k_zero);
  float* product = w.product;
  alignas(64) float steps[R], biases[R];
  constexpr float levels = format_levels(F);
  for (int r = 0; r < R; ++r) {
    const float* q = rows.q + (size_t)r * width;
    __m512 bias = _mm512_setzero_ps(), bias2 = bias, top = bias, top2 = bias;
    for (int d = 0; d < width; d += 32) {
      const __mmask16 m = mask_of(D - d), m2 = mask_of(D - d - 16);
      const __m512 x = _mm512_load_ps(q + d), x2 = _mm512_load_ps(q + d + 16);
      const __m512 y = _mm512_mul_ps(x, halves(m, scale + d)), y2 = _mm512_mul_ps(x2, halves(m2, scale + d + 16));
      bias = _mm512_fmadd_ps(x, halves(m, zero + d), bias), bias2 = _mm512_fmadd_ps(x2, halves(m2, zero + d + 16), bias2);
      top = _mm512_max_ps(top, _mm512_abs_ps(y)), top2 = _mm512_max_ps(top2, _mm512_abs_ps(y2));
      _mm512_store_ps(product + d, y), _mm512_store_ps(product + d + 16, y2);
    }
    const float largest = std::max(_mm512_reduce_max_ps(_mm512_max_ps(top, top2)), 1e-30f);
    // Whole numbers of up to 127 * 256 are split into their two bytes, the low one with a sign.
    steps[r] = largest / (FAST ? 127.0f : 127.0f * 256.0f);
    const __m512 inverse = _mm512_set1_ps((FAST ? 127.0f : 127.0f * 256.0f) / largest);
    __m512 lost = _mm512_setzero_ps(), lost2 = lost;
    int8_t *hi = w.q_hi + (size_t)r * width, *lo = w.q_lo + (size_t)r * width;
    for (int d = 0; d < width; d += 64) {
      __m512i whole[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512 y = _mm512_mul_ps(_mm512_load_ps(product + d + 16 * j), inverse);
        whole[j] = _mm512_cvtps_epi32(y);
        __m512& sum = j % 2 ? lost2 : lost;
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
    lost = _mm512_add_ps(lost, lost2);
    biases[r] = _mm512_reduce_add_ps(_mm512_add_ps(bias, bias2)) + _mm512_reduce_add_ps(lost) * steps[r] * (0.5f * levels);
    in_code_order<F, FOLD>(hi, width);
    if (!FAST) in_code_order<F, FOLD>(lo, width);
  }
  _mm512_store_ps(w.q_step, by_row<R>(steps)), _mm512_store_ps(w.q_bias, by_row<R>(biases));
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
  static constexpr KeyPhase all[kSizes] = {{nullptr, start_group<F, FOLD, 1, FAST>, scores<F, FOLD, 1, FAST, BLOCKS>},
                                           {nullptr, start_group<F, FOLD, 2, FAST>, scores<F, FOLD, 2, FAST, BLOCKS>},
                                           {nullptr, start_group<F, FOLD, 4, FAST>, scores<F, FOLD, 4, FAST, BLOCKS>}};
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
