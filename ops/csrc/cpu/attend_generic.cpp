// Attention of one unit in plain C++, for every format, width and group. Compiled once per instruction set with PK_ATTEND as its name;
// the loops are written for the vectoriser. The reference of the hand-written kernels, and their helper for the raw tail.
#include <algorithm>
#include <limits>
#include <vector>

#include "attend.h"
#include "rows.h"

namespace pikv {
namespace {

constexpr int kTile = 16;
constexpr float kInf = std::numeric_limits<float>::infinity();

// e^x for x <= 0, to about 2e-7 relative; -inf gives 0.
inline float exp_negative(float x) {
  const float y = std::max(x * 1.44269504f, -126.0f);
  const float n = (y + 12582912.0f) - 12582912.0f, f = y - n;  // 1.5 * 2^23: rounds to an integer, and vectorises everywhere
  float p = 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const float e = p * from_bits((uint32_t)((int)n + 127) << 23);
  return x < -87.0f ? 0.0f : e;
}

// e = exp(s - top) of a tile, and their sum.
inline float exponentials(const float* s, float top, float* e) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < kTile; ++i) sum += e[i] = exp_negative(s[i] - top);
  return sum;
}

inline float dot(const float* a, const float* b, int D) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int d = 0; d < D; ++d) sum += a[d] * b[d];
  return sum;
}

struct Tiles {
  std::vector<float> q, acc, m, l, k, v, scale, zero, page_m, page_l;
};

void values_of(const PageFormat& f, const uint8_t* head, int t0, int count, Tiles& w) {
  if (f.latent) {
    for (int i = 0; i < count; ++i) std::copy_n(&w.k[(size_t)i * f.k_dim], f.v_dim, &w.v[(size_t)i * f.v_dim]);
    return;
  }
  for (int t = t0; t < t0 + count; ++t)
    token_to_float(f.v_format, head + f.v + (int64_t)t * f.v_row_bytes, head + f.v_scale, head + f.v_zero, t, f.v_dim, &w.v[(size_t)(t - t0) * f.v_dim]);
}

// Adds `count` tokens, whose keys and values are in w.k and w.v, to every row that sees them.
void add_tile(const Attend& a, const Unit& u, const int32_t* positions, int count, Tiles& w) {
  const int M = a.rows(), Dk = a.f.k_dim, Dv = a.f.v_dim;
  const bool pages = a.page_lse && (!u.tail || a.blocks > 1);  // the tail of whole pages is added to theirs later
  float s[kTile], e[kTile];
  for (int row = 0; row < M; ++row) {
    float top = -kInf;
    const int asked = a.asked ? a.asked[(int64_t)(u.n / a.S) * a.T + row / a.G] : 0;
    for (int i = 0; i < count; ++i) {
      const bool hidden = (a.causal && positions[i] > asked) || (a.window && (int64_t)positions[i] <= (int64_t)asked - a.window);
      s[i] = hidden ? -kInf : dot(&w.q[(size_t)row * Dk], &w.k[(size_t)i * Dk], Dk);
      top = std::max(top, s[i]);
    }
    if (top == -kInf) continue;
    float* acc = &w.acc[(size_t)row * Dv];
    if (top > w.m[row]) {
      const float shrink = exp_negative(w.m[row] - top);
      w.l[row] *= shrink;
      for (int d = 0; d < Dv; ++d) acc[d] *= shrink;
      w.m[row] = top;
    }
    if (pages && top > w.page_m[row]) {
      w.page_l[row] *= exp_negative(w.page_m[row] - top);
      w.page_m[row] = top;
    }
    for (int i = count; i < kTile; ++i) s[i] = -kInf;
    if (pages) w.page_l[row] += exponentials(s, w.page_m[row], e);
    w.l[row] += exponentials(s, w.m[row], e);
    for (int i = 0; i < count; ++i) {
      if (s[i] == -kInf) continue;  // what is hidden is not touched: it may hold anything
      const float* v = &w.v[(size_t)i * Dv];
      for (int d = 0; d < Dv; ++d) acc[d] += e[i] * v[d];
    }
  }
}

void start_page(const Attend& a, Tiles& w) {
  w.page_m.assign(a.rows(), -kInf);
  w.page_l.assign(a.rows(), 0.0f);
}

