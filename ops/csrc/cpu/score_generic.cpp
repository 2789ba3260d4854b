// Page scores in plain C++, compiled once per instruction set with PK_SCORE as its name.
//
// max(q lo, q hi) = min(q, 0) lo + max(q, 0) hi, so with the query split into [min(q, 0) | max(q, 0)] a page costs one dot product with its
// bounds [lo | hi] as they lie in memory.
#include "score.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "numbers.h"

namespace pikv {
namespace {

constexpr float kMax = std::numeric_limits<float>::max();

// An fp16 bound may be infinite, and 0 * inf would be NaN.
inline float finite(float x) { return std::min(std::max(x, -kMax), kMax); }

void load_bounds(const void* bounds, int type, int64_t at, int count, float* x) {
  if (type == 0) {
    const float* p = static_cast<const float*>(bounds) + at;
    for (int i = 0; i < count; ++i) x[i] = finite(p[i]);
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(bounds) + at;
  if (type == 1)
    for (int i = 0; i < count; ++i) x[i] = finite(bf16_to_float(p[i]));
  else
    for (int i = 0; i < count; ++i) x[i] = finite(half_to_float(p[i]));
}

inline float dot(const float* a, const float* b, int count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
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
      split[(size_t)2 * D * g + d] = std::min(x, 0.0f), split[(size_t)2 * D * g + D + d] = std::max(x, 0.0f);
    }
  const int32_t* table = s.table + ((int64_t)n * s.table_heads + (s.table_heads == 1 ? 0 : h)) * s.max_pages;
  const int len = s.seqlens[n * s.seqlen_heads + (s.seqlen_heads == 1 ? 0 : h)];
  const int used = (len + s.page_size - 1) / s.page_size, head = s.bound_heads == 1 ? 0 : h;
  float* scores = s.scores + ((int64_t)n * s.H + h) * s.max_pages;
  for (int c = 0; c < used; ++c) {
    load_bounds(s.bounds, s.bounds_type, ((int64_t)table[c] * s.bound_heads + head) * 2 * D, 2 * D, edge.data());
    float top = -kMax;
    for (int g = 0; g < s.G; ++g) top = std::max(top, dot(&split[(size_t)2 * D * g], edge.data(), 2 * D));
    scores[c] = top;
  }
  std::fill(scores + used, scores + s.max_pages, -std::numeric_limits<float>::infinity());
}

}  // namespace pikv
