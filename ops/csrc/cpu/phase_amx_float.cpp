// Scores and weighted values of a phase of 32 or 64 tokens for bf16, fp8 and fp4 by AMX: 4 rows of the query.
#include "phase_amx.h"
#include "phase_floats.h"

namespace pikv::phases {
namespace {

// 64 columns of each key as bf16: [2 registers][64 tokens][64]. bf16 is that already.
template <int F>
inline void unpack_key_columns(const Phase& phase, const Work& w, int unit, uint8_t* to, Ahead& next, int lines) {
  const Fp8Tables tables;
  const int blocks = w.q_width / kFp4Block;
  const uint8_t *k = phase.k + unit * unit_bytes(F), *scales = F == kFp4 ? phase.k_scale + 4 * unit : nullptr;
  for (int t = 0; t < phase.count; ++t, k += phase.k_stride) {
    __m512i x[2];
    key_columns<F>(tables, k, F == kFp4 ? scales + t * blocks : nullptr, x);
    if (t % 4 == 0) read_ahead(next, lines);
    _mm512_store_si512(to + t * 64, x[0]), _mm512_store_si512(to + (kTokens + t) * 64, x[1]);
  }
}

template <int F>
void unpack_keys(const Phase& phase, Work& w, Ahead& ahead, int lines) {
  Ahead next = ahead;
  for (int u = 0; u < w.q_width / 64; ++u) unpack_key_columns<F>(phase, w, u, w.k_codes + u * 2 * kTokens * 64, next, lines);
  ahead = next;
}

template <int F>
void scores(const Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  const int halves_of = phase.count / 32;
  Ahead next = ahead;
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int b = 0; b < w.q_width / 32; ++b) {
    const uint8_t* k = F == kBf16 ? phase.k + 64 * b : w.k_codes + (w.one_by_one ? b % 2 : b) * kTokens * 64;
    if (F != kBf16 && w.one_by_one && b % 2 == 0) unpack_key_columns<F>(phase, w, b / 2, w.k_codes, next, lines);
    const int64_t stride = F == kBf16 ? phase.k_stride : 64;
    _tile_loadd(6, rows.q_bf16 + 512 * b, 64);
    _tile_loadd(4, k, stride); _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, k + 16 * stride, stride); _tile_dpbf16ps(1, 5, 6);
    if (halves_of == 1) continue;
    _tile_loadd(4, k + 32 * stride, stride); _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, k + 48 * stride, stride); _tile_dpbf16ps(3, 5, 6);
  }
  float* sums = reinterpret_cast<float*>(w.tile);  // [tokens][16]: 4 rows of each part of the query
  _tile_stored(0, sums, 64); _tile_stored(1, sums + kTileWords, 64);
  if (halves_of == 2) {
    _tile_stored(2, sums + 2 * kTileWords, 64);
    _tile_stored(3, sums + 3 * kTileWords, 64);
  }
  const __m512 scale = _mm512_set1_ps(w.scale);
  for (int i = 0; i < phase.count / 4; ++i, sums += 64) {
    read_ahead(next, lines);
    const auto four = [&](int part) {
      const __m256 a = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_load_ps(sums + 4 * part)), _mm_load_ps(sums + 16 + 4 * part), 1);
      const __m256 b = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_load_ps(sums + 32 + 4 * part)), _mm_load_ps(sums + 48 + 4 * part), 1);
      return _mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1);
    };
    __m512 s = four(0);
    if (w.q_parts == 3) s = _mm512_add_ps(s, _mm512_add_ps(four(1), four(2)));
    s = _mm512_castsi512_ps(rows_first(_mm512_castps_si512(s)));
    s = _mm512_mul_ps(s, scale);
    if constexpr (F != kBf16) s = _mm512_mul_ps(s, row_factor<F, false>(phase.k_scale, phase.k_zero, 0, i));
    _mm512_store_ps(w.s + 16 * i, s);
  }
  ahead = next;
}

// Weights of 32 tokens as the left operand: rows of hi, rows of lo.
inline void weight_tile(const uint8_t* from, uint8_t* to) {
  const __m512i x[4] = {_mm512_load_si512(from), _mm512_load_si512(from + 64), _mm512_load_si512(from + 128), _mm512_load_si512(from + 192)};
  __m512i at = _mm512_setr_epi64(0, 4, 8, 12, 0, 4, 8, 12);  // 4 tokens of row 0 of each register of scores
  for (int r = 0; r < 4; ++r, at = _mm512_add_epi64(at, _mm512_set1_epi64(1)))
    _mm512_store_si512(to + 64 * r, _mm512_shuffle_i64x2(_mm512_permutex2var_epi64(x[0], at, x[1]), _mm512_permutex2var_epi64(x[2], at, x[3]), 0x44));
}

