// Values of a tile of 16 tokens, weighted, into the sums of up to 8 rows, for the formats in PK_FORMATS.
#include "vnni_tile.h"

namespace pikv::vnni {
namespace {

// Adds 16 * W columns of up to 16 value rows to the sums of G rows, which stay in registers.
template <int F, int G, int W, bool FULL, bool MASKED>
inline void add_values(float* acc, int64_t acc_stride, const Tile& tile, int d, int left, const float* p, int count, __mmask16 visible,
                       Prefetch& next, int lines) {
  const uint8_t *v = tile.v, *scale = tile.v_scale;
  __m512 c[G * W];
#pragma GCC unroll 32
  for (int i = 0; i < G * W; ++i) c[i] = _mm512_load_ps(acc + i / W * acc_stride + i % W * 16);
#pragma GCC unroll 1
  for (int t = 0; t < (MASKED ? count : kTile); ++t, v += tile.v_stride, scale += F == kFp4 ? tile.v_blocks : 0) {
    next.lines(lines);
    if (MASKED && !(visible >> t & 1)) continue;  // what is hidden is not read: it may hold anything
    __m512 x[W];
    load_columns<F, W, FULL>(v, scale, d, left, x);
#pragma GCC unroll 32
    for (int i = 0; i < G * W; ++i) c[i] = _mm512_fmadd_ps(_mm512_set1_ps(p[i / W * kTile + t]), x[i % W], c[i]);
  }
#pragma GCC unroll 32
  for (int i = 0; i < G * W; ++i) _mm512_store_ps(acc + i / W * acc_stride + i % W * 16, c[i]);
}

// Takes the scale of each token into its weight, and the zeros of integer values apart.
template <int F, int G>
void scale_weights(Work& w, const Tile& tile, int row, __mmask16 visible, float* p) {
  __m512 scale, zero;
  if constexpr (F == kFp4) scale = powers_of_two(visible, tile.v_zero);
  else scale = token_halves(visible, tile.v_scale);
  if constexpr (F == kFp8) scale = _mm512_mul_ps(scale, _mm512_set1_ps(kFp8Factor));
  if constexpr (integers(F)) zero = token_halves(visible, tile.v_zero);
  for (int g = 0; g < G; ++g) {
    const __m512 e = _mm512_load_ps(p + g * kTile);
    if constexpr (integers(F)) add_to(w.zeros, row + g, _mm512_mul_ps(e, zero));
    _mm512_store_ps(p + g * kTile, _mm512_mul_ps(e, scale));
  }
}

template <int F, int G, int DC>
void add_rows(const Attend& a, Work& w, const Tile& tile, int row, __mmask16 visible, bool last_chunk, float* p) {
  constexpr int W = G == 8 || DC == 32 ? 2 : 4;  // G * W sums in registers
  const int Dv = DC ? DC : a.f.v_dim, passes = (Dv + 16 * W - 1) / (16 * W);
  const int v_bytes = kTile * a.f.v_row_bytes, v_lines = (v_bytes / 64 + passes * kTile - 1) / (passes * kTile);
  Prefetch next = {tile.next_v, tile.next_v + (last_chunk ? v_bytes : 0)};
  float* sums = w.acc;
  if (integers(F) && w.codes) {  // scales and zeros are those of the keys, by column: taken in after the group
    sums = w.codes;
    for (int g = 0; g < G; ++g) add_to(w.zeros, row + g, _mm512_load_ps(p + g * kTile));
  } else if constexpr (F > kFp16) {
    scale_weights<F, G>(w, tile, row, visible, p);
  }
  for (int pass = 0; pass < passes; ++pass) {
    const int d = pass * 16 * W;
    float* acc = sums + (size_t)row * w.Dv + d;
    if (visible == 0xffff) add_values<F, G, W, DC != 0, false>(acc, w.Dv, tile, d, Dv - d, p, kTile, visible, next, v_lines);
    else add_values<F, G, W, DC != 0, true>(acc, w.Dv, tile, d, Dv - d, p, tile.count, visible, next, v_lines);
  }
}

template <int F, int DC>
void values(const Attend& a, Work& w, const Tile& tile, const Chunk& chunk, uint16_t visible, bool last, float* p) {
  switch (chunk.count) {
    case 8: return add_rows<F, 8, DC>(a, w, tile, chunk.first, visible, last, p);
    case 4: return add_rows<F, 4, DC>(a, w, tile, chunk.first, visible, last, p);
    case 2: return add_rows<F, 2, DC>(a, w, tile, chunk.first, visible, last, p);
    default: return add_rows<F, 1, DC>(a, w, tile, chunk.first, visible, last, p);
  }
}

}  // namespace

#define X(F)                                                                                                                             \
  template <>                                                                                                                            \
  ValueKernel value_kernel<F>(int v_dim) {                                                                                               \
    return v_dim == 128 ? values<F, 128> : v_dim == 64 ? values<F, 64> : v_dim == 32 ? values<F, 32> : values<F, 0>;                     \
  }
PK_FORMATS
#undef X

}  // namespace pikv::vnni
