// Scores and weighted values of a phase of 64 tokens for integer formats by AMX: 4 rows of the query, hi and lo beside each other.
//
// Keys are the left operand as they are stored, 16 tokens of 64 bytes to a tile, so no sum across lanes is taken. Values become quads of
// tokens as for VNNI, in memory, and are the right operand of the weights. The arithmetic is that of phase_int_keys.cpp and
// phase_int_values.cpp: integers, so the sums are the same bit for bit.
#include "phase_amx.h"
#include "phase_codes.h"

namespace pikv::phases {
namespace {

// 64 bytes of 4 rows, hi and lo, as the right operand: row i has bytes [4 i, 4 i + 4) of hi 0 to 3, lo 0 to 3.
inline void query_tile(const int8_t* hi, const int8_t* lo, int64_t stride, uint8_t* to) {
  const int8_t* from[2] = {hi, lo};
  for (int part = 0; part < 2; ++part) {
    const __m512i q0 = _mm512_load_si512(from[part]), q1 = _mm512_load_si512(from[part] + stride);
    const __m512i q2 = _mm512_load_si512(from[part] + 2 * stride), q3 = _mm512_load_si512(from[part] + 3 * stride);
    const __m512i a = _mm512_unpacklo_epi32(q0, q1), b = _mm512_unpackhi_epi32(q0, q1);
    const __m512i c = _mm512_unpacklo_epi32(q2, q3), d = _mm512_unpackhi_epi32(q2, q3);
    const __m512i x[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)};
    uint8_t* at = to + 16 * part;  // x[e], lane i: row 4 i + e
    for (int e = 0; e < 4; ++e) {
      _mm_store_si128((__m128i*)(at + 64 * e), _mm512_castsi512_si128(x[e]));
      _mm_store_si128((__m128i*)(at + 64 * (4 + e)), _mm512_extracti32x4_epi32(x[e], 1));
      _mm_store_si128((__m128i*)(at + 64 * (8 + e)), _mm512_extracti32x4_epi32(x[e], 2));
      _mm_store_si128((__m128i*)(at + 64 * (12 + e)), _mm512_extracti32x4_epi32(x[e], 3));
    }
  }
}

// Codes of keys as bytes: [block][part][64 tokens][64]. int8 is that already.
template <int F, bool FOLD>
void unpack_keys(const Phase& phase, Work& w, Ahead& ahead, int lines) {
  constexpr int parts = parts_of(F, FOLD);
  Ahead next = ahead;
  uint8_t* to = w.k_codes;
  for (int b = 0; b < w.k_blocks; ++b, to += parts * kTokens * 64) {
    const __mmask64 there = b + 1 < w.k_blocks ? ~0ull : w.k_last;
    const uint8_t* k = phase.k + 64 * b;
    for (int t = 0; t < kTokens; ++t) {
      const __m512i codes = load_codes<FOLD>(k + t * phase.k_stride, there);
      if (t % 4 == 0) read_ahead(next, lines);
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) _mm512_store_si512(to + (p * kTokens + t) * 64, part_of<F>(codes, p));
    }
  }
  ahead = next;
}

template <int F, bool FOLD>
void scores(const Rows&, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  constexpr int parts = parts_of(F, FOLD);
  const int blocks = w.k_blocks * parts;
  for (int b = 0; b < blocks; ++b) query_tile(w.q_hi + 64 * b, w.q_lo + 64 * b, w.q_width, w.q_tile + 1024 * b);
  Ahead next = ahead;
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int b = 0; b < blocks; ++b) {
    const uint8_t* k = F == kInt8 ? phase.k + 64 * b : w.k_codes + b * kTokens * 64;
    const int64_t stride = F == kInt8 ? phase.k_stride : 64;
    _tile_loadd(6, w.q_tile + 1024 * b, 64);
    _tile_loadd(4, k, stride); _tile_dpbusd(0, 4, 6);
    _tile_loadd(5, k + 16 * stride, stride); _tile_dpbusd(1, 5, 6);
    _tile_loadd(4, k + 32 * stride, stride); _tile_dpbusd(2, 4, 6);
    _tile_loadd(5, k + 48 * stride, stride); _tile_dpbusd(3, 5, 6);
  }
  int32_t* sums = w.tile;  // [64 tokens][16]: hi of 4 rows, lo of 4 rows
  _tile_stored(0, sums, 64); _tile_stored(1, sums + kTileWords, 64); _tile_stored(2, sums + 2 * kTileWords, 64);
  _tile_stored(3, sums + 3 * kTileWords, 64);
  const __m512 step = _mm512_load_ps(w.q_step), bias = _mm512_load_ps(w.q_bias);
