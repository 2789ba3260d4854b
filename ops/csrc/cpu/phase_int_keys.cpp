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

// The bytes of a row of the query in the order in which codes are unpacked: [block][part][64].
template <int F>
inline void in_code_order(int8_t* q, int width) {
  if constexpr (F == kInt4) {
    for (int d = 0; d < width; d += 128) even_odd(q + d, q + d, q + d + 64);
  } else if constexpr (F == kInt2) {
    for (int d = 0; d < width; d += 256) {  // parts 0 to 3: columns 4 i, 4 i + 1, ...
      alignas(64) int8_t even[128], odd[128];
      even_odd(q + d, even, odd), even_odd(q + d + 128, even + 64, odd + 64);
      even_odd(even, q + d, q + d + 128), even_odd(odd, q + d + 64, q + d + 192);
    }
  }
}

inline __mmask16 mask_of(int left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }

// (q * scale) of a group of tokens as hi + lo / 256 int8 (FAST: one int8), and the share of the zeros. What that leaves out of q meets a
// code: its middle value goes into the bias, so that only the distance of the code from it is lost.
template <int F, int R, bool FAST>
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
    const __m512 inverse = _mm512_set1_ps(127.0f / largest), k256 = _mm512_set1_ps(256.0f);
    steps[r] = largest / (FAST ? 127.0f : 127.0f * 256.0f);
    __m512 lost = _mm512_setzero_ps();
    int8_t *hi = w.q_hi + (size_t)r * width, *lo = w.q_lo + (size_t)r * width;
    for (int d = 0; d < width; d += 16) {
      const __m512 y = _mm512_mul_ps(_mm512_load_ps(product + d), inverse), whole = _mm512_roundscale_ps(y, 8);
      _mm_store_si128((__m128i*)(hi + d), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(whole)));
      const __m512 rest = FAST ? _mm512_sub_ps(y, whole) : _mm512_mul_ps(_mm512_sub_ps(y, whole), k256);
      if constexpr (FAST) {
        lost = _mm512_add_ps(lost, rest);
      } else {
        const __m512i low = _mm512_min_epi32(_mm512_cvtps_epi32(rest), _mm512_set1_epi32(127));
        lost = _mm512_add_ps(lost, _mm512_sub_ps(rest, _mm512_cvtepi32_ps(low)));
        _mm_store_si128((__m128i*)(lo + d), _mm512_cvtepi32_epi8(low));
      }
    }
    biases[r] = _mm512_reduce_add_ps(_mm512_add_ps(bias, bias2)) + _mm512_reduce_add_ps(lost) * steps[r] * (0.5f * levels);
    in_code_order<F>(hi, width);
    if (!FAST) in_code_order<F>(lo, width);
  }
  _mm512_store_ps(w.q_step, by_row<R>(steps)), _mm512_store_ps(w.q_bias, by_row<R>(biases));
}

// Adds the products of four tokens with R rows: x[r * T + t]. BLOCKS registers of a key, or as many as w says.
template <int F, int R, int BLOCKS>
inline void products(const uint8_t* k, int64_t stride, const int8_t* q, const Work& w, __m512i* x) {
  constexpr int T = tokens_of(R), parts = 8 / format_bits(F);
  const int blocks = BLOCKS ? BLOCKS : w.k_blocks;
#pragma GCC unroll 2
  for (int b = 0; b < blocks; ++b) {
    const __mmask64 there = b + 1 < blocks ? ~0ull : w.k_last;
#pragma GCC unroll 4
    for (int t0 = 0; t0 < T; t0 += 4) {
      __m512i codes[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) codes[t] = _mm512_maskz_loadu_epi8(there, k + (t0 + t) * stride + 64 * b);
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) {
        __m512i c[4];
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) c[t] = part_of<F>(codes[t], p);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m512i y = _mm512_load_si512(q + (size_t)r * w.q_width + 64 * (b * parts + p));
#pragma GCC unroll 4
          for (int t = 0; t < 4; ++t) x[r * T + t0 + t] = _mm512_dpbusd_epi32(x[r * T + t0 + t], c[t], y);
        }
      }
    }
  }
}

template <int F, int R, bool FAST, int BLOCKS>
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
    products<F, R, BLOCKS>(k, stride, hi, w, x);
    if constexpr (!FAST) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) x[i] = _mm512_slli_epi32(x[i], 8);
      products<F, R, BLOCKS>(k, stride, lo, w, x);
    }
    _mm512_store_ps(s, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums16(x)), step, bias));
  }
  ahead = next;
}

template <int F, bool FAST, int BLOCKS>
const KeyPhase* of_size(int size) {
  static constexpr KeyPhase all[kSizes] = {
      {start_group<F, 1, FAST>, scores<F, 1, FAST, BLOCKS>}, {start_group<F, 2, FAST>, scores<F, 2, FAST, BLOCKS>},
      {start_group<F, 4, FAST>, scores<F, 4, FAST, BLOCKS>}};
  return &all[size];
}

template <int F>
const KeyPhase* of_format(bool fast, int size, int blocks) {
  if (fast) return blocks == 1 ? of_size<F, true, 1>(size) : blocks == 2 ? of_size<F, true, 2>(size) : of_size<F, true, 0>(size);
  return blocks == 1 ? of_size<F, false, 1>(size) : blocks == 2 ? of_size<F, false, 2>(size) : of_size<F, false, 0>(size);
}

}  // namespace

const KeyPhase* int_key_phase(int format, bool fast, int size, int blocks) {
  switch (format) {
    case kInt8: return of_format<kInt8>(fast, size, blocks);
    case kInt4: return of_format<kInt4>(fast, size, blocks);
    default: return of_format<kInt2>(fast, size, blocks);
  }
}

}  // namespace pikv::phases
