// Scores of a tile of 16 tokens against up to 8 rows of the query, for the formats in PK_FORMATS.
#include "vnni_tile.h"

namespace pikv::vnni {
namespace {

// (q * scale) of a group of tokens as hi + lo / 256 int8, and the share of the zeros. What hi and lo leave out of q meets a code: its middle
// value goes into the bias, so that only the distance of the code from it is lost.
template <int F, int DC>
void start_group(const Attend& a, const uint8_t* head, int group, int M, Work& w) {
  // Sizes and pointers of its own: the compiler takes every store of bytes for one that may change `w`.
  const int D = DC ? DC : a.f.k_coded, Dk = pad64(D);
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
    w.q_bias[row] = _mm512_reduce_add_ps(bias) + _mm512_reduce_add_ps(lost) * w.q_scale[row] * (0.5f * format_levels(F));
    if (F == kInt4)
      for (int d = 0; d < Dk; d += 64) {
        _mm512_store_si512(hi + d, split_columns(_mm512_load_si512(hi + d)));
        _mm512_store_si512(lo + d, split_columns(_mm512_load_si512(lo + d)));
      }
  }
}

// Scores of 16 tokens of bytes against one row.
template <int F, int DC>
inline __m512 integer_scores(const Work& w, int row, const Tile& tile, int D) {
  const int8_t *hi = w.q_hi + (size_t)row * w.Dk, *lo = w.q_lo + (size_t)row * w.Dk;
  constexpr bool by_64 = DC != 0 && DC % 64 == 0;
  __m512i a[kTile], b[by_64 ? 1 : kTile];
#pragma GCC unroll 16
  for (int t = 0; t < kTile; ++t) {
    const uint8_t* r = tile.k + t * tile.k_stride;
    __m512i x = _mm512_setzero_si512();
    if constexpr (by_64) {
      __m512i c[DC / 64];
#pragma GCC unroll 2
      for (int d = 0; d < DC; d += 64) x = _mm512_dpbusd_epi32(x, c[d / 64] = _mm512_loadu_si512(r + d), _mm512_load_si512(hi + d));
      x = _mm512_slli_epi32(x, 8);
#pragma GCC unroll 2
      for (int d = 0; d < DC; d += 64) x = _mm512_dpbusd_epi32(x, c[d / 64], _mm512_load_si512(lo + d));
    } else {
      __m512i y = x;
      for (int d = 0; d < D; d += 64) {
        const __mmask64 m = F != kInt8 || D - d >= 64 ? ~0ull : (1ull << (D - d)) - 1;  // what has been unpacked is padded
        const __m512i c = _mm512_maskz_loadu_epi8(m, r + d);
        x = _mm512_dpbusd_epi32(x, c, _mm512_load_si512(hi + d));
        y = _mm512_dpbusd_epi32(y, c, _mm512_load_si512(lo + d));
      }
      b[t] = y;
    }
    a[t] = x;
  }
  if constexpr (!by_64) {
    if (D > 256) {  // a sum of 255 x 127 still fits, 256 times that does not
      const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums16(a)), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(sums16(b)));
      return _mm512_fmadd_ps(sum, _mm512_set1_ps(w.q_scale[row]), _mm512_set1_ps(w.q_bias[row]));
    }
    for (int t = 0; t < kTile; ++t) a[t] = _mm512_add_epi32(_mm512_slli_epi32(a[t], 8), b[t]);
  }
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums16(a)), _mm512_set1_ps(w.q_scale[row]), _mm512_set1_ps(w.q_bias[row]));
}

