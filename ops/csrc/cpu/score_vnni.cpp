// Scores of int8 bounds with AVX512 and VNNI. What a query meets the minima and the maxima with is the sum of three int8 each, which keeps
// 23 bits; a row of bounds then is a few dot products of bytes, and 16 rows are added up together.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../include/page_format.h"
#include "arena.h"
#include "avx512.h"
#include "numbers.h"
#include "score.h"

namespace pikv {
namespace {

constexpr float kMax = std::numeric_limits<float>::max();
constexpr float kBase = 254.0f;  // of the three parts
constexpr int kRows = 16;        // pages at a time
constexpr int kAhead = 8;        // pages between prefetch and use

inline __mmask64 mask64(int left) { return left >= 64 ? ~0ull : (1ull << left) - 1; }

// What the rows of bounds of one edge meet, for one query head.
struct Edge {
  int8_t* parts;         // [3, chunks * 64], 0 beyond the width
  int32_t* correction;   // [3, 16]: codes have 128 added, to be unsigned
  float step;            // of the last part
};

void split(const float* x, int D, int width, Edge& e) {
  float top = 1e-30f;
  for (int d = 0; d < D; ++d) top = std::max(top, std::min(std::abs(x[d]), kMax));
  std::memset(e.correction, 0, 3 * 16 * sizeof(int32_t));
  for (int d = 0; d < D; ++d) {
    float y = std::min(std::max(x[d], -kMax), kMax) / top * 127.0f;
    for (int part = 0; part < 3; ++part) {
      const float r = std::nearbyint(y);
      e.parts[part * width + d] = (int8_t)r, e.correction[part * 16 + d % 64 / 4] -= 128 * (int)r;
      y = (y - r) * kBase;
    }
  }
  for (int part = 0; part < 3; ++part) std::memset(e.parts + part * width + D, 0, width - D);
  e.step = top / (127.0f * kBase * kBase);
}

// Sums by lane of one row of codes [D] and its scale, in f32.
template <int CHUNKS>
inline __m512 meet(const int8_t* row, int D, int width, const Edge& e) {
  __m512i high = _mm512_load_si512(e.correction), mid = _mm512_load_si512(e.correction + 16), low = _mm512_load_si512(e.correction + 32);
  const int chunks = CHUNKS ? CHUNKS : width / 64;
#pragma GCC unroll 2
  for (int i = 0; i < chunks; ++i) {
    const __m512i codes = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask64(D - 64 * i), row + 64 * i), _mm512_set1_epi8((char)0x80));
    high = _mm512_dpbusd_epi32(high, codes, _mm512_load_si512(e.parts + 64 * i));
    mid = _mm512_dpbusd_epi32(mid, codes, _mm512_load_si512(e.parts + width + 64 * i));
    low = _mm512_dpbusd_epi32(low, codes, _mm512_load_si512(e.parts + 2 * width + 64 * i));
  }
  uint16_t scale;
  std::memcpy(&scale, row + D, sizeof scale);
  const __m512 base = _mm512_set1_ps(kBase);
  const __m512 sum = _mm512_fmadd_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(high), base, _mm512_cvtepi32_ps(mid)), base, _mm512_cvtepi32_ps(low));
  return _mm512_mul_ps(sum, _mm512_set1_ps(bf16_to_float(scale) * e.step));
}

template <int CHUNKS>
void score_rows(const Score& s, const int32_t* table, int used, int head, int width, const Edge* edges, float* scores) {
  const int8_t* bounds = static_cast<const int8_t*>(s.bounds);
  const int64_t edge_bytes = s.D + kBoundScale, bytes = 2 * edge_bytes;
  for (int c = 0; c < used; c += kRows) {
    __m512 top = _mm512_set1_ps(-kMax);
    const int count = std::min(kRows, used - c);
    for (int g = 0; g < s.G; ++g) {
      __m512 sums[kRows];
      for (int i = 0; i < kRows; ++i) {
        if (i >= count) {
          sums[i] = _mm512_setzero_ps();
          continue;
        }
        if (g == 0 && c + i + kAhead < used) {  // pages lie apart: the hardware does not see them coming
          const int8_t* next = bounds + ((int64_t)table[c + i + kAhead] * s.bound_heads + head) * bytes;
          for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(next + line), _MM_HINT_T0);
        }
        const int8_t* row = bounds + ((int64_t)table[c + i] * s.bound_heads + head) * bytes;
        sums[i] = _mm512_add_ps(meet<CHUNKS>(row, s.D, width, edges[2 * g]), meet<CHUNKS>(row + edge_bytes, s.D, width, edges[2 * g + 1]));
      }
      top = _mm512_max_ps(top, sums16(sums));
    }
    _mm512_mask_storeu_ps(scores + c, (__mmask16)((1u << count) - 1), _mm512_min_ps(top, _mm512_set1_ps(kMax)));
  }
}

}  // namespace

void score_vnni(const Score& s, int n, int h) {
  static thread_local Arena arena;
  const int D = s.D, width = (D + 63) / 64 * 64;
  arena.start((size_t)s.G * (2 * (3 * width + 3 * 64 + 128) + sizeof(Edge) * 2 + 64) + 8 * (size_t)width + 4 * 64);
  float* x = arena.take<float>(2 * (size_t)D);
  Edge* edges = arena.take<Edge>(2 * (size_t)s.G);
  const int64_t from = ((int64_t)(n / s.S) * s.H + h) * s.G * D;
  for (int g = 0; g < s.G; ++g) {
    for (int d = 0; d < D; ++d) {
      const float q = load_float(s.q, s.q_type, from + (int64_t)g * D + d) * s.scale;
      const float w = s.width ? load_float(s.width, s.q_type, from + (int64_t)g * D + d) * s.scale : std::abs(q);
      x[d] = 0.5f * (q - w), x[D + d] = 0.5f * (q + w);
    }
    for (int edge = 0; edge < 2; ++edge) {
      Edge& e = edges[2 * g + edge];
      e.parts = arena.take<int8_t>(3 * (size_t)width), e.correction = arena.take<int32_t>(3 * 16);
      split(x + edge * D, D, width, e);
    }
  }
  const int32_t* table = s.table + ((int64_t)n * s.table_heads + (s.table_heads == 1 ? 0 : h)) * s.max_pages;
  const int len = s.seqlens[n * s.seqlen_heads + (s.seqlen_heads == 1 ? 0 : h)];
  const int used = (len + s.page_size - 1) / s.page_size, head = s.bound_heads == 1 ? 0 : h;
  float* scores = s.scores + ((int64_t)n * s.H + h) * s.max_pages;
  const auto rows = width == 64 ? score_rows<1> : width == 128 ? score_rows<2> : score_rows<0>;
  rows(s, table, used, head, width, edges, scores);
  std::fill(scores + used, scores + s.max_pages, -std::numeric_limits<float>::infinity());
}

}  // namespace pikv