void write_page_lse(const Attend& a, const Unit& u, int c, const Tiles& w) {
  for (int row = 0; row < a.rows(); ++row) a.page_lse_row(u.n, u.h, row)[c] = w.page_m[row] + std::log(w.page_l[row]);
}

void add_tail(const Attend& a, const Unit& u, Tiles& w) {
  const PageFormat& f = a.f;
  const int len = a.seqlen(u.n, u.h), first = len - len % f.group, head = f.num_kv_heads == 1 ? 0 : u.h;
  if (first == len) return;
  const int32_t* list = a.list_of(u.n, u.h);
  const int column = first / f.page_size;
  const uint8_t* record = a.pages + (int64_t)a.table_of(u.n, u.h)[column] * f.record_bytes;
  const int32_t* positions = reinterpret_cast<const int32_t*>(record + f.positions);
  const int64_t row = a.tail_rows[a.pick(a.tail_heads, u.n, u.h)];
  const int64_t base = (row * f.num_kv_heads + head) * f.group * f.k_dim;
  const auto add = [&](int begin, int end) {
    for (int t = begin; t < end; t += kTile) {
      const int count = std::min(kTile, end - t), slot = t % f.page_size;
      const int64_t from = base + (int64_t)(t - first) * f.k_dim;
      for (int64_t i = 0; i < (int64_t)count * f.k_dim; ++i) w.k[i] = load_float(a.tail, a.tail_type, from + i);
      values_of(f, a.section(record, u.h), slot, count, w);
      add_tile(a, u, positions + slot, count, w);
    }
  };
  if (a.blocks == 1) return add(first, len);
  for (int c = 0; c < a.num_columns; ++c) {  // a block lies in the tail, or in the codes, with all of its tokens
    const Piece piece = a.piece(list, c, len);
    const int begin = piece.column * f.page_size + piece.first;
    if (piece.count <= 0 || begin < first) continue;
    start_page(a, w);
    add(begin, begin + piece.count);
    if (a.page_lse) write_page_lse(a, u, c, w);
  }
}

}  // namespace

void PK_ATTEND(const Attend& a, const Unit& u) {
  static thread_local Tiles w;
  const PageFormat& f = a.f;
  const int M = a.rows(), Dk = f.k_dim, Dv = f.v_dim;
  w.q.resize((size_t)M * Dk);
  for (int row = 0; row < M; ++row) {
    const int64_t at = a.q_row(u.n, u.h, row) * Dk;
    for (int d = 0; d < Dk; ++d) w.q[(size_t)row * Dk + d] = load_float(a.q, a.q_type, at + d) * a.scale;
  }
  w.acc.assign((size_t)M * Dv, 0.0f);
  w.m.assign(M, -kInf);
  w.l.assign(M, 0.0f);
  w.k.resize((size_t)kTile * Dk), w.v.resize((size_t)kTile * Dv);
  w.scale.resize(Dk), w.zero.resize(Dk);
  const int32_t* table = a.table_of(u.n, u.h);
  const int32_t* list = a.list_of(u.n, u.h);
  const int limit = a.paged(u.n, u.h);
  for (int c = u.c0; !u.tail && c < u.c1; ++c) {
    const Piece piece = a.piece(list, c, limit);
    if (piece.count <= 0) continue;  // its lse is -inf already
    start_page(a, w);
    const uint8_t* record = a.pages + (int64_t)table[piece.column] * f.record_bytes;
    const int32_t* positions = reinterpret_cast<const int32_t*>(record + f.positions);
    const uint8_t* head = a.section(record, u.h);
    for (int t = piece.first; t < piece.first + piece.count; t += kTile) {
      const int n = std::min(kTile, piece.first + piece.count - t);
      keys_to_float(f, head, t, n, w.k.data(), w.scale.data(), w.zero.data());
      values_of(f, head, t, n, w);
      add_tile(a, u, positions + t, n, w);
    }
    if (a.page_lse) write_page_lse(a, u, c, w);
  }
  if (u.tail) add_tail(a, u, w);
  for (int row = 0; row < M; ++row) {
    const float inverse = w.l[row] > 0 ? 1 / w.l[row] : 0.0f;
    for (int d = 0; d < Dv; ++d) u.out[(int64_t)row * Dv + d] = w.acc[(size_t)row * Dv + d] * inverse;
    u.lse[row] = w.l[row] > 0 ? w.m[row] + std::log(w.l[row]) : -kInf;
  }
}

}  // namespace pikv
