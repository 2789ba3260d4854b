// What the attention of a unit in phases keeps on its thread: room, and the rows of the query with their sums. For attend_phases.cpp.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "arena.h"
#include "numbers.h"
#include "phases.h"

namespace pikv::phases {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504f;

inline uint64_t first_bits(int count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

// A type of the including file alone: members of a vector of any other could be shared with files for older processors.
struct OwnRows : Rows {};

// Where columns lie: of the query for a format of keys, of the sums for one of values. Kept, as it takes as long as some pages.
struct Order {
  Tier tier = Tier::kVnni;
  int format = -1, dim = 0;
  std::vector<int> at;
  void query(Tier tier, const PageFormat& f, int width) {
    if (stays(tier, f.format, f.k_dim)) return;
    at.resize(width);
    for (int e = 0; e < width; ++e) at[e] = query_of(tier, f.format, f.k_dim, e);
  }
  void sums(Tier tier, const PageFormat& f) {
    if (stays(tier, f.v_format, f.v_dim)) return;
    at.resize(f.v_dim);
    for (int d = 0; d < f.v_dim; ++d) at[d] = sum_of(tier, f.v_format, f.v_dim, d);
  }

 private:
  bool stays(Tier own_tier, int own_format, int own_dim) {
    const bool same = tier == own_tier && format == own_format && dim == own_dim;
    tier = own_tier, format = own_format, dim = own_dim;
    return same;
  }
};

struct Scratch {
  Arena arena;
  Work w;
  std::vector<OwnRows> rows;
  Order query, sums;
  float* row;  // [k_dim or more] a row of the query in its own order, the rest zeros
};

inline void load_row(const Attend& a, const Unit& u, int row, float scale, float* to) {
  const int64_t at = a.q_row(u.n, u.h, row) * a.f.k_dim;
  if (a.q_type == kBf16) {
    const uint16_t* q = static_cast<const uint16_t*>(a.q) + at;
    for (int d = 0; d < a.f.k_dim; ++d) to[d] = bf16_to_float(q[d]) * scale;
  } else {
    for (int d = 0; d < a.f.k_dim; ++d) to[d] = load_float(a.q, a.q_type, at + d) * scale;
  }
}

// The query of float keys as the sum of q_parts bf16, in the order of the keys.
inline void split_query(const Attend& a, const Unit& u, Rows& rows, const Scratch& own, bool tiles) {
  const Work& w = own.w;
  std::memset(rows.q_bf16, 0, (size_t)w.q_width * (tiles ? 32 : 8 * w.q_parts));
  for (int r = 0; r < rows.count; ++r) {
    load_row(a, u, rows.first + r, 1.0f, own.row);
    for (int e = 0; e < w.q_width; ++e) {
      float x = own.row[own.query.at[e]];
      for (int part = 0; part < w.q_parts; ++part) {
        const uint16_t h = float_to_bf16(x);
        x -= bf16_to_float(h);
        const int step = e / 32, in = e % 32;
        if (tiles) rows.q_bf16[(step * 16 + in / 2) * 32 + (4 * part + r) * 2 + in % 2] = h;
        else rows.q_bf16[((part * (w.q_width / 32) + step) * 4 + r) * 32 + in] = h;
      }
    }
  }
}

// Room for all, and rows with nothing summed yet.
inline void prepare(const Attend& a, const Unit& u, Tier tier, Scratch& own) {
  Work& w = own.w;
  const bool amx = tier == Tier::kAmx, float_keys = !by_codes(tier, a.f.format);
  const bool only_fours = !format_grouped(a.f.format) || !format_grouped(a.f.v_format);
  const PageFormat& f = a.f;
  w.q_width = row_columns(tier, f.format, f.k_dim), w.sums = row_columns(tier, f.v_format, f.v_dim);
  w.k_blocks = row_blocks(f.format, f.k_dim), w.v_blocks = row_blocks(f.v_format, f.v_dim);
  w.k_last = first_bits(f.k_row_bytes - 64 * (w.k_blocks - 1)), w.v_last = first_bits(f.v_row_bytes - 64 * (w.v_blocks - 1));
  w.k_dim = f.k_dim, w.v_dim = f.v_dim;
  w.q_parts = a.q_type == kBf16 ? 1 : 3, w.scale = a.scale * kLog2e;
  const size_t chunks = (size_t)a.T * (a.G / 4 + 3), q_bf16 = float_keys ? (amx ? 32ull : 8ull * w.q_parts) * w.q_width : 0;
  // As operands of tiles a column of keys or values takes 1 byte of an integer format, 2 of floats.
  const size_t k_codes = amx ? (float_keys ? 2ull : 1ull) * w.q_width * kTokens : 0;
  const size_t v_codes = amx ? (format_grouped(f.v_format) ? 1ull : 2ull) * w.sums * kTokens : 0;
  const bool fp4_keys = f.format == kFp4 && !float_keys, fp4_values = f.v_format == kFp4 && !amx;
  const size_t q_codes = fp4_keys ? fp4_query_bytes(w.k_blocks) : 0, weights = fp4_values ? fp4_weight_bytes(w.v_blocks) : 8 * kTokens;
  const size_t v_scales = fp4_values ? (size_t)kTokens * kFp4Block / 2 * w.v_blocks : 0;
  const size_t tiles = amx ? 4 * 1024 : 0, q_tiles = amx ? 16ull * w.q_width : 0;
  own.arena.start(chunks * (16ull * (w.q_width + w.sums) + q_bf16 + q_codes + 3 * 64) + 16ull * kTokens + 2 * weights +
                  4 * (v_scales + kTokens) + 32ull * w.q_width + kTokens * (size_t)f.v_row_bytes + k_codes + v_codes + 2 * tiles +
                  q_tiles + 20 * 64);
  w.s = own.arena.take<float>(4 * kTokens), w.w_hi = own.arena.take<uint8_t>(weights), w.w_lo = own.arena.take<uint8_t>(weights);
  w.v_scales = own.arena.take<float>(v_scales), w.v_tops = own.arena.take<float>(kTokens);
  w.k_codes = own.arena.take<uint8_t>(k_codes), w.v_codes = own.arena.take<uint8_t>(v_codes), w.tile = own.arena.take<int32_t>(tiles / 4);
  w.w_tile = own.arena.take<uint8_t>(tiles), w.q_tile = own.arena.take<uint8_t>(q_tiles);
  w.q_hi = own.arena.take<int8_t>(4 * (size_t)w.q_width), w.q_lo = own.arena.take<int8_t>(4 * (size_t)w.q_width);
  for (float** x : {&w.q_step, &w.q_bias, &w.w_step, &w.w_zero}) *x = own.arena.take<float>(16);
  w.product = own.arena.take<float>(4 * (size_t)w.q_width), w.ordered = own.arena.take<uint16_t>(2 * (size_t)w.q_width);
  w.ordered_of = nullptr, w.clean = own.arena.take<uint8_t>(kTokens * (size_t)f.v_row_bytes);
  own.row = own.arena.take<float>(w.q_width);
  std::memset(own.row, 0, 4ull * w.q_width);
  own.query.query(tier, f, w.q_width), own.sums.sums(tier, f);
  own.rows.clear();
  for (int t = 0; t < a.T; ++t)
    for (int g = 0; g < a.G;) {
      const int left = a.G - g, size = only_fours || left >= 4 ? 2 : left >= 2 ? 1 : 0, R = 1 << size;
      Rows rows = {};
      rows.q = own.arena.take<float>((size_t)R * w.q_width), rows.acc = own.arena.take<float>((size_t)R * w.sums);
      rows.m = own.arena.take<float>(16), rows.l = own.arena.take<float>(16), rows.page_l = own.arena.take<float>(16);
      rows.first = t * a.G + g, rows.t = t, rows.size = size, rows.count = std::min(R, left);
      std::memset(rows.acc, 0, 4ull * R * w.sums);
      for (int i = 0; i < 16; ++i) rows.m[i] = -kInf, rows.l[i] = rows.page_l[i] = 0;
      if (float_keys) {
        rows.q_bf16 = own.arena.take<uint16_t>(q_bf16 / 2);
        split_query(a, u, rows, own, amx);
      } else if (rows.count < R) std::memset(rows.q, 0, 4ull * R * w.q_width);
      for (int r = 0; r < rows.count && !float_keys; ++r) {
        load_row(a, u, rows.first + r, a.scale * kLog2e, own.row);
        for (int e = 0; e < w.q_width; ++e) rows.q[(size_t)r * w.q_width + e] = own.row[own.query.at[e]];
      }
      if (fp4_keys) {
        rows.q_codes = own.arena.take<uint8_t>(q_codes);
        key_phase(tier, f.format, f.k_dim, a.fast, size).start_query(rows, w);
      }
      own.rows.push_back(OwnRows{rows});
      g += R;
    }
}

}  // namespace
}  // namespace pikv::phases
