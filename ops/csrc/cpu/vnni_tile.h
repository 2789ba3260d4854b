// One tile of 16 tokens against up to 8 rows: what the hand-written AVX512 kernels do most of their time.
//
// F is what the arithmetic reads: kBf16 and kFp8 (unpacked to bf16) with bf16 dot products, kInt8 and kInt4 with VNNI, and kFp32, to which
// every format can be unpacked: for fp32 and fp16 pages, and for queries that bf16 would round. DC is a width known at compile time, or 0.
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
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;
constexpr int kAhead[] = {2, 2, 2, 4, 6, 4};  // tiles, by format

inline int pad64(int d) { return (d + 63) / 64 * 64; }

// Rows [first, first + count) share one query token.
struct Chunk {
  int first, count, t;
};

struct Work {
  float *q, *acc, *m, *q_scale, *q_bias;  // q: scaled to base 2
  float *l, *page_l, *zeros;              // 16 sums per row, one per lane; zeros: what the zeros of int8 and int4 values add to every column
  uint16_t *qb, *k_tile, *v_tile;
  uint8_t* k_bytes;
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

constexpr bool in_pairs(int F) { return F == kBf16 || F == kInt4 || F == kFp8; }

// (q * scale) of a group of tokens as hi + lo / 256 int8, and the share of the zeros. What hi and lo leave out meets codes of 0 to `levels`:
// their middle goes into the bias, so that only the distance of a code from it is lost.
template <int F>
void start_group(const Attend& a, const uint8_t* head, int group, int M, Work& w) {
  const int D = a.f.k_dim;
  const uint16_t* scale = reinterpret_cast<const uint16_t*>(head + a.f.k_scale) + (int64_t)group * D;
  const uint16_t* zero = reinterpret_cast<const uint16_t*>(head + a.f.k_zero) + (int64_t)group * D;
  float* product = reinterpret_cast<float*>(w.k_tile);  // 16 * Dk halves = room for Dk floats
  for (int row = 0; row < M; ++row) {
    const float* q = w.q + (size_t)row * w.Dk;
    __m512 bias = _mm512_setzero_ps(), top = bias;
    for (int d = 0; d < w.Dk; d += 16) {
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
    int8_t *hi = w.q_hi + (size_t)row * w.Dk, *lo = w.q_lo + (size_t)row * w.Dk;
    for (int d = 0; d < w.Dk; d += 16) {
      const __m512 y = _mm512_mul_ps(_mm512_load_ps(product + d), inverse), r = _mm512_roundscale_ps(y, 8);
      const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(y, r), k256);
      const __m512i low = _mm512_min_epi32(_mm512_cvtps_epi32(rest), _mm512_set1_epi32(127));
      lost = _mm512_add_ps(lost, _mm512_sub_ps(rest, _mm512_cvtepi32_ps(low)));
      _mm_store_si128((__m128i*)(hi + d), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(r)));
      _mm_store_si128((__m128i*)(lo + d), _mm512_cvtepi32_epi8(low));
    }
    w.q_bias[row] = _mm512_reduce_add_ps(bias) + _mm512_reduce_add_ps(lost) * w.q_scale[row] * (F == kInt4 ? 7.5f : 127.5f);
    if (F == kInt4)
      for (int d = 0; d < w.Dk; d += 64) {
        _mm512_store_si512(hi + d, split_columns(_mm512_load_si512(hi + d)));
        _mm512_store_si512(lo + d, split_columns(_mm512_load_si512(lo + d)));
      }
  }
}

