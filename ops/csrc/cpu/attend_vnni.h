// Attention of one unit with AVX512 and VNNI: tiles of 16 tokens, up to 8 rows at a time.
//
// What made it fast, in the order of what it brought (docs/results holds the runs):
//   - the next tiles are prefetched line by line inside the arithmetic, not in a burst: one core then keeps the memory busy;
//   - rows of a kv head are computed together, so a key or value is loaded and widened once for all of them;
//   - int8, int4: (q * scale) is split into two int8 parts, hi + lo / 256, so u8 x s8 dot products keep 16 bits of the query.
// No sum or maximum across lanes is taken between tiles. Value sums stay in f32; those of formats that unpack in pairs are kept as even and
// odd columns and put in order at the end. What the zeros of int8 and int4 values add is taken in page by page: codes are all positive, and
// the rounding of a sum of thousands of them would be large beside the result.
#pragma once
#include <cstdlib>
#include <memory>
#include <vector>

#include "vnni_tile.h"

namespace pikv {
namespace {

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

template <int F>
void prepare(const Attend& a, const Unit& u, Work& w, std::vector<Chunk>& chunks) {
  static thread_local Arena arena;
  const int M = a.rows();
  w.Dk = pad64(a.f.k_dim), w.Dv = pad64(a.f.v_dim);
  arena.start((size_t)M * (6 * w.Dk + 4 * w.Dv + 3 * 64 + 12) + (size_t)(4 + kTile) * w.Dk + 16 * 64);
  w.q = arena.take<float>((size_t)M * w.Dk), w.acc = arena.take<float>((size_t)M * w.Dv);
  w.l = arena.take<float>((size_t)M * 16), w.page_l = arena.take<float>((size_t)M * 16), w.zeros = arena.take<float>((size_t)M * 16);
  w.m = arena.take<float>(M), w.q_scale = arena.take<float>(M), w.q_bias = arena.take<float>(M);
  w.product = arena.take<float>(w.Dk), w.k_bytes = arena.take<uint8_t>((size_t)kTile * w.Dk);
  w.q_hi = arena.take<int8_t>((size_t)M * w.Dk), w.q_lo = arena.take<int8_t>((size_t)M * w.Dk);
  for (int row = 0; row < M; ++row) {
    const int64_t at = a.q_row(u.n, u.h, row) * a.f.k_dim;
    for (int d = 0; d < w.Dk; ++d) {
      const float x = d < a.f.k_dim ? load_float(a.q, a.q_type, at + d) : 0.0f;
      w.q[(size_t)row * w.Dk + (F == kBf16 ? column_of(d) : d)] = x * (a.scale * kLog2e);
    }
    w.m[row] = -kInf;
  }
  for (float* sums : {w.l, w.page_l, w.zeros}) std::memset(sums, 0, (size_t)M * 16 * sizeof(float));
  std::memset(w.acc, 0, (size_t)M * w.Dv * sizeof(float));
  chunks.clear();
  for (int t = 0; t < a.T; ++t)
    for (int g = 0; g < a.G;) {
      const int left = a.G - g, count = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      chunks.push_back({t * a.G + g, count, t});
      g += count;
    }
}

inline float lanes(const float* sums, int row) { return _mm512_reduce_add_ps(_mm512_load_ps(sums + row * 16)); }

inline void take_in_zeros(Work& w, int M) {
  for (int row = 0; row < M; ++row) {
    const __m512 zeros = _mm512_set1_ps(lanes(w.zeros, row));
    float* acc = w.acc + (size_t)row * w.Dv;
    for (int d = 0; d < w.Dv; d += 16) _mm512_store_ps(acc + d, _mm512_add_ps(_mm512_load_ps(acc + d), zeros));
  }
  std::memset(w.zeros, 0, (size_t)M * 16 * sizeof(float));
}

template <int F>
void finish(const Attend& a, const Unit& u, const Work& w) {
  for (int row = 0; row < a.rows(); ++row) {
    const float l = lanes(w.l, row), inverse = l > 0 ? 1 / l : 0.0f;
    const float* acc = w.acc + (size_t)row * w.Dv;
    float* out = u.out + (int64_t)row * a.f.v_dim;
    for (int d = 0; d < a.f.v_dim; ++d) {
      out[d] = acc[in_pairs(F) ? column_of(d) : d] * inverse;
    }
    u.lse[row] = l > 0 ? (w.m[row] + std::log2(l)) * kLn2 : -kInf;
  }
}

template <int F, int DC>
void attend(const Attend& a, const Unit& u) {
  static thread_local Work w;
  static thread_local std::vector<Chunk> chunks;
  prepare<F>(a, u, w, chunks);
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
        if (integers(F) && t0 % f.group == 0) start_group<F, DC>(a, head, t0 / f.group, M, w);
        const uint16_t* k_scale = f.k_scale < 0 ? nullptr : reinterpret_cast<const uint16_t*>(head + f.k_scale) + t0;
        tile.k_scale = k_scale;
        tile.v_scale = f.v_scale < 0 ? k_scale : reinterpret_cast<const uint16_t*>(head + f.v_scale) + t0;
        tile.v_zero = f.v_zero < 0 ? nullptr : reinterpret_cast<const uint16_t*>(head + f.v_zero) + t0;
        const uint8_t* keys = head + f.k + (int64_t)t0 * f.k_row_bytes;
        point_at<F, DC>(f, keys, f.latent ? keys : head + f.v + (int64_t)t0 * f.v_row_bytes, tile, w);
        const int ahead = i + kAhead[f.format], later = c + ahead / tiles;
        const uint8_t* next = ahead < tiles ? head : later < u.c1 ? section_of(later) : nullptr;
        if (!next) next = head;
        tile.next_k = next + f.k + (int64_t)(ahead % tiles) * kTile * f.k_row_bytes;
        tile.next_v = f.latent ? tile.next_k : next + f.v + (int64_t)(ahead % tiles) * kTile * f.v_row_bytes;
        for (size_t j = 0; j < chunks.size(); ++j) {
          const __mmask16 visible = visible_tokens(a, u, chunks[j].t, positions + t0, tile.count);
          if (visible) add_rows<F, DC>(a, w, tile, chunks[j], visible, j + 1 == chunks.size());
        }
      }
      if constexpr (integers(F)) take_in_zeros(w, M);
    }
    if (!a.page_lse) continue;
    for (int row = 0; row < M; ++row) {
      const float l = lanes(w.page_l, row);
      a.page_lse_row(u.n, u.h, row)[c] = l > 0 ? (w.m[row] + std::log2(l)) * kLn2 : -kInf;
    }
    std::fill(w.page_l, w.page_l + M * 16, 0.0f);
  }
  finish<F>(a, u, w);
}

template <int F>
void by_width(const Attend& a, const Unit& u) {
  if (a.f.k_dim == 128 && a.f.v_dim == 128) return attend<F, 128>(a, u);
  if (a.f.k_dim == 32 && a.f.v_dim == 32) return attend<F, 32>(a, u);
  if (a.f.k_dim == 64 && a.f.v_dim == 64) return attend<F, 64>(a, u);
  attend<F, 0>(a, u);
}

}  // namespace
}  // namespace pikv
