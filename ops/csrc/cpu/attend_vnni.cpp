// Attention of one unit with AVX512 bf16 dot products (bf16, fp8) and VNNI (int8, int4): tiles of 16 tokens, up to 8 rows at a time.
//
// What made it fast, in the order of what it brought (docs/results holds the runs):
//   - the next tiles are prefetched line by line inside the arithmetic, not in a burst: one core then keeps the memory busy;
//   - rows of a kv head are computed together, so a key or value is loaded once for all of them;
//   - int8, int4: (q * scale) is split into two int8 parts, hi + lo / 256, so u8 x s8 dot products keep 16 bits of the query.
// Value sums stay in f32. The sums of formats that unpack in pairs are kept as even and odd columns and put in order at the end.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

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

// Memory of a thread, grown and kept, on 64-byte boundaries.
class Arena {
 public:
  void start(size_t bytes) {
    if (bytes > size_) {
      memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      size_ = bytes;
    }
    used_ = 0;
  }
  template <class T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  size_t size_ = 0, used_ = 0;
};

// Rows [first, first + count) share one query token.
struct Chunk {
  int first, count, t;
};

struct Work {
  float *q, *acc, *m, *l, *page_l, *q_scale, *q_bias;  // q: scaled to base 2
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

constexpr bool in_pairs(int F) { return F == kBf16 || F == kInt4 || F == kFp8; }

// (q * scale) of a group of tokens as hi + lo / 256 int8, and the share of the zeros.
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
      const int left = D - d;
      const __mmask16 m = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
      const __m512 x = _mm512_load_ps(q + d), y = _mm512_mul_ps(x, halves(m, scale + d));
      bias = _mm512_fmadd_ps(x, halves(m, zero + d), bias);
      top = _mm512_max_ps(top, _mm512_abs_ps(y));
      _mm512_store_ps(product + d, y);
    }
    const float largest = std::max(_mm512_reduce_max_ps(top), 1e-30f);
    w.q_scale[row] = largest / (127.0f * 256.0f);
    w.q_bias[row] = _mm512_reduce_add_ps(bias);
    const __m512 inverse = _mm512_set1_ps(127.0f / largest), k256 = _mm512_set1_ps(256.0f);
    int8_t *hi = w.q_hi + (size_t)row * w.Dk, *lo = w.q_lo + (size_t)row * w.Dk;
    for (int d = 0; d < w.Dk; d += 16) {
      const __m512 y = _mm512_mul_ps(_mm512_load_ps(product + d), inverse), r = _mm512_roundscale_ps(y, 8);
      _mm_store_si128((__m128i*)(hi + d), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(r)));
      _mm_store_si128((__m128i*)(lo + d), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(y, r), k256))));
    }
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
  if constexpr (F == kInt8) {
    for (int j = 0; j < W; ++j) {
      const int rest = left - 16 * j;
      const __m128i c = FULL ? _mm_loadu_si128((const __m128i*)(row + d + 16 * j))
                             : _mm_maskz_loadu_epi8(rest >= 16 ? 0xffff : rest <= 0 ? 0 : (1u << rest) - 1, row + d + 16 * j);
      v[j] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(c));
    }
  } else if constexpr (F == kInt4) {
    for (int j = 0; j < W; j += 2) {
      const int rest = (left - 16 * j) / 2;
      const uint8_t* p = row + d / 2 + 8 * j;
      const __m128i c = FULL ? _mm_loadu_si128((const __m128i*)p)
                             : _mm_maskz_loadu_epi8(rest >= 16 ? 0xffff : rest <= 0 ? 0 : (1u << rest) - 1, p);
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
inline void add_values(float* acc, int64_t acc_stride, const uint8_t* v, int64_t v_stride, int d, int left, const float* p,
                       const float* shrink, const float* base, int count, __mmask16 visible, Prefetch& next, int lines) {
  __m512 c[G * W];
#pragma GCC unroll 32
  for (int i = 0; i < G * W; ++i)
    c[i] = _mm512_fmadd_ps(_mm512_load_ps(acc + i / W * acc_stride + i % W * 16), _mm512_set1_ps(shrink[i / W]),
                           _mm512_set1_ps(base[i / W]));
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

// One tile, G rows from `row`. visible: the tokens that these rows see.
template <int F, int G, int DC>
void add_tile(const Attend& a, Work& w, const Tile& tile, int row, __mmask16 visible, bool last_chunk) {
  constexpr int W = G == 8 ? 2 : 4;  // G * W sums in registers
  constexpr bool scaled = F != kBf16;
  const int Dv = DC ? DC : a.f.v_dim, passes = (Dv + 16 * W - 1) / (16 * W);
  const int k_bytes = kTile * a.f.k_row_bytes, v_bytes = kTile * a.f.v_row_bytes;
  Prefetch next_k = {tile.next_k, tile.next_k + (last_chunk ? k_bytes : 0)};
  Prefetch next_v = {tile.next_v, tile.next_v + (last_chunk ? v_bytes : 0)};
  const int k_lines = (k_bytes / 64 + G - 1) / G, v_lines = (v_bytes / 64 + passes * kTile - 1) / (passes * kTile);
  alignas(64) float p[G * kTile];
  float shrink[G], base[G];
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
    const float top = _mm512_reduce_max_ps(s), old = w.m[row + g];
    shrink[g] = 1.0f;
    if (top > old) {
      shrink[g] = _mm512_cvtss_f32(exp2_negative(_mm512_set1_ps(old - top)));
      w.m[row + g] = top;
    }
    const __m512 e = _mm512_maskz_mov_ps(visible, exp2_negative(_mm512_sub_ps(s, _mm512_set1_ps(w.m[row + g]))));
    const float sum = _mm512_reduce_add_ps(e);
    w.l[row + g] = w.l[row + g] * shrink[g] + sum;
    w.page_l[row + g] = w.page_l[row + g] * shrink[g] + sum;
    base[g] = F == kInt8 || F == kInt4 ? _mm512_reduce_add_ps(_mm512_mul_ps(e, v_zero)) : 0.0f;
    _mm512_store_ps(p + g * kTile, scaled ? _mm512_mul_ps(e, v_scale) : e);
  }
  for (int pass = 0; pass < passes; ++pass) {
    const int d = pass * 16 * W;
    float* acc = w.acc + (size_t)row * w.Dv + d;
    if (visible == 0xffff)
      add_values<F, G, W, DC != 0, false>(acc, w.Dv, tile.v, tile.v_stride, d, Dv - d, p, shrink, base, kTile, visible, next_v, v_lines);
    else
      add_values<F, G, W, DC != 0, true>(acc, w.Dv, tile.v, tile.v_stride, d, Dv - d, p, shrink, base, tile.count, visible, next_v,
                                         v_lines);
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

// Brings 16 rows into the form the dot products read: int4 to bytes, fp8 to bf16, and fewer than 16 rows to 16.
template <int F>
void unpack(const PageFormat& f, const uint8_t* k, const uint8_t* v, Tile& tile, Work& w) {
  tile.k = k, tile.v = v, tile.k_stride = f.k_row_bytes, tile.v_stride = f.latent ? f.k_row_bytes : f.v_row_bytes;
  if constexpr (F == kInt4) {
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
    for (int t = 0; t < tile.count; ++t) std::memcpy(w.k_bytes + (size_t)t * 2 * w.Dk, k + t * (int64_t)f.k_row_bytes, f.k_row_bytes);
    tile.k = w.k_bytes, tile.k_stride = 2 * w.Dk;
  }
}

__mmask16 visible_tokens(const Attend& a, const Unit& u, int t, const int32_t* positions, int count) {
  const __mmask16 there = count >= kTile ? 0xffff : (1u << count) - 1;
  if (!a.window && !a.causal) return there;
  const int asked = a.asked[(int64_t)(u.n / a.S) * a.T + t];
  const __m512i p = _mm512_maskz_loadu_epi32(there, positions);
  __mmask16 seen = there;
  if (a.window) seen &= _mm512_cmpgt_epi32_mask(p, _mm512_set1_epi32((int)std::max<int64_t>((int64_t)asked - a.window, INT32_MIN)));
  if (a.causal) seen &= _mm512_cmple_epi32_mask(p, _mm512_set1_epi32(asked));
  return seen;
}

void prepare(const Attend& a, const Unit& u, Work& w, std::vector<Chunk>& chunks) {
  static thread_local Arena arena;
  const int M = a.rows();
  w.Dk = pad64(a.f.k_dim), w.Dv = pad64(a.f.v_dim);
  const size_t D = w.Dk + w.Dv;
  arena.start((size_t)M * (16 * D + 20) + kTile * 8 * D + 64 * 16);
  w.q = arena.take<float>((size_t)M * w.Dk), w.acc = arena.take<float>((size_t)M * w.Dv);
  w.m = arena.take<float>(M), w.l = arena.take<float>(M), w.page_l = arena.take<float>(M);
  w.q_scale = arena.take<float>(M), w.q_bias = arena.take<float>(M);
  w.qb = arena.take<uint16_t>((size_t)M * w.Dk);
  w.k_tile = arena.take<uint16_t>((size_t)kTile * w.Dk), w.v_tile = arena.take<uint16_t>((size_t)kTile * w.Dv);
  w.k_bytes = arena.take<uint8_t>((size_t)kTile * 2 * w.Dk);
  w.q_hi = arena.take<int8_t>((size_t)M * w.Dk), w.q_lo = arena.take<int8_t>((size_t)M * w.Dk);
  for (int row = 0; row < M; ++row) {
    const int64_t at = a.q_row(u.n, u.h, row) * a.f.k_dim;
    for (int d = 0; d < w.Dk; ++d) {
      const float x = d < a.f.k_dim ? load_float(a.q, a.q_type, at + d) : 0.0f;
      w.q[(size_t)row * w.Dk + d] = x * (a.scale * kLog2e);
      w.qb[(size_t)row * w.Dk + d] = float_to_bf16(x);
    }
    w.m[row] = -kInf, w.l[row] = 0, w.page_l[row] = 0;
  }
  std::memset(w.acc, 0, (size_t)M * w.Dv * sizeof(float));
  std::memset(w.k_bytes, 0, (size_t)kTile * 2 * w.Dk);
  std::memset(w.k_tile, 0, (size_t)kTile * 2 * w.Dk);
  chunks.clear();
  for (int t = 0; t < a.T; ++t)
    for (int g = 0; g < a.G;) {
      const int left = a.G - g, count = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      chunks.push_back({t * a.G + g, count, t});
      g += count;
    }
}

template <int F>
void finish(const Attend& a, const Unit& u, const Work& w) {
  for (int row = 0; row < a.rows(); ++row) {
    const float inverse = w.l[row] > 0 ? 1 / w.l[row] : 0.0f;
    const float* acc = w.acc + (size_t)row * w.Dv;
    float* out = u.out + (int64_t)row * a.f.v_dim;
    for (int d = 0; d < a.f.v_dim; ++d) {
      const int at = in_pairs(F) ? d / 32 * 32 + d % 2 * 16 + d % 32 / 2 : d;
      out[d] = acc[at] * inverse;
    }
    u.lse[row] = w.l[row] > 0 ? (w.m[row] + std::log2(w.l[row])) * kLn2 : -kInf;
  }
}

template <int F, int DC>
void attend(const Attend& a, const Unit& u) {
  static thread_local Work w;
  static thread_local std::vector<Chunk> chunks;
  prepare(a, u, w, chunks);
  const PageFormat& f = a.f;
  const int32_t* table = a.table_of(u.n, u.h);
  const int32_t* list = a.list_of(u.n, u.h);
  const int limit = a.paged(u.n, u.h), tiles = (f.page_size + kTile - 1) / kTile, M = a.rows();
  const auto section_of = [&](int c) -> const uint8_t* {
    const int column = list ? list[c] : c;
    if (column < 0 || column * f.page_size >= limit) return nullptr;
    return a.section(a.pages + (int64_t)table[column] * f.record_bytes, u.h);
  };
  for (int c = u.c0; c < u.c1; ++c) {
    const int column = list ? list[c] : c;
    const int count = column < 0 ? 0 : std::min(f.page_size, limit - column * f.page_size);
    if (count > 0) {
      const uint8_t* record = a.pages + (int64_t)table[column] * f.record_bytes;
      const uint8_t* head = a.section(record, u.h);
      const int32_t* positions = reinterpret_cast<const int32_t*>(record + f.positions);
      const uint8_t* next_page = c + 1 < u.c1 ? section_of(c + 1) : nullptr;
      if (f.k_scale >= 0 && next_page)
        for (int64_t i = f.k_scale & ~63; i < f.head_bytes; i += 64) prefetch(next_page + i);
      for (int i = 0; i * kTile < count; ++i) {
        const int t0 = i * kTile;
        Tile tile;
        tile.count = std::min(kTile, count - t0);
        if (format_grouped(F) && t0 % f.group == 0) start_group<F>(a, head, t0 / f.group, M, w);
        unpack<F>(f, head + f.k + (int64_t)t0 * f.k_row_bytes,
                  head + (f.latent ? f.k + (int64_t)t0 * f.k_row_bytes : f.v + (int64_t)t0 * f.v_row_bytes), tile, w);
        const uint16_t* k_scale = f.k_scale < 0 ? nullptr : reinterpret_cast<const uint16_t*>(head + f.k_scale) + t0;
        tile.k_scale = k_scale;
        tile.v_scale = f.v_scale < 0 ? k_scale : reinterpret_cast<const uint16_t*>(head + f.v_scale) + t0;
        tile.v_zero = f.v_zero < 0 ? nullptr : reinterpret_cast<const uint16_t*>(head + f.v_zero) + t0;
        const int ahead = i + kAhead[F], later = c + ahead / tiles;
        const uint8_t* next = ahead < tiles ? head : later < u.c1 ? section_of(later) : nullptr;
        if (!next) next = head;
        tile.next_k = next + f.k + (int64_t)(ahead % tiles) * kTile * f.k_row_bytes;
        tile.next_v = f.latent ? tile.next_k : next + f.v + (int64_t)(ahead % tiles) * kTile * f.v_row_bytes;
        for (size_t j = 0; j < chunks.size(); ++j) {
          const __mmask16 visible = visible_tokens(a, u, chunks[j].t, positions + t0, tile.count);
          if (visible) add_rows<F, DC>(a, w, tile, chunks[j], visible, j + 1 == chunks.size());
        }
      }
    }
    if (a.page_lse)
      for (int row = 0; row < M; ++row) {
        const float l = w.page_l[row];
        a.page_lse_row(u.n, u.h, row)[c] = l > 0 ? (w.m[row] + std::log2(l)) * kLn2 : -kInf;
      }
    std::fill(w.page_l, w.page_l + M, 0.0f);
  }
  finish<F>(a, u, w);
}

template <int F>
void by_width(const Attend& a, const Unit& u) {
  if (a.f.k_dim == 128 && a.f.v_dim == 128) return attend<F, 128>(a, u);
  if (a.f.k_dim == 64 && a.f.v_dim == 64) return attend<F, 64>(a, u);
  attend<F, 0>(a, u);
}

}  // namespace

bool attend_vnni(const Attend& a, const Unit& u) {
  switch (a.f.format) {
    case kBf16:
      if (a.q_type != kBf16) return false;  // rounding another query to bf16 would cost accuracy
      by_width<kBf16>(a, u);
      return true;
    case kFp8:
      if (a.q_type != kBf16) return false;
      by_width<kFp8>(a, u);
      return true;
    case kInt8:
      if (a.f.latent) return false;  // its values carry the scales of the keys, per channel
      by_width<kInt8>(a, u);
      return true;
    case kInt4:
      if (a.f.latent) return false;
      by_width<kInt4>(a, u);
      return true;
    default:
      return false;
  }
}

}  // namespace pikv
