// One tile of 16 tokens against up to 8 rows: what the hand-written AVX512 kernels do most of their time.
//
// F is the format of the pages: kInt8 and kInt4 with VNNI, the others widened to f32 in registers, once for all rows. bf16 dot products
// would round the query and are no faster (2 cycles each on Emerald Rapids, where two FMAs take one). DC is a width known at compile time,
// or 0.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attend.h"
#include "avx512.h"
#include "numbers.h"

namespace pikv {
namespace {

constexpr int kTile = 16, kMaxRows = 8;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kFp8Factor = 256.0f;  // fp8_to_half leaves it out
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;
constexpr int kAhead[] = {2, 2, 2, 4, 6, 4};  // tiles, by format

inline int pad64(int d) { return (d + 63) / 64 * 64; }

// Rows [first, first + count) share one query token.
struct Chunk {
  int first, count, t;
};

struct Work {
  float *q, *acc, *m, *q_scale, *q_bias;  // q: scaled to base 2; for bf16 pages even and odd columns apart
  float *l, *page_l, *zeros;              // 16 sums per row, one per lane; zeros: what the zeros of integer values add to every column
  float* product;                         // [Dk]
  uint8_t* k_bytes;                       // [kTile, Dk]
  int8_t *q_hi, *q_lo;
  int Dk, Dv;  // padded to 64
};

struct Tile {
  const uint8_t *k, *v;            // rows, k_stride and v_stride apart
  const uint8_t *next_k, *next_v;  // what to prefetch
  const uint16_t *k_scale, *v_scale, *v_zero;
  int64_t k_stride, v_stride;
  int count;
};

inline __mmask16 mask16(int left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }
inline __mmask32 mask32(int left) { return left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1; }

constexpr bool integers(int F) { return F == kInt8 || F == kInt4; }
// Formats that unpack two columns at a time: 32 columns are kept as 16 even ones, then 16 odd ones.
constexpr bool in_pairs(int F) { return F == kBf16 || F == kInt4; }
inline int column_of(int d) { return d / 32 * 32 + d % 2 * 16 + d % 32 / 2; }

// (q * scale) of a group of tokens as hi + lo / 256 int8, and the share of the zeros. What hi and lo leave out of q meets a code: its middle
// value goes into the bias, so that only the distance of the code from it is lost.
template <int F, int DC>
void start_group(const Attend& a, const uint8_t* head, int group, int M, Work& w) {
  // Sizes and pointers of its own: the compiler takes every store of bytes for one that may change `w`.
  const int D = DC ? DC : a.f.k_dim, Dk = pad64(D);
  float* product = w.product;
  const uint16_t* scale = reinterpret_cast<const uint16_t*>(head + a.f.k_scale) + (int64_t)group * D;
  const uint16_t* zero = reinterpret_cast<const uint16_t*>(head + a.f.k_zero) + (int64_t)group * D;
  for (int row = 0; row < M; ++row) {
    const float* q = w.q + (size_t)row * Dk;
    __m512 bias = _mm512_setzero_ps(), top = bias;
    for (int d = 0; d < Dk; d += 16) {
      const __mmask16 m = mask16(D - d);
      const __m512 x = _mm512_load_ps(q + d), y = _mm512_mul_ps(x, halves(m, scale + d));
      bias = _mm512_fmadd_ps(x, halves(m, zero + d), bias);
      top = _mm512_max_ps(top, _mm512_abs_ps(y));
      _mm512_store_ps(product + d, y);
    }
    const float largest = std::max(_mm512_reduce_max_ps(top), 1e-30f);
    w.q_scale[row] = largest / (127.0f * 256.0f);
    const __m512 inverse = _mm512_set1_ps(127.0f / largest), k256 = _mm512_set1_ps(256.0f);
    __m512 lost = _mm512_setzero_ps();
    int8_t *hi = w.q_hi + (size_t)row * Dk, *lo = w.q_lo + (size_t)row * Dk;
    for (int d = 0; d < Dk; d += 16) {
      const __m512 y = _mm512_mul_ps(_mm512_load_ps(product + d), inverse), r = _mm512_roundscale_ps(y, 8);
      const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(y, r), k256);
      const __m512i low = _mm512_min_epi32(_mm512_cvtps_epi32(rest), _mm512_set1_epi32(127));
      lost = _mm512_add_ps(lost, _mm512_sub_ps(rest, _mm512_cvtepi32_ps(low)));
      _mm_store_si128((__m128i*)(hi + d), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(r)));
      _mm_store_si128((__m128i*)(lo + d), _mm512_cvtepi32_epi8(low));
    }
    w.q_bias[row] = _mm512_reduce_add_ps(bias) + _mm512_reduce_add_ps(lost) * w.q_scale[row] * (F == kInt4 ? 7.5f : 127.5f);
    if (F == kInt4)
      for (int d = 0; d < Dk; d += 64) {
        _mm512_store_si512(hi + d, split_columns(_mm512_load_si512(hi + d)));
        _mm512_store_si512(lo + d, split_columns(_mm512_load_si512(lo + d)));
      }
  }
}