// 64 columns of values as pairs of tokens: [4 registers][32 pairs][64].
template <int F>
inline void unpack_value_columns(const Phase& phase, const Work& w, int d, uint8_t* to, Ahead& next, int lines) {
  const Fp8Tables tables;
  const int blocks = w.v_dim / kFp4Block;
  const uint8_t *v = phase.v + d / 64 * unit_bytes(F), *scales = F == kFp4 ? phase.v_scale + d / kFp4Block : nullptr;
  for (int p = 0; p < phase.count / 2; ++p, v += 2 * phase.v_stride) {
    __m512i x[4];
    if (p % 2 == 0) read_ahead(next, lines);
    value_columns<F>(tables, v, phase.v_stride, F == kFp4 ? scales + 2 * p * blocks : nullptr, blocks, x);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_store_si512(to + j * 2048 + p * 64, x[j]);
  }
}

template <int F>
void unpack_values(const Phase& phase, Work& w, Ahead& ahead, int lines) {
  Ahead next = ahead;
  for (int d = 0; d < w.sums; d += 64) unpack_value_columns<F>(phase, w, d, w.v_codes + d / 64 * 8192, next, lines);
  ahead = next;
}

template <int F>
void add(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  const int halves_of = phase.count / 32;
  Ahead next = ahead;
  for (int h = 0; h < halves_of; ++h)
    weight_tile(w.w_hi + 256 * h, w.w_tile + 1024 * h), weight_tile(w.w_lo + 256 * h, w.w_tile + 1024 * h + 256);
  _tile_loadd(7, w.w_tile, 64);
  if (halves_of == 2) {
    _tile_loadd(6, w.w_tile + 1024, 64);
  }
  const uint8_t* codes = w.v_codes;
  for (int d = 0; d < w.sums; d += 64, codes += w.one_by_one ? 0 : 8192) {
    if (w.one_by_one) unpack_value_columns<F>(phase, w, d, w.v_codes, next, lines);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    _tile_loadd(4, codes, 64); _tile_dpbf16ps(0, 7, 4);
    _tile_loadd(5, codes + 2048, 64); _tile_dpbf16ps(1, 7, 5);
    _tile_loadd(4, codes + 4096, 64); _tile_dpbf16ps(2, 7, 4);
    _tile_loadd(5, codes + 6144, 64); _tile_dpbf16ps(3, 7, 5);
    if (halves_of == 2) {
      _tile_loadd(4, codes + 1024, 64); _tile_dpbf16ps(0, 6, 4);
      _tile_loadd(5, codes + 3072, 64); _tile_dpbf16ps(1, 6, 5);
      _tile_loadd(4, codes + 5120, 64); _tile_dpbf16ps(2, 6, 4);
      _tile_loadd(5, codes + 7168, 64); _tile_dpbf16ps(3, 6, 5);
    }
    float* sums = reinterpret_cast<float*>(w.tile);
    _tile_stored(0, sums, 64); _tile_stored(1, sums + kTileWords, 64); _tile_stored(2, sums + 2 * kTileWords, 64);
    _tile_stored(3, sums + 3 * kTileWords, 64);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const float* from = sums + c * kTileWords + 16 * r;
        float* acc = rows.acc + (size_t)r * w.sums + d + 16 * c;
        _mm512_store_ps(acc, _mm512_add_ps(_mm512_load_ps(acc), _mm512_add_ps(_mm512_load_ps(from), _mm512_load_ps(from + 64))));
      }
  }
  ahead = next;
}

template <int F>
void keys(KeyPhase& key) {
  key.unpack = F == kBf16 ? nullptr : unpack_keys<F>, key.scores = scores<F>;
}

template <int F>
void values(ValuePhase& value) {
  value.unpack = unpack_values<F>, value.add = add<F>;
}

}  // namespace

void amx_float_keys(int format, KeyPhase& key) { (format == kFp8 ? keys<kFp8> : format == kFp4 ? keys<kFp4> : keys<kBf16>)(key); }
void amx_float_values(int format, ValuePhase& value) {
  (format == kFp8 ? values<kFp8> : format == kFp4 ? values<kFp4> : values<kBf16>)(value);
}

}  // namespace pikv::phases