// Products of 16 tokens with G rows of q, 16 partial sums each: `sums` is [G][kTile][16]. Tokens in blocks, so that their sums stay in
// registers.
template <int F, int G, int DC>
inline void float_products(const float* q, int q_stride, const uint8_t* rows, int64_t stride, const Tile& tile, int D, float* sums,
                           Prefetch& next) {
  constexpr int T = G == 8 ? 2 : G == 4 ? 4 : 8;
  const int width = DC ? DC : D;
#pragma GCC unroll 1
  for (int t0 = 0; t0 < kTile; t0 += T) {
    __m512 c[T * G];
#pragma GCC unroll 32
    for (int i = 0; i < T * G; ++i) c[i] = _mm512_setzero_ps();
    next.lines(T * (int)stride / 64 + 1);
    const uint8_t *k[T], *scale[T];
    for (int i = 0; i < T; ++i) {
      const int t = std::min(t0 + i, tile.count - 1);  // beyond the page: masked later
      k[i] = rows + t * stride, scale[i] = F == kFp4 ? tile.k_scale + t * tile.k_blocks : nullptr;
    }
#pragma GCC unroll 4
    for (int d = 0; d < width; d += 32)
#pragma GCC unroll 8
      for (int i = 0; i < T; ++i) {
        __m512 x[2];
        load_columns<F, 2, DC != 0>(k[i], scale[i], d, width - d, x);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
          c[i * G + g] = _mm512_fmadd_ps(x[0], _mm512_load_ps(q + (size_t)g * q_stride + d), c[i * G + g]);
          c[i * G + g] = _mm512_fmadd_ps(x[1], _mm512_load_ps(q + (size_t)g * q_stride + d + 16), c[i * G + g]);
        }
      }
#pragma GCC unroll 32
    for (int i = 0; i < T * G; ++i) _mm512_store_ps(sums + (i % G * kTile + t0 + i / G) * 16, c[i]);
  }
}

// A new largest score: what has been summed shrinks. Rare, so the tiles in between need no sum or maximum across lanes.
[[gnu::noinline]] inline void raise_top(Work& w, int row, float top) {
  const __m512 shrink = exp2_negative(_mm512_set1_ps(w.m[row] - top));
  for (float* sums : {w.l, w.page_l, w.zeros}) _mm512_store_ps(sums + row * 16, _mm512_mul_ps(_mm512_load_ps(sums + row * 16), shrink));
  float* acc = w.acc + (size_t)row * w.Dv;
  for (int d = 0; d < w.Dv; d += 16) _mm512_store_ps(acc + d, _mm512_mul_ps(_mm512_load_ps(acc + d), shrink));
  if (float* codes = w.codes ? w.codes + (size_t)row * w.Dv : nullptr)
    for (int d = 0; d < w.Dv; d += 16) _mm512_store_ps(codes + d, _mm512_mul_ps(_mm512_load_ps(codes + d), shrink));
  w.m[row] = top;
}

template <int F, int G, int DC>
void score_rows(const Attend& a, Work& w, const Tile& tile, int row, __mmask16 visible, bool last_chunk, float* p) {
  const int k_bytes = std::min(kTile, a.block) * a.f.k_row_bytes, k_lines = k_bytes / 64 / G + 1;
  Prefetch next = {tile.next_k, tile.next_k + (last_chunk ? k_bytes : 0), a.first_level};
  __m512 k_scale = _mm512_set1_ps(1.0f);
  if constexpr (F == kFp8) k_scale = _mm512_mul_ps(token_halves(visible, tile.k_scale), _mm512_set1_ps(kFp8Factor));
  if constexpr (F == kFp4) k_scale = powers_of_two(visible, tile.k_zero);
  alignas(64) float sums[integers(F) ? 1 : G * kTile * 16];
  if constexpr (!integers(F))
    float_products<F, G, DC>(w.q + (size_t)row * w.Dk, w.Dk, tile.k, tile.k_stride, tile, a.f.k_coded, sums, next);
  alignas(64) float rope_sums[G * kTile * 16];
  if (w.Dr) {
    Prefetch next_rope = {tile.next_rope, tile.next_rope + (last_chunk ? kTile * tile.rope_stride : 0), a.first_level};
    const int width = a.f.k_dim - a.f.k_coded;
    float_products<kFp16, G, 0>(w.q_rope + (size_t)row * w.Dr, w.Dr, tile.rope, tile.rope_stride, tile, width, rope_sums, next_rope);
  }
#pragma GCC unroll 1
  for (int g = 0; g < G; ++g) {
    __m512 s;
    if constexpr (integers(F)) {
      s = integer_scores<F, DC>(w, row + g, tile, a.f.k_coded);
      next.lines(k_lines);
    } else {
      s = sums16(reinterpret_cast<const __m512*>(sums + g * kTile * 16));
    }
    if constexpr (F == kFp8 || F == kFp4) s = _mm512_mul_ps(s, k_scale);
    if (w.Dr) s = _mm512_add_ps(s, sums16(reinterpret_cast<const __m512*>(rope_sums + g * kTile * 16)));
    s = _mm512_mask_mov_ps(_mm512_set1_ps(-kInf), visible, s);
    if (_mm512_cmp_ps_mask(s, _mm512_set1_ps(w.m[row + g]), _CMP_GT_OQ)) raise_top(w, row + g, _mm512_reduce_max_ps(s));
    const __m512 e = _mm512_maskz_mov_ps(visible, exp2_negative(_mm512_sub_ps(s, _mm512_set1_ps(w.m[row + g]))));
    add_to(w.l, row + g, e);
    if (a.page_lse) add_to(w.page_l, row + g, e);
    _mm512_store_ps(p + g * kTile, e);
  }
}