// Columns [d, d + 16 * W) of one row as f32, even and odd apart for the formats in pairs; without scales, and fp8 without kFp8Factor.
// `left` columns are there.
template <int F, int W, bool FULL>
inline void load_columns(const uint8_t* row, int d, int left, __m512* v) {
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
  inline void lines(int count) {
    for (int i = 0; i < count; ++i, at += 64)
      if (at < end) prefetch(at);
  }
};

// Scores of 16 tokens of bytes against one row.
template <int F, int DC>
inline __m512 integer_scores(const Work& w, int row, const Tile& tile, int D) {
  const int8_t *hi = w.q_hi + (size_t)row * w.Dk, *lo = w.q_lo + (size_t)row * w.Dk;
  __m512i a[kTile];
#pragma GCC unroll 16
  for (int t = 0; t < kTile; ++t) {
    const uint8_t* r = tile.k + t * tile.k_stride;
    __m512i x = _mm512_setzero_si512();
    if constexpr (DC != 0 && DC % 64 == 0) {
      __m512i c[DC / 64];
#pragma GCC unroll 2
      for (int d = 0; d < DC; d += 64) x = _mm512_dpbusd_epi32(x, c[d / 64] = _mm512_loadu_si512(r + d), _mm512_load_si512(hi + d));
      x = _mm512_slli_epi32(x, 8);
#pragma GCC unroll 2
      for (int d = 0; d < DC; d += 64) x = _mm512_dpbusd_epi32(x, c[d / 64], _mm512_load_si512(lo + d));
    } else {
      __m512i y = x;
      for (int d = 0; d < D; d += 64) {
        const __mmask64 m = F == kInt4 || D - d >= 64 ? ~0ull : (1ull << (D - d)) - 1;  // int4 is padded
        const __m512i c = _mm512_maskz_loadu_epi8(m, r + d);
        x = _mm512_dpbusd_epi32(x, c, _mm512_load_si512(hi + d));
        y = _mm512_dpbusd_epi32(y, c, _mm512_load_si512(lo + d));
      }
      x = _mm512_add_epi32(_mm512_slli_epi32(x, 8), y);
    }
    a[t] = x;
  }
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums16(a)), _mm512_set1_ps(w.q_scale[row]), _mm512_set1_ps(w.q_bias[row]));
}

// Products of 16 tokens with G rows, 16 partial sums each: `sums` is [G][kTile][16]. Tokens in blocks, so that their sums stay in registers.
template <int F, int G, int DC>
inline void float_products(const Work& w, int row, const Tile& tile, int D, float* sums, Prefetch& next) {
  constexpr int T = G == 8 ? 2 : G == 4 ? 4 : 8;
  const int width = DC ? DC : D;
  const float* q = w.q + (size_t)row * w.Dk;
#pragma GCC unroll 1
  for (int t0 = 0; t0 < kTile; t0 += T) {
    __m512 c[T * G];
#pragma GCC unroll 32
    for (int i = 0; i < T * G; ++i) c[i] = _mm512_setzero_ps();
    next.lines(T * (int)tile.k_stride / 64 + 1);
    const uint8_t* k[T];
    for (int i = 0; i < T; ++i) k[i] = tile.k + std::min(t0 + i, tile.count - 1) * tile.k_stride;  // beyond the page: masked later
#pragma GCC unroll 4
    for (int d = 0; d < width; d += 32)
#pragma GCC unroll 8
      for (int i = 0; i < T; ++i) {
        __m512 x[2];
        load_columns<F, 2, DC != 0>(k[i], d, width - d, x);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
          c[i * G + g] = _mm512_fmadd_ps(x[0], _mm512_load_ps(q + (size_t)g * w.Dk + d), c[i * G + g]);
          c[i * G + g] = _mm512_fmadd_ps(x[1], _mm512_load_ps(q + (size_t)g * w.Dk + d + 16), c[i * G + g]);
        }
      }
#pragma GCC unroll 32
    for (int i = 0; i < T * G; ++i) _mm512_store_ps(sums + (i % G * kTile + t0 + i / G) * 16, c[i]);
  }
}

