// Scores and weighted values of a phase of 32 or 64 tokens for bf16 and fp8 by AMX: 4 rows of the query.
#include "phase_amx.h"
#include "phase_floats.h"

namespace pikv::phases {
namespace {

template <int F>
void scores(const Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  constexpr int registers = key_registers(F);
  const Fp8Tables tables;
  const int halves_of = phase.count / 32;
  Ahead next = ahead;
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int b = 0; b < w.k_blocks; ++b) {
    const uint8_t* k = phase.k + 64 * b;
    int64_t stride = phase.k_stride;
    if (F == kFp8) {
      for (int t = 0; t < phase.count; ++t) {
        __m512i x[registers];
        key_row<F>(tables, k + t * stride, x);
        if (t % 4 == 0) read_ahead(next, lines);
#pragma GCC unroll 2
        for (int j = 0; j < registers; ++j) _mm512_store_si512(w.codes + (j * kTokens + t) * 64, x[j]);
      }
    } else {
      for (int i = 0; i < phase.count / 4 / 4; ++i) read_ahead(next, lines);
    }
    for (int j = 0; j < registers; ++j) {
      if (F == kFp8) k = w.codes + j * kTokens * 64, stride = 64;
      _tile_loadd(6, rows.q_bf16 + 512 * (b * registers + j), 64);
      _tile_loadd(4, k, stride); _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, k + 16 * stride, stride); _tile_dpbf16ps(1, 5, 6);
      if (halves_of == 1) continue;
      _tile_loadd(4, k + 32 * stride, stride); _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, k + 48 * stride, stride); _tile_dpbf16ps(3, 5, 6);
    }
  }
  ahead = next;
  float* sums = reinterpret_cast<float*>(w.tile);  // [tokens][16]: 4 rows of each part of the query
  _tile_stored(0, sums, 64); _tile_stored(1, sums + kTileWords, 64);
  if (halves_of == 2) {
    _tile_stored(2, sums + 2 * kTileWords, 64);
    _tile_stored(3, sums + 3 * kTileWords, 64);
  }
  const __m512 scale = _mm512_set1_ps(w.scale);
  for (int i = 0; i < phase.count / 4; ++i, sums += 64) {
    const auto four = [&](int part) {
      const __m256 a = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_load_ps(sums + 4 * part)), _mm_load_ps(sums + 16 + 4 * part), 1);
      const __m256 b = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_load_ps(sums + 32 + 4 * part)), _mm_load_ps(sums + 48 + 4 * part), 1);
      return _mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1);
    };
    __m512 s = four(0);
    if (w.q_parts == 3) s = _mm512_add_ps(s, _mm512_add_ps(four(1), four(2)));
    s = _mm512_castsi512_ps(rows_first(_mm512_castps_si512(s)));
    _mm512_store_ps(w.s + 16 * i, _mm512_mul_ps(s, key_factor<F, false>(phase, scale, i)));
  }
}

// Weights of 32 tokens as the left operand: rows of hi, rows of lo.
inline void weight_tile(const uint8_t* from, uint8_t* to) {
  const __m512i x[4] = {_mm512_load_si512(from), _mm512_load_si512(from + 64), _mm512_load_si512(from + 128), _mm512_load_si512(from + 192)};
  __m512i at = _mm512_setr_epi64(0, 4, 8, 12, 0, 4, 8, 12);  // 4 tokens of row 0 of each register of scores
  for (int r = 0; r < 4; ++r, at = _mm512_add_epi64(at, _mm512_set1_epi64(1)))
    _mm512_store_si512(to + 64 * r, _mm512_shuffle_i64x2(_mm512_permutex2var_epi64(x[0], at, x[1]), _mm512_permutex2var_epi64(x[2], at, x[3]), 0x44));
}

template <int F>
void add(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  constexpr int registers = pair_registers(F);
  const Fp8Tables tables;
  const int halves_of = phase.count / 32;
  Ahead next = ahead;
  for (int h = 0; h < halves_of; ++h)
    weight_tile(w.w_hi + 256 * h, w.w_tile + 1024 * h), weight_tile(w.w_lo + 256 * h, w.w_tile + 1024 * h + 256);
  _tile_loadd(7, w.w_tile, 64);
  if (halves_of == 2) {
    _tile_loadd(6, w.w_tile + 1024, 64);
  }
  for (int b = 0; b < w.v_blocks; b += 4 / registers) {
    const uint8_t* v = phase.v + 64 * b;
    for (int p = 0; p < phase.count / 2; ++p, v += 2 * phase.v_stride) {  // [4 registers][count / 2 pairs][64]
      __m512i x[4];
      if (p % 2 == 0) read_ahead(next, lines);
#pragma GCC unroll 2
      for (int j = 0; j < 4; j += registers) value_pairs<F>(tables, v + 64 * (j / registers), phase.v_stride, x + j);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) _mm512_store_si512(w.codes + (j * 32 + p) * 64, x[j]);
    }
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int h = 0; h < halves_of; ++h) {
      const uint8_t* codes = w.codes + 1024 * h;
      if (h == 0) {
        _tile_loadd(4, codes, 64); _tile_dpbf16ps(0, 7, 4);
        _tile_loadd(5, codes + 2048, 64); _tile_dpbf16ps(1, 7, 5);
        _tile_loadd(4, codes + 4096, 64); _tile_dpbf16ps(2, 7, 4);
        _tile_loadd(5, codes + 6144, 64); _tile_dpbf16ps(3, 7, 5);
      } else {
        _tile_loadd(4, codes, 64); _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(5, codes + 2048, 64); _tile_dpbf16ps(1, 6, 5);
        _tile_loadd(4, codes + 4096, 64); _tile_dpbf16ps(2, 6, 4);
        _tile_loadd(5, codes + 6144, 64); _tile_dpbf16ps(3, 6, 5);
      }
    }
    float* sums = reinterpret_cast<float*>(w.tile);
    _tile_stored(0, sums, 64); _tile_stored(1, sums + kTileWords, 64); _tile_stored(2, sums + 2 * kTileWords, 64);
    _tile_stored(3, sums + 3 * kTileWords, 64);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const float* from = sums + c * kTileWords + 16 * r;
        float* acc = rows.acc + (size_t)r * w.sums + 16 * (b / (4 / registers) * 4 + c);
        _mm512_store_ps(acc, _mm512_add_ps(_mm512_load_ps(acc), _mm512_add_ps(_mm512_load_ps(from), _mm512_load_ps(from + 64))));
      }
  }
  ahead = next;
}

}  // namespace

decltype(KeyPhase::scores) amx_float_scores(int format) { return format == kFp8 ? scores<kFp8> : scores<kBf16>; }
decltype(ValuePhase::add) amx_float_add(int format) { return format == kFp8 ? add<kFp8> : add<kBf16>; }

}  // namespace pikv::phases