// Scores of 16 tokens against one row. `k`: rows of bf16 or bytes, already unpacked, D padded to 64.
template <int F, int DC>
inline __m512 scores(const Work& w, int row, const uint8_t* k, int64_t stride, int D) {
  const int Dk = DC ? DC : D;
  if constexpr (F == kInt8 || F == kInt4) {
    const int8_t *hi = w.q_hi + (size_t)row * w.Dk, *lo = w.q_lo + (size_t)row * w.Dk;
    __m512i a[kTile];
#pragma GCC unroll 16
    for (int t = 0; t < kTile; ++t) {
      const uint8_t* r = k + t * stride;
      __m512i x = _mm512_setzero_si512(), y = x;
      if constexpr (DC != 0) {
#pragma GCC unroll 2
        for (int d = 0; d < DC; d += 64) {
          const __m512i c = _mm512_loadu_si512(r + d);
          x = _mm512_dpbusd_epi32(x, c, _mm512_load_si512(hi + d));
          y = _mm512_dpbusd_epi32(y, c, _mm512_load_si512(lo + d));
        }
      } else {
        for (int d = 0; d < Dk; d += 64) {
          const int left = Dk - d;
          const __mmask64 m = F == kInt4 || left >= 64 ? ~0ull : (1ull << left) - 1;  // an unpacked int4 row is padded
          const __m512i c = _mm512_maskz_loadu_epi8(m, r + d);
          x = _mm512_dpbusd_epi32(x, c, _mm512_load_si512(hi + d));
          y = _mm512_dpbusd_epi32(y, c, _mm512_load_si512(lo + d));
        }
      }
      a[t] = _mm512_add_epi32(_mm512_slli_epi32(x, 8), y);
    }
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums16(a)), _mm512_set1_ps(w.q_scale[row]), _mm512_set1_ps(w.q_bias[row]));
  } else if constexpr (F == kFp32) {
    const float* q = w.q + (size_t)row * w.Dk;
    __m512 a[kTile];
#pragma GCC unroll 16
    for (int t = 0; t < kTile; ++t) {
      const float* r = reinterpret_cast<const float*>(k + t * stride);
      __m512 x = _mm512_setzero_ps();
      if constexpr (DC != 0) {
#pragma GCC unroll 8
        for (int d = 0; d < DC; d += 16) x = _mm512_fmadd_ps(_mm512_load_ps(q + d), _mm512_loadu_ps(r + d), x);
      } else {
        for (int d = 0; d < Dk; d += 16) x = _mm512_fmadd_ps(_mm512_load_ps(q + d), _mm512_maskz_loadu_ps(mask16(Dk - d), r + d), x);
      }
      a[t] = x;
    }
    return sums16(a);
  } else {
    const uint16_t* q = w.qb + (size_t)row * w.Dk;
    __m512 a[kTile];
#pragma GCC unroll 16
    for (int t = 0; t < kTile; ++t) {
      const uint16_t* r = reinterpret_cast<const uint16_t*>(k + t * stride);
      __m512 x = _mm512_setzero_ps();
      if constexpr (DC != 0) {
#pragma GCC unroll 4
        for (int d = 0; d < DC; d += 32) x = _mm512_dpbf16_ps(x, (__m512bh)_mm512_load_si512(q + d), (__m512bh)_mm512_loadu_si512(r + d));
      } else {
        for (int d = 0; d < Dk; d += 32) {
          const int left = Dk - d;
          const __mmask32 m = left >= 32 ? ~0u : (1u << left) - 1;
          x = _mm512_dpbf16_ps(x, (__m512bh)_mm512_load_si512(q + d), (__m512bh)_mm512_maskz_loadu_epi16(m, r + d));
        }
      }
      a[t] = x;
    }
    return sums16(a);
  }
}

// Columns [d, d + 16 * W) of one value row as f32, even and odd apart for the formats in pairs. `left` columns are there.
template <int F, int W, bool FULL>
inline void load_values(const uint8_t* row, int d, int left, __m512* v) {
  if constexpr (F == kFp32) {
    const float* x = reinterpret_cast<const float*>(row) + d;
    for (int j = 0; j < W; ++j) v[j] = FULL ? _mm512_loadu_ps(x + 16 * j) : _mm512_maskz_loadu_ps(mask16(left - 16 * j), x + 16 * j);
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
      const int rest = left - 16 * j;
      const __m512i x = FULL ? _mm512_loadu_si512(h + d + 16 * j)
                             : _mm512_maskz_loadu_epi16(rest >= 32 ? ~0u : rest <= 0 ? 0 : (1u << rest) - 1, h + d + 16 * j);
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
    load_values<F, W, FULL>(v, d, left, x);
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
  constexpr bool scaled = F != kBf16 && F != kFp32;
  const int Dv = DC ? DC : a.f.v_dim, passes = (Dv + 16 * W - 1) / (16 * W);
  const int k_bytes = kTile * a.f.k_row_bytes, v_bytes = kTile * a.f.v_row_bytes;
  Prefetch next_k = {tile.next_k, tile.next_k + (last_chunk ? k_bytes : 0)};
  Prefetch next_v = {tile.next_v, tile.next_v + (last_chunk ? v_bytes : 0)};
  const int k_lines = (k_bytes / 64 + G - 1) / G, v_lines = (v_bytes / 64 + passes * kTile - 1) / (passes * kTile);
  alignas(64) float p[G * kTile];
  __m512 v_scale = _mm512_set1_ps(1.0f), v_zero = _mm512_setzero_ps(), k_scale = v_scale;
  if constexpr (F == kFp8) k_scale = halves(visible, tile.k_scale);
  if constexpr (scaled) v_scale = halves(visible, tile.v_scale);
  if constexpr (F == kInt8 || F == kInt4) v_zero = halves(visible, tile.v_zero);
#pragma GCC unroll 1
  for (int g = 0; g < G; ++g) {
    __m512 s = scores<F, DC>(w, row + g, tile.k, tile.k_stride, a.f.k_dim);
    next_k.lines(k_lines);
    if constexpr (F == kFp8) s = _mm512_mul_ps(s, k_scale);
    if constexpr (F == kBf16 || F == kFp8) s = _mm512_mul_ps(s, _mm512_set1_ps(a.scale * kLog2e));
    s = _mm512_mask_mov_ps(_mm512_set1_ps(-kInf), visible, s);
    if (_mm512_cmp_ps_mask(s, _mm512_set1_ps(w.m[row + g]), _CMP_GT_OQ)) raise_top(w, row + g, _mm512_reduce_max_ps(s));
    const __m512 e = _mm512_maskz_mov_ps(visible, exp2_negative(_mm512_sub_ps(s, _mm512_set1_ps(w.m[row + g]))));
    add_to(w.l, row + g, e);
    if (a.page_lse) add_to(w.page_l, row + g, e);
    if constexpr (F == kInt8 || F == kInt4) add_to(w.zeros, row + g, _mm512_mul_ps(e, v_zero));
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

// 16 numbers of a bf16, fp16 or fp8 row as f32; fp8 without its scale.
inline __m512 to_floats(int format, __mmask16 m, const uint8_t* row, int d) {
  if (format == kFp16) return halves(m, reinterpret_cast<const uint16_t*>(row) + d);
  if (format == kBf16)
    return even_bf16(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, reinterpret_cast<const uint16_t*>(row) + d)));
  return even_bf16(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(fp8_to_bf16(_mm256_castsi128_si256(_mm_maskz_loadu_epi8(m, row + d))))));
}