// Adds 16 * W columns of up to 16 value rows to the sums of G rows, which stay in registers.
template <int F, int G, int W, bool FULL, bool MASKED>
inline void add_values(float* acc, int64_t acc_stride, const uint8_t* v, int64_t v_stride, int d, int left, const float* p, int count,
                       __mmask16 visible, Prefetch& next, int lines) {
  __m512 c[G * W];
#pragma GCC unroll 32
  for (int i = 0; i < G * W; ++i) c[i] = _mm512_load_ps(acc + i / W * acc_stride + i % W * 16);
#pragma GCC unroll 1
  for (int t = 0; t < (MASKED ? count : kTile); ++t, v += v_stride) {
    next.lines(lines);
    if (MASKED && !(visible >> t & 1)) continue;  // what is hidden is not read: it may hold anything
    __m512 x[W];
    load_columns<F, W, FULL>(v, d, left, x);
#pragma GCC unroll 32
    for (int i = 0; i < G * W; ++i) c[i] = _mm512_fmadd_ps(_mm512_set1_ps(p[i / W * kTile + t]), x[i % W], c[i]);
  }
#pragma GCC unroll 32
  for (int i = 0; i < G * W; ++i) _mm512_store_ps(acc + i / W * acc_stride + i % W * 16, c[i]);
}

inline void add_to(float* sums, int row, __m512 x) { _mm512_store_ps(sums + row * 16, _mm512_add_ps(_mm512_load_ps(sums + row * 16), x)); }

// A new largest score: what has been summed shrinks. Rare, so the tiles in between need no sum or maximum across lanes.
[[gnu::noinline]] inline void raise_top(Work& w, int row, float top) {
  const __m512 shrink = exp2_negative(_mm512_set1_ps(w.m[row] - top));
  for (float* sums : {w.l, w.page_l, w.zeros}) _mm512_store_ps(sums + row * 16, _mm512_mul_ps(_mm512_load_ps(sums + row * 16), shrink));
  float* acc = w.acc + (size_t)row * w.Dv;
  for (int d = 0; d < w.Dv; d += 16) _mm512_store_ps(acc + d, _mm512_mul_ps(_mm512_load_ps(acc + d), shrink));
  w.m[row] = top;
}

