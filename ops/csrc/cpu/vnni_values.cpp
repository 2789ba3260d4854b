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

// The weights of 16 tokens as hi + lo / 256 int8, for codes that are bytes. What that leaves out of a weight meets the middle code in the
// zeros, so that only the distance of the code from it is lost: for int8 a hundredth of what the codes themselves round.
struct ByteWeights {
  alignas(16) int8_t hi[kTile], lo[kTile];
  float step;  // of lo
};

template <int F>
inline ByteWeights to_bytes(Work& w, int row, const float* p) {
  ByteWeights out;
  const __m512 x = _mm512_load_ps(p);
  const float top = std::max(_mm512_reduce_max_ps(x), 1e-30f);
  out.step = top / (127.0f * 256.0f);
  const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(127.0f / top)), r = _mm512_roundscale_ps(y, 8);
  const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(y, r), _mm512_set1_ps(256.0f));
  const __m512i low = _mm512_min_epi32(_mm512_cvtps_epi32(rest), _mm512_set1_epi32(127));
  add_to(w.zeros, row, _mm512_mul_ps(_mm512_sub_ps(rest, _mm512_cvtepi32_ps(low)), _mm512_set1_ps(out.step * (0.5f * format_levels(F)))));
  _mm_store_si128((__m128i*)out.hi, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(r)));
  _mm_store_si128((__m128i*)out.lo, _mm512_cvtepi32_epi8(low));
  return out;
}

// Columns [d, d + 64) of a row of codes as bytes, in the order of byte_column.
template <int F, bool FULL>
inline __m512i code_bytes(const uint8_t* row, int d, int left) {
  if constexpr (F == kInt8) return FULL ? _mm512_loadu_si512(row + d) : _mm512_maskz_loadu_epi8(mask64(left), row + d);
  else if constexpr (F == kInt4)
    return split_nibbles(FULL ? _mm256_loadu_si256((const __m256i*)(row + d / 2)) : _mm256_maskz_loadu_epi8(mask32(left / 2), row + d / 2));
  else return split_crumbs(FULL ? _mm_loadu_si128((const __m128i*)(row + d / 4)) : _mm_maskz_loadu_epi8(mask16(left / 4), row + d / 4));
}

// Adds 64 columns of 16 value rows of integer codes. Four tokens of a column come to lie in one lane, once for all rows of the query, and
// meet their weights in a dot product of bytes.
template <int F, int G, bool FULL>
inline void add_codes(float* acc, int64_t acc_stride, const Tile& tile, int d, int left, const ByteWeights* weights, Prefetch& next, int lines) {
  __m512i x[4][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512i r[4];
    next.lines(lines);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int t = std::min(4 * i + j, tile.count - 1);  // beyond the page: the weight is 0
      r[j] = code_bytes<F, FULL>(tile.v + t * tile.v_stride, d, left);
    }
    const __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), e = _mm512_unpackhi_epi8(r[2], r[3]);
    x[i][0] = _mm512_unpacklo_epi16(a, c), x[i][1] = _mm512_unpackhi_epi16(a, c);
    x[i][2] = _mm512_unpacklo_epi16(b, e), x[i][3] = _mm512_unpackhi_epi16(b, e);
  }
#pragma GCC unroll 1
  for (int g = 0; g < G; ++g, acc += acc_stride) {
    const int8_t *hi = weights[g].hi, *lo = weights[g].lo;
    const __m512 step = _mm512_set1_ps(weights[g].step);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum = _mm512_dpbusd_epi32(sum, x[i][j], four_bytes(hi + 4 * i));
      sum = _mm512_slli_epi32(sum, 8);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum = _mm512_dpbusd_epi32(sum, x[i][j], four_bytes(lo + 4 * i));
      _mm512_store_ps(acc + 16 * j, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), step, _mm512_load_ps(acc + 16 * j)));
    }
  }
}

template <int F, int G, int DC>
void add_rows_of_codes(const Attend& a, Work& w, const Tile& tile, int row, __mmask16 visible, bool last_chunk, float* p) {
  const int Dv = DC ? DC : a.f.v_dim, passes = (Dv + 63) / 64;
  const int v_bytes = std::min(kTile, a.block) * a.f.v_row_bytes, v_lines = (v_bytes / 64 + 4 * passes - 1) / (4 * passes);
  Prefetch next = {tile.next_v, tile.next_v + (last_chunk ? v_bytes : 0), a.first_level};
  scale_weights<F, G>(w, tile, row, visible, p);
  ByteWeights weights[G];
  for (int g = 0; g < G; ++g) weights[g] = to_bytes<F>(w, row + g, p + g * kTile);
  for (int d = 0; d < Dv; d += 64)
    add_codes<F, G, DC % 64 == 0 && DC != 0>(w.acc + (size_t)row * w.Dv + d, w.Dv, tile, d, Dv - d, weights, next, v_lines);
}

template <int F, int G, int DC>
void add_rows(const Attend& a, Work& w, const Tile& tile, int row, __mmask16 visible, bool last_chunk, float* p) {
  if constexpr (byte_values(F, DC)) {
    if (!w.codes) return add_rows_of_codes<F, G, DC>(a, w, tile, row, visible, last_chunk, p);  // integer latents: sums of codes in f32
  }
  constexpr int W = G == 8 || DC == 32 ? 2 : 4;  // G * W sums in registers
  const int Dv = DC ? DC : a.f.v_dim, passes = (Dv + 16 * W - 1) / (16 * W);
  const int v_bytes = std::min(kTile, a.block) * a.f.v_row_bytes, v_lines = (v_bytes / 64 + passes * kTile - 1) / (passes * kTile);
  Prefetch next = {tile.next_v, tile.next_v + (last_chunk ? v_bytes : 0), a.first_level};
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
