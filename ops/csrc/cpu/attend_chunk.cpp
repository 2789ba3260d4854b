// Attention of one unit with many rows of the query, as matrix products with AVX512: up to 256 tokens that some row sees are packed as
// operands once, then 24 rows at a time meet them: all scores, one softmax, all values. Scores and sums are f32.
//
// Numbers are bf16 where the query is and a format is exact in it (bf16, fp8, fp4: what a whole row is multiplied by goes to the scores or
// the weights) and the processor is fast at that; else f32, decoded. What no row sees is not packed and may hold anything; what some rows
// see has weight 0 for the others, unless it holds an infinity or NaN: then `attend_vnni` does the unit, which never touches what is hidden.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "arena.h"
#include "attend.h"
#include "avx512.h"
#include "chunk.h"
#include "rows.h"

namespace pikv {
namespace {

using namespace chunks;

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

bool exact_in_bf16(int format) { return format == kBf16 || format == kFp8 || format == kFp4; }

struct Packer {
  Keys keys;
  Values values;
  bool bf16_keys, bf16_values, factors;
  int k_steps, v_steps;           // dwords of a row that waits
  uint32_t *k_rows, *v_rows, *k, *v, *q;
  float *k_factor, *v_factor, *s, *m, *l, *floats, *scale, *zero;
  int32_t* positions;
  int count;
  float base_scale;
};

void prepare(const Attend& a, const Unit& u, bool bf16, Packer& p) {
  static thread_local Arena arena;
  const PageFormat& f = a.f;
  p.bf16_keys = bf16 && a.q_type == kBf16 && exact_in_bf16(f.format) && f.rope < 0;
  p.bf16_values = bf16 && exact_in_bf16(f.v_format) && (f.latent ? p.bf16_keys : true);
  p.keys = p.bf16_keys ? kBf16Keys : kFloatKeys, p.values = p.bf16_values ? kBf16Values : kFloatValues;
  p.k_steps = (f.k_dim + 16 * p.keys.per_dword - 1) / (16 * p.keys.per_dword) * 16;
  p.v_steps = f.v_dim / p.values.per_dword;
  p.factors = p.bf16_values && f.v_format != kBf16, p.base_scale = a.scale * kLog2e;
  const size_t M = a.rows(), k = (size_t)kTokens * p.k_steps, v = (size_t)kTokens * p.v_steps;
  arena.start(4 * (2 * k + 2 * v + (size_t)kRows * (p.k_steps + kTokens) + 2 * M + 3 * kTokens + 16ull * (f.k_dim + f.v_dim) + 2 * f.k_dim) + 16 * 64);
  p.k_rows = arena.take<uint32_t>(k), p.k = arena.take<uint32_t>(k), p.v_rows = arena.take<uint32_t>(v), p.v = arena.take<uint32_t>(v);
  p.q = arena.take<uint32_t>((size_t)kRows * p.k_steps), p.s = arena.take<float>((size_t)kRows * kTokens);
  p.m = arena.take<float>(M), p.l = arena.take<float>(M);
  p.k_factor = arena.take<float>(kTokens), p.v_factor = arena.take<float>(kTokens), p.positions = arena.take<int32_t>(kTokens);
  p.floats = arena.take<float>(16ull * (f.k_dim + f.v_dim)), p.scale = arena.take<float>(f.k_dim), p.zero = arena.take<float>(f.k_dim);
  p.count = 0;
  std::fill(p.m, p.m + M, kNone), std::fill(p.l, p.l + M, 0.0f);
  std::memset(u.out, 0, 4 * M * f.v_dim);
}

// Row t as bf16 without what the whole row is multiplied by, which is returned.
float bf16_row(int format, const uint8_t* row, const uint8_t* scales, const uint8_t* zeros, int t, int D, float* x, uint16_t* to) {
  if (format == kBf16) {
    std::memcpy(to, row, 2 * D);
    return 1;
  }
  row_to_float(format, row, D, x);
  if (format == kFp4)
    for (int d = 0; d < D; d += kFp4Block) {
      const float scale = fp8_to_float(scales[t * fp4_blocks(D) + d / kFp4Block]);
      for (int e = d; e < std::min(D, d + kFp4Block); ++e) x[e] *= scale;
    }
  for (int d = 0; d < D; ++d) to[d] = (uint16_t)(to_bits(x[d]) >> 16);
  return format == kFp4 ? power_of_two(zeros[t]) : half_to_float(reinterpret_cast<const uint16_t*>(scales)[t]);
}

// Up to 16 tokens of a page, from slot t0.
void take_tokens(const PageFormat& f, const uint8_t* head, const int32_t* positions, int t0, int count, Packer& p) {
  float *keys = p.floats, *values = keys + 16 * f.k_dim;
  if (!p.bf16_keys) keys_to_float(f, head, t0, count, keys, p.scale, p.zero);
  for (int i = 0; i < count; ++i) {
    const int t = t0 + i, at = p.count + i;
    uint32_t *k = p.k_rows + (int64_t)at * p.k_steps, *v = p.v_rows + (int64_t)at * p.v_steps;
    const uint8_t* k_row = head + f.k + (int64_t)t * f.k_row_bytes;
    float factor = 1;
    if (p.bf16_keys) factor = bf16_row(f.format, k_row, head + f.k_scale, head + f.k_zero, t, f.k_dim, keys, reinterpret_cast<uint16_t*>(k));
    else std::memcpy(k, keys + i * f.k_dim, 4 * f.k_dim);
    std::memset(reinterpret_cast<uint8_t*>(k) + 4 / p.keys.per_dword * f.k_dim, 0, 4 * p.k_steps - 4 / p.keys.per_dword * f.k_dim);
    p.k_factor[at] = factor * p.base_scale, p.positions[at] = positions[t], p.v_factor[at] = factor;
    if (f.latent) {
      std::memcpy(v, k, 4 * p.v_steps);  // of the same type
      continue;
    }
    const uint8_t* v_row = head + f.v + (int64_t)t * f.v_row_bytes;
    if (p.bf16_values)
      p.v_factor[at] = bf16_row(f.v_format, v_row, head + f.v_scale, head + f.v_zero, t, f.v_dim, values, reinterpret_cast<uint16_t*>(v));
    else token_to_float(f.v_format, v_row, head + f.v_scale, head + f.v_zero, t, f.v_dim, reinterpret_cast<float*>(v));
  }
  p.count += count;
}

bool finite_values(const Packer& p) {
  const __m512i mask = p.bf16_values ? _mm512_set1_epi16(0x7f80) : _mm512_set1_epi32(0x7f800000);
  for (int64_t i = 0; i < (int64_t)p.count * p.v_steps; i += 8) {  // rows are 8 dwords or a multiple
    const __m512i x = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(p.v_rows + i)));
    const __m512i bits = _mm512_and_si512(x, mask);
    if (p.bf16_values ? (_mm512_cmpeq_epi16_mask(bits, mask) & 0xffff) != 0 : (_mm512_cmpeq_epi32_mask(bits, mask) & 0xff) != 0) return false;
  }
  if (p.factors)
    for (int i = 0; i < p.count; ++i)
      if (!(std::fabs(p.v_factor[i]) <= std::numeric_limits<float>::max())) return false;
  return true;
}

