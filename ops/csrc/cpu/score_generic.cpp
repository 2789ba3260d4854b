// Page scores in plain C++, compiled once per instruction set with PK_SCORE as its name.
//
// q (hi + lo) / 2 + w (hi - lo) / 2 = (q - w) / 2 lo + (q + w) / 2 hi, so with the query split into [(q - w) / 2 | (q + w) / 2], which is
// [min(q, 0) | max(q, 0)] for w = |q|, a page costs one dot product with its bounds [lo | hi] as they lie in memory.
#include "score.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../include/page_format.h"
#include "numbers.h"

namespace pikv {
namespace {

constexpr float kMax = std::numeric_limits<float>::max();
constexpr int kAhead = 6;   // pages between prefetch and use
constexpr int kLanes = 16;  // head_dim is a multiple of 8, and a row holds it twice

// An fp16 bound may be infinite, and 0 * inf would be NaN.
inline float finite(float x) { return std::min(std::max(x, -kMax), kMax); }

// The minima and maxima [2, D] of the row-th page and head.
void load_bounds(const void* bounds, int type, int64_t row, int D, float* x) {
  const int64_t at = row * 2 * D;
  const int count = 2 * D;
  if (type == kInt8) {
    for (int edge = 0; edge < 2; ++edge, x += D) {
      const int8_t* p = static_cast<const int8_t*>(bounds) + (2 * row + edge) * (D + kBoundScale);
      uint16_t scale;
      std::memcpy(&scale, p + D, sizeof scale);
      const float s = bf16_to_float(scale);
      for (int d = 0; d < D; ++d) x[d] = finite(p[d] * s);
    }
    return;
  }
  if (type == kFp32) {
    const float* p = static_cast<const float*>(bounds) + at;
    for (int i = 0; i < count; ++i) x[i] = finite(p[i]);
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(bounds) + at;
  if (type == kBf16)
    for (int i = 0; i < count; ++i) x[i] = finite(bf16_to_float(p[i]));
  else
    for (int i = 0; i < count; ++i) x[i] = finite(half_to_float(p[i]));
}

typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// In halves: a chain of 16 additions would take longer than the products.
inline float add_up(Lanes x) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight high8, low8;
  std::memcpy(&low8, &x, 32), std::memcpy(&high8, reinterpret_cast<const char*>(&x) + 32, 32);
  low8 += high8;
  Four high4, low4;
  std::memcpy(&low4, &low8, 16), std::memcpy(&high4, reinterpret_cast<const char*>(&low8) + 16, 16);
  low4 += high4;
  return (low4[0] + low4[2]) + (low4[1] + low4[3]);
}

// The largest dot product of G rows [G, count] with x [count]: G chains of additions at once, so that none waits for itself.
template <int G>
inline float top_dot(const float* rows, const float* x, int count) {
  Lanes sum[G] = {};
  for (int i = 0; i < count; i += kLanes) {
    const Lanes at = *reinterpret_cast<const Lanes*>(x + i);
    for (int g = 0; g < G; ++g) sum[g] += *reinterpret_cast<const Lanes*>(rows + (int64_t)g * count + i) * at;
  }
  float top = -kMax;
  for (int g = 0; g < G; ++g) {
    top = std::max(top, add_up(sum[g]));
  }
  return top;
}

}  // namespace

void PK_SCORE(const Score& s, int n, int h) {
  static thread_local std::vector<float> split, edge;
  const int D = s.D;
  split.resize((size_t)2 * D * s.G), edge.resize((size_t)2 * D);
  const int64_t from = ((int64_t)(n / s.S) * s.H + h) * s.G * D;
  for (int g = 0; g < s.G; ++g)
    for (int d = 0; d < D; ++d) {
      const float x = load_float(s.q, s.q_type, from + (int64_t)g * D + d) * s.scale;
      const float w = s.width ? load_float(s.width, s.q_type, from + (int64_t)g * D + d) * s.scale : std::abs(x);
      split[(size_t)2 * D * g + d] = 0.5f * (x - w), split[(size_t)2 * D * g + D + d] = 0.5f * (x + w);
    }
  const int32_t* table = s.table + ((int64_t)n * s.table_heads + (s.table_heads == 1 ? 0 : h)) * s.max_pages;
  const int len = s.seqlens[n * s.seqlen_heads + (s.seqlen_heads == 1 ? 0 : h)];
  const int used = (len + s.page_size - 1) / s.page_size, head = s.bound_heads == 1 ? 0 : h;
  float* scores = s.scores + ((int64_t)n * s.H + h) * s.max_pages;
  const int64_t bytes = (int64_t)2 * bound_columns(s.bounds_type, D) * (s.bounds_type == kFp32 ? 4 : s.bounds_type == kInt8 ? 1 : 2);
  for (int c = 0; c < used; ++c) {
    if (c + kAhead < used) {  // pages lie apart: the hardware does not see them coming
      const char* next = static_cast<const char*>(s.bounds) + ((int64_t)table[c + kAhead] * s.bound_heads + head) * bytes;
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(next + line);
    }
    load_bounds(s.bounds, s.bounds_type, (int64_t)table[c] * s.bound_heads + head, D, edge.data());
    float top = -kMax;
    int g = 0;
    for (; g + 4 <= s.G; g += 4) top = std::max(top, top_dot<4>(&split[(size_t)2 * D * g], edge.data(), 2 * D));
    for (; g < s.G; ++g) top = std::max(top, top_dot<1>(&split[(size_t)2 * D * g], edge.data(), 2 * D));
    scores[c] = top;
  }
  std::fill(scores + used, scores + s.max_pages, -std::numeric_limits<float>::infinity());
}

}  // namespace pikv
