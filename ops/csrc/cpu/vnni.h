// What the parts of the hand-written AVX512 attention hand to each other: plain data, and per format a kernel for keys and one for values.
// The two are chosen apart, so that every pair of formats runs in both.
#pragma once
#include <cstdint>

#include "attend.h"

namespace pikv::vnni {

constexpr int kTile = 16;

inline constexpr int pad64(int d) { return (d + 63) / 64 * 64; }

constexpr bool integers(int F) { return format_grouped(F); }
// Formats whose rows unpack two columns at a time: 32 columns are kept as 16 even ones, then 16 odd ones.
constexpr bool in_pairs(int F) { return F == kBf16 || F == kInt4 || F == kFp4; }
// The query lies so too where it meets those columns in f32.
constexpr bool query_in_pairs(int F) { return F == kBf16 || F == kFp4; }
constexpr int column_of(int d) { return d / 32 * 32 + d % 2 * 16 + d % 32 / 2; }

// Values that are summed as bytes, four tokens to a lane. Rows of 32 fill half a register of bytes: they are faster as f32.
constexpr bool byte_values(int F, int v_dim) { return integers(F) && v_dim != 32; }
// Where the sum of a column of values lies. Of 64 bytes, in the order of split_nibbles for int4, byte 16 a + 4 j + i is in lane 4 a + i of
// register j.
constexpr int sum_of(int F, int v_dim, int d) {
  if (!byte_values(F, v_dim)) return in_pairs(F) ? column_of(d) : d;
  const int e = d % 64, b = F == kInt4 ? e % 2 * 32 + e / 2 : e;
  return d / 64 * 64 + b % 16 / 4 * 16 + b / 16 * 4 + b % 4;
}

// Rows [first, first + count) share one query token.
struct Chunk {
  int first, count, t;
};

struct Work {
  float *q, *acc, *m, *q_scale, *q_bias;  // q: scaled to base 2; acc: sums of values; both in the order of their format
  float *l, *page_l, *zeros;              // 16 sums per row, one per lane; zeros: what the zeros of integer values add to every column
  float* product;                         // [Dk]
  uint8_t* k_bytes;                       // [kTile, Dk]
  int8_t *q_hi, *q_lo;
  int Dk, Dv;  // padded to 64
};

// 16 tokens of a page.
struct Tile {
  const uint8_t *k, *v;                               // rows, k_stride and v_stride apart
  const uint8_t *next_k, *next_v;                     // what to prefetch
  const uint8_t *k_scale, *k_zero, *v_scale, *v_zero;  // those of rows encoded each by itself, at the first token
  int64_t k_stride, v_stride;
  int k_blocks, v_blocks;  // fp4: scales of a row
  int count;
};

struct KeyKernel {
  // An integer format: (q * scale) of a group of tokens and the share of its zeros, before its first tile. Else null.
  void (*start_group)(const Attend& a, const uint8_t* head, int group, int M, Work& w);
  // Points the tile at the rows at `k`.
  void (*point_at)(const PageFormat& f, const uint8_t* k, Tile& tile, Work& w);
  // exp2(score - w.m) of the rows of a chunk into p [count, kTile], 0 where not visible; raises w.m, adds to w.l and w.page_l.
  void (*scores)(const Attend& a, Work& w, const Tile& tile, const Chunk& chunk, uint16_t visible, bool last_chunk, float* p);
};

// Adds the values of the tile, weighted by p, to w.acc and w.zeros.
using ValueKernel = void (*)(const Attend& a, Work& w, const Tile& tile, const Chunk& chunk, uint16_t visible, bool last_chunk, float* p);

// For keys or values of this width.
template <int F>
KeyKernel key_kernel(int k_dim);
template <int F>
ValueKernel value_kernel(int v_dim);

}  // namespace pikv::vnni