template <int F, int DC>
void scores(const Attend& a, Work& w, const Tile& tile, const Chunk& chunk, uint16_t visible, bool last, float* p) {
  switch (chunk.count) {
    case 8: return score_rows<F, 8, DC>(a, w, tile, chunk.first, visible, last, p);
    case 4: return score_rows<F, 4, DC>(a, w, tile, chunk.first, visible, last, p);
    case 2: return score_rows<F, 2, DC>(a, w, tile, chunk.first, visible, last, p);
    default: return score_rows<F, 1, DC>(a, w, tile, chunk.first, visible, last, p);
  }
}

// Integer codes become bytes, and bytes beyond the page, which may lie beyond the store, become zeros.
template <int F, int DC>
void point_at(const PageFormat& f, const uint8_t* k, Tile& tile, Work& w) {
  tile.k = k, tile.k_stride = f.k_row_bytes;
  if (!integers(F) || (F == kInt8 && tile.count == kTile)) return;
  const int D = DC ? DC : f.k_coded, Dk = pad64(D), count = tile.count;
  uint8_t* const bytes = w.k_bytes;
  for (int t = 0; t < count; ++t) {
    const uint8_t* row = k + (int64_t)t * f.k_row_bytes;
    if constexpr (F == kInt8) {
      std::memcpy(bytes + t * Dk, row, D);
    } else {
      for (int d = 0; d < D; d += 64) {
        __m512i x;
        if constexpr (F == kInt4) x = split_nibbles(_mm256_maskz_loadu_epi8(mask32((D - d) / 2), row + d / 2));
        else x = split_crumbs(_mm_maskz_loadu_epi8(mask16((D - d) / 4), row + d / 4));
        _mm512_store_si512(bytes + t * Dk + d, x);
      }
    }
  }
  std::memset(bytes + count * Dk, 0, (kTile - count) * Dk);
  tile.k = bytes, tile.k_stride = Dk;
}

template <int F, int DC>
constexpr KeyKernel kernel() {
  if constexpr (integers(F)) return {start_group<F, DC>, point_at<F, DC>, scores<F, DC>};
  else return {nullptr, point_at<F, DC>, scores<F, DC>};
}

}  // namespace

#define X(F)                                                                                                                             \
  template <>                                                                                                                            \
  KeyKernel key_kernel<F>(int k_coded) {                                                                                                 \
    return k_coded == 128 ? kernel<F, 128>() : k_coded == 64 ? kernel<F, 64>() : k_coded == 32 ? kernel<F, 32>() : kernel<F, 0>();       \
  }
PK_FORMATS
#undef X

}  // namespace pikv::vnni