// Bits of the tokens that query token t sees. True if it is all of them.
bool see(const Attend& a, const Unit& u, int t, const Packer& p, uint64_t* visible) {
  const int asked = a.hides() ? a.asked[(int64_t)(u.n / a.S) * a.T + t] : 0;
  const __m512i oldest = _mm512_set1_epi32(a.window ? (int)std::max<int64_t>((int64_t)asked - a.window, INT32_MIN) : INT32_MIN);
  bool all = true;
  for (int i = 0; i < kTokens; i += 16) {
    const int left = std::clamp(p.count - i, 0, 16);
    const __mmask16 there = (__mmask16)((1u << left) - 1);
    __mmask16 seen = there;
    if (a.hides() && there) {
      const __m512i x = _mm512_maskz_loadu_epi32(there, p.positions + i);
      if (a.window) seen &= _mm512_cmpgt_epi32_mask(x, oldest);
      if (a.causal) seen &= _mm512_cmple_epi32_mask(x, _mm512_set1_epi32(asked));
    }
    all &= seen == there;
    if (i % 64 == 0) visible[i / 64] = 0;
    visible[i / 64] |= (uint64_t)seen << i % 64;
  }
  return all;
}

void load_queries(const Attend& a, const Unit& u, int first, int rows, const Packer& p) {
  for (int r = 0; r < rows; ++r) {
    const int64_t at = a.q_row(u.n, u.h, first + r) * a.f.k_dim;
    uint32_t* to = p.q + (int64_t)r * p.k_steps;
    if (p.bf16_keys) {
      std::memcpy(to, static_cast<const uint16_t*>(a.q) + at, 2 * a.f.k_dim);
      std::memset(reinterpret_cast<uint16_t*>(to) + a.f.k_dim, 0, 2 * (2 * p.k_steps - a.f.k_dim));
    } else {
      float* x = reinterpret_cast<float*>(to);
      for (int d = 0; d < p.k_steps; ++d) x[d] = d < a.f.k_dim ? load_float(a.q, a.q_type, at + d) : 0.0f;
    }
  }
}