// One tile, G rows from `row`. visible: the tokens that these rows see.
template <int F, int G, int DC>
void add_tile(const Attend& a, Work& w, const Tile& tile, int row, __mmask16 visible, bool last_chunk) {
  constexpr int W = G == 8 || DC == 32 ? 2 : 4;  // G * W sums in registers
  constexpr bool scaled = integers(F) || F == kFp8;
  const int Dv = DC ? DC : a.f.v_dim, passes = (Dv + 16 * W - 1) / (16 * W);
  const int k_bytes = kTile * a.f.k_row_bytes, v_bytes = kTile * a.f.v_row_bytes;
  Prefetch next_k = {tile.next_k, tile.next_k + (last_chunk ? k_bytes : 0)};
  Prefetch next_v = {tile.next_v, tile.next_v + (last_chunk ? v_bytes : 0)};
  const int k_lines = k_bytes / 64 / G + 1, v_lines = (v_bytes / 64 + passes * kTile - 1) / (passes * kTile);
  alignas(64) float p[G * kTile];
  __m512 v_scale = _mm512_set1_ps(1.0f), v_zero = _mm512_setzero_ps(), k_scale = v_scale;
  if constexpr (scaled) v_scale = halves(visible, tile.v_scale);
  if constexpr (F == kFp8) {
    k_scale = _mm512_mul_ps(halves(visible, tile.k_scale), _mm512_set1_ps(kFp8Factor));
    v_scale = _mm512_mul_ps(v_scale, _mm512_set1_ps(kFp8Factor));
  }
  if constexpr (integers(F)) v_zero = halves(visible, tile.v_zero);
  alignas(64) float sums[integers(F) ? 1 : G * kTile * 16];
  if constexpr (!integers(F)) float_products<F, G, DC>(w, row, tile, a.f.k_dim, sums, next_k);
#pragma GCC unroll 1
  for (int g = 0; g < G; ++g) {
    __m512 s;
    if constexpr (integers(F)) {
      s = integer_scores<F, DC>(w, row + g, tile, a.f.k_dim);
      next_k.lines(k_lines);
    } else {
      s = sums16(reinterpret_cast<const __m512*>(sums + g * kTile * 16));
    }
    if constexpr (F == kFp8) s = _mm512_mul_ps(s, k_scale);
    s = _mm512_mask_mov_ps(_mm512_set1_ps(-kInf), visible, s);
    if (_mm512_cmp_ps_mask(s, _mm512_set1_ps(w.m[row + g]), _CMP_GT_OQ)) raise_top(w, row + g, _mm512_reduce_max_ps(s));
    const __m512 e = _mm512_maskz_mov_ps(visible, exp2_negative(_mm512_sub_ps(s, _mm512_set1_ps(w.m[row + g]))));
    add_to(w.l, row + g, e);
    if (a.page_lse) add_to(w.page_l, row + g, e);
    if constexpr (integers(F)) add_to(w.zeros, row + g, _mm512_mul_ps(e, v_zero));
    _mm512_store_ps(p + g * kTile, scaled ? _mm512_mul_ps(e, v_scale) : e);
  }
  for (int pass = 0; pass < passes; ++pass) {
    const int d = pass * 16 * W;
    float* acc = w.acc + (size_t)row * w.Dv + d;
    if (visible == 0xffff)
      add_values<F, G, W, DC != 0, false>(acc, w.Dv, tile.v, tile.v_stride, d, Dv - d, p, kTile, visible, next_v, v_lines);
    else
      add_values<F, G, W, DC != 0, true>(acc, w.Dv, tile.v, tile.v_stride, d, Dv - d, p, tile.count, visible, next_v, v_lines);
  }
}

template <int F, int DC>
void add_rows(const Attend& a, Work& w, const Tile& tile, const Chunk& chunk, __mmask16 visible, bool last) {
  switch (chunk.count) {
    case 8: return add_tile<F, 8, DC>(a, w, tile, chunk.first, visible, last);
    case 4: return add_tile<F, 4, DC>(a, w, tile, chunk.first, visible, last);
    case 2: return add_tile<F, 2, DC>(a, w, tile, chunk.first, visible, last);
    default: return add_tile<F, 1, DC>(a, w, tile, chunk.first, visible, last);
  }
}

// Points the tile at 16 rows; int4 codes become bytes, and bytes beyond the page, which may lie beyond the store, become zeros.
template <int F, int DC>
void point_at(const PageFormat& f, const uint8_t* k, const uint8_t* v, Tile& tile, Work& w) {
  tile.k = k, tile.v = v, tile.k_stride = f.k_row_bytes, tile.v_stride = f.latent ? f.k_row_bytes : f.v_row_bytes;
  if (!integers(F) || (F == kInt8 && tile.count == kTile)) return;
  const int D = DC ? DC : f.k_dim, Dk = pad64(D), count = tile.count;
  uint8_t* const bytes = w.k_bytes;
  if constexpr (F == kInt8) {
    for (int t = 0; t < count; ++t) std::memcpy(bytes + t * Dk, k + t * D, D);
  } else {
    for (int t = 0; t < count; ++t)
      for (int d = 0; d < D; d += 64)
        _mm512_store_si512(bytes + t * Dk + d, split_nibbles(_mm256_maskz_loadu_epi8(mask32((D - d) / 2), k + (t * D + d) / 2)));
  }
  std::memset(bytes + count * Dk, 0, (kTile - count) * Dk);
  tile.k = bytes, tile.k_stride = Dk;
}

}  // namespace
}  // namespace pikv