inline void rows_to_floats(int format, const uint8_t* rows, int64_t stride, int count, int D, const uint16_t* scales, float* to, int to_stride) {
  for (int t = 0; t < count; ++t) {
    const __m512 scale = scales ? _mm512_set1_ps(half_to_float(scales[t])) : _mm512_set1_ps(1.0f);
    for (int d = 0; d < D; d += 16)
      _mm512_store_ps(to + (size_t)t * to_stride + d, _mm512_mul_ps(to_floats(format, mask16(D - d), rows + t * stride, d), scale));
  }
}

// Brings 16 rows into the form the dot products read: int4 to bytes, fp8 to bf16, any to f32, and fewer than 16 rows to 16.
template <int F>
void unpack(const PageFormat& f, const uint8_t* k, const uint8_t* v, Tile& tile, Work& w) {
  tile.k = k, tile.v = v, tile.k_stride = f.k_row_bytes, tile.v_stride = f.latent ? f.k_row_bytes : f.v_row_bytes;
  if (F == kFp32 && f.format != kFp32) {
    float *keys = reinterpret_cast<float*>(w.k_tile), *values = reinterpret_cast<float*>(w.v_tile);
    rows_to_floats(f.format, k, f.k_row_bytes, tile.count, f.k_dim, tile.k_scale, keys, w.Dk);
    if (!f.latent) rows_to_floats(f.format, v, f.v_row_bytes, tile.count, f.v_dim, tile.v_scale, values, w.Dv);
    tile.k = reinterpret_cast<const uint8_t*>(keys), tile.k_stride = 4 * w.Dk;
    tile.v = f.latent ? tile.k : reinterpret_cast<const uint8_t*>(values), tile.v_stride = f.latent ? tile.k_stride : 4 * w.Dv;
  } else if constexpr (F == kInt4) {
    for (int t = 0; t < tile.count; ++t)
      for (int d = 0; d < f.k_dim; d += 64) {
        const int left = (f.k_dim - d) / 2;
        const __m256i c = _mm256_maskz_loadu_epi8(left >= 32 ? ~0u : (1u << left) - 1, k + t * (int64_t)f.k_row_bytes + d / 2);
        _mm512_store_si512(w.k_bytes + (size_t)t * w.Dk + d, split_nibbles(c));
      }
    tile.k = w.k_bytes, tile.k_stride = w.Dk;
  } else if constexpr (F == kFp8) {
    const auto widen = [&](const uint8_t* from, int D, int stride, uint16_t* to, int to_stride) {
      for (int t = 0; t < tile.count; ++t)
        for (int d = 0; d < D; d += 32) {
          const __m256i c = _mm256_maskz_loadu_epi8(D - d >= 32 ? ~0u : (1u << (D - d)) - 1, from + t * (int64_t)stride + d);
          _mm512_store_si512(to + (size_t)t * to_stride + d, fp8_to_bf16(c));
        }
    };
    widen(k, f.k_dim, f.k_row_bytes, w.k_tile, w.Dk);
    tile.k = reinterpret_cast<const uint8_t*>(w.k_tile), tile.k_stride = 2 * w.Dk;
    if (!f.latent) widen(v, f.v_dim, f.v_row_bytes, w.v_tile, w.Dv);
    tile.v = f.latent ? tile.k : reinterpret_cast<const uint8_t*>(w.v_tile);
    tile.v_stride = f.latent ? tile.k_stride : 2 * w.Dv;
  } else if (tile.count < kTile) {  // rows beyond the page may lie beyond the store
    tile.k = w.k_bytes, tile.k_stride = 4 * w.Dk;
    for (int t = 0; t < tile.count; ++t) std::memcpy(w.k_bytes + t * tile.k_stride, k + t * (int64_t)f.k_row_bytes, f.k_row_bytes);
  }
  // tile.k is memory of this thread here. Its other rows are computed and masked: what is left there must not be slow (denormal numbers).
  if (tile.count < kTile) std::memset(const_cast<uint8_t*>(tile.k) + tile.count * tile.k_stride, 0, (kTile - tile.count) * tile.k_stride);
}

}  // namespace
}  // namespace pikv