// All rows meet the tokens that wait. False: not done, something hidden from some rows is no number.
bool meet(const Attend& a, const Unit& u, Packer& p) {
  if (!p.count) return true;
  if (a.hides() && !finite_values(p)) return false;
  const int panels = (p.count + kPanel - 1) / kPanel, filled = panels * kPanel, v_dim = a.f.v_dim;
  std::memset(p.k_rows + (int64_t)p.count * p.k_steps, 0, 4ll * (filled - p.count) * p.k_steps);
  std::memset(p.v_rows + (int64_t)p.count * p.v_steps, 0, 4ll * (filled - p.count) * p.v_steps);
  std::fill(p.k_factor + p.count, p.k_factor + filled, 0.0f), std::fill(p.v_factor + p.count, p.v_factor + filled, 0.0f);
  p.keys.pack(p.k_rows, filled, p.k_steps, p.k);
  if (p.values.pack) p.values.pack(p.v_rows, filled, v_dim, p.v);
  const Block block = {p.k, p.values.pack ? p.v : p.v_rows, p.k_factor, p.factors ? p.v_factor : nullptr, p.count, panels};
  uint64_t visible[kTokens / 64];
  bool all = see(a, u, 0, p, visible);
  int t = a.hides() ? -1 : 0;
  for (int first = 0; first < a.rows(); first += kRows) {
    const int rows = std::min(kRows, a.rows() - first);
    float* out = u.out + (int64_t)first * v_dim;
    load_queries(a, u, first, rows, p);
    p.keys.scores(p.q, rows, p.k_steps, block, p.s);
    for (int r = 0; r < rows; ++r) {
      if (a.hides() && (first + r) / a.G != t) t = (first + r) / a.G, all = see(a, u, t, p, visible);
      p.values.soften(p.s + (int64_t)r * kTokens, all && p.count == filled ? nullptr : visible, block, p.m[first + r], p.l[first + r],
                      out + (int64_t)r * v_dim, v_dim);
    }
    p.values.add(p.s, rows, block, v_dim, out);
  }
  p.count = 0;
  return true;
}

void finish(const Attend& a, const Unit& u, const Packer& p) {
  for (int row = 0; row < a.rows(); ++row) {
    const float l = p.l[row], inverse = l > 0 ? 1 / l : 0.0f;
    float* out = u.out + (int64_t)row * a.f.v_dim;
    for (int d = 0; d < a.f.v_dim; ++d) out[d] *= inverse;
    u.lse[row] = l > 0 ? (p.m[row] + std::log2(l)) * kLn2 : kNone;
  }
}

// What some query token of the unit's request may see: positions in (after, last].
struct Seen {
  int64_t after = std::numeric_limits<int64_t>::min(), last = std::numeric_limits<int64_t>::max();
  Seen(const Attend& a, const Unit& u) {
    if (!a.hides()) return;
    const int32_t* asked = a.asked + (int64_t)(u.n / a.S) * a.T;
    const auto ends = std::minmax_element(asked, asked + a.T);
    if (a.window) after = (int64_t)*ends.first - a.window;
    if (a.causal) last = *ends.second;
  }
  bool operator()(int32_t position) const { return position > after && position <= last; }
};

void attend_chunk(const Attend& a, const Unit& u, bool bf16) {
  Packer p;
  prepare(a, u, bf16, p);
  const PageFormat& f = a.f;
  const int32_t *table = a.table_of(u.n, u.h), *list = a.list_of(u.n, u.h);
  const int limit = a.paged(u.n, u.h);
  const Seen seen(a, u);
  for (int c = u.c0; c < u.c1; ++c) {
    const int column = list ? list[c] : c, count = column < 0 ? 0 : std::min(f.page_size, limit - column * f.page_size);
    if (count <= 0) continue;
    const uint8_t *record = a.pages + (int64_t)table[column] * f.record_bytes, *head = a.section(record, u.h);
    const int32_t* positions = reinterpret_cast<const int32_t*>(record + f.positions);
    for (int t = 0; t < count;) {
      if (!seen(positions[t])) {
        ++t;
        continue;
      }
      const int room = std::min({16, count - t, kTokens - p.count});
      int run = 1;
      while (run < room && seen(positions[t + run])) ++run;
      take_tokens(f, head, positions, t, run, p);
      t += run;
      if (p.count == kTokens && !meet(a, u, p)) return attend_vnni(a, u);
    }
  }
  if (!meet(a, u, p)) return attend_vnni(a, u);
  finish(a, u, p);
}

}  // namespace

// Fewer rows are read faster in phases or tiles: what is packed must be used often enough. By measurement on Zen 4, in CPU time. Integers
// have byte dot products there, but latents, whose scales are by column.
bool chunk_serves(const Attend& a, bool bf16) {
  const PageFormat& f = a.f;
  if (a.page_lse || f.v_dim % 16 != 0 || f.k_dim % 2 != 0) return false;
  const bool integer = format_grouped(f.format) || (!f.latent && format_grouped(f.v_format));
  if (integer && !f.latent) return false;
  if (integer || f.rope >= 0) return a.rows() >= 128;
  const bool pairs = bf16 && a.q_type == kBf16 && exact_in_bf16(f.format), fp4 = f.format == kFp4 || (!f.latent && f.v_format == kFp4);
  if (fp4) return a.rows() >= (pairs ? 64 : 128);
  if (!pairs) return a.rows() >= 64;
  return a.rows() >= (f.latent ? 16 : f.format == kBf16 ? 96 : 48);
}
void attend_chunk_float(const Attend& a, const Unit& u) { attend_chunk(a, u, false); }
void attend_chunk_bf16(const Attend& a, const Unit& u) { attend_chunk(a, u, true); }

}  // namespace pikv