#pragma GCC unroll 2
  for (int i = 0; i < kTokens / 4; ++i, sums += 64) {
    read_ahead(next, lines);
    const auto pair = [&](int t) {
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_load_si256((const __m256i*)(sums + 16 * t))),
                                _mm256_load_si256((const __m256i*)(sums + 16 * t + 16)), 1);
    };
    const __m512i a = pair(0), b = pair(2);
    const __m512i hi = _mm512_shuffle_i32x4(a, b, 0x88), lo = _mm512_shuffle_i32x4(a, b, 0xdd);
    const __m512i sum = rows_first(_mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo));
    _mm512_store_ps(w.s + 16 * i, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), step, bias));
  }
  ahead = next;
}

// Values as quads of tokens: [block][register][16 quads][64].
template <int F, bool FOLD>
void unpack_values(const Phase& phase, Work& w, Ahead& ahead, int lines) {
  constexpr int registers = 4 * parts_of(F, FOLD);
  Ahead next = ahead;
  uint8_t* to = w.v_codes;
  for (int b = 0; b < w.v_blocks; ++b, to += registers * 1024) {
    const __mmask64 there = b + 1 < w.v_blocks ? ~0ull : w.v_last;
    const uint8_t* v = phase.v + 64 * b;
    for (int i = 0; i < kTokens / 4; ++i, v += 4 * phase.v_stride) {
      __m512i x[registers];
      read_ahead(next, lines);
      quads<F, FOLD, registers, false>(v, phase.v_stride, there, 0, x);
#pragma GCC unroll 16
      for (int j = 0; j < registers; ++j) _mm512_store_si512(to + (j * 16 + i) * 64, x[j]);
    }
  }
  ahead = next;
}

template <int F, bool FOLD>
void add(Rows& rows, const Phase&, Work& w, Ahead&, int) {
  constexpr int registers = 4 * parts_of(F, FOLD);
  by_query_row(w.w_hi, w.w_tile, 64), by_query_row(w.w_lo, w.w_tile + 256, 64);
  _tile_loadd(7, w.w_tile, 64);
  for (int b = 0; b < w.v_blocks; ++b) {
    for (int j = 0; j < registers; j += 4) {
      const uint8_t* codes = w.v_codes + (registers * b + j) * 1024;
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
      _tile_loadd(4, codes, 64); _tile_dpbsud(0, 7, 4);
      _tile_loadd(5, codes + 1024, 64); _tile_dpbsud(1, 7, 5);
      _tile_loadd(4, codes + 2048, 64); _tile_dpbsud(2, 7, 4);
      _tile_loadd(5, codes + 3072, 64); _tile_dpbsud(3, 7, 5);
      _tile_stored(0, w.tile, 64); _tile_stored(1, w.tile + kTileWords, 64); _tile_stored(2, w.tile + 2 * kTileWords, 64);
      _tile_stored(3, w.tile + 3 * kTileWords, 64);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          const int32_t* sums = w.tile + c * kTileWords + 16 * r;
          const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(sums), 8), _mm512_load_si512(sums + 64));
          float* acc = rows.acc + (size_t)r * w.sums + 16 * (registers * b + j + c);
          const __m512 before = _mm512_add_ps(_mm512_load_ps(acc), lane_of_row(w.w_zero, 4, r));
          _mm512_store_ps(acc, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), lane_of_row(w.w_step, 4, r), before));
        }
    }
  }
}

template <int F, bool FOLD>
void keys(KeyPhase& key) {
  key.unpack = F == kInt8 ? nullptr : unpack_keys<F, FOLD>, key.scores = scores<F, FOLD>;
}

template <int F, bool FOLD>
void values(ValuePhase& value) {
  value.unpack = unpack_values<F, FOLD>, value.add = add<F, FOLD>;
}

}  // namespace

void amx_int_keys(int format, bool fold, KeyPhase& key) {
  if (format == kInt8) keys<kInt8, false>(key);
  else if (format == kInt4) (fold ? keys<kInt4, true> : keys<kInt4, false>)(key);
  else (fold ? keys<kInt2, true> : keys<kInt2, false>)(key);
}

void amx_int_values(int format, bool fold, ValuePhase& value) {
  if (format == kInt8) values<kInt8, false>(value);
  else if (format == kInt4) (fold ? values<kInt4, true> : values<kInt4, false>)(value);
  else (fold ? values<kInt2, true> : values<kInt2, false>)(value);
}

void amx_start() {
  static constexpr TileShape shape;
  _tile_loadconfig(&shape);
}

void amx_end() { _tile_release(); }

}  // namespace pikv::phases
