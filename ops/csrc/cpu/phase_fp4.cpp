// A phase of fp4 keys or values as integers, with AVX512 BW, VNNI and VBMI: a value is a whole number of halves, -12 to 12, found by one byte
// shuffle, and four of them meet four bytes of a query or of weights in a dot product.
//
// Codes of four tokens are put beside each other so that a lane of 128 bits belongs to one block of 16 columns. Keys: the block's part of a
// score is whole before it meets the scale of the block. Values: the scale is in the weights, of which each block has its own, as 16 bits.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "phase_codes.h"
#include "phase_floats.h"

namespace pikv::phases {
namespace {

constexpr int kBlocks = 8;                    // of a register of codes: lane L has blocks 2 L and 2 L + 1
constexpr int kQueryBytes = 4096 + 2 * 4 * 64;  // for a register of keys: [half][dword, nibble][row][hi, lo][64], then [half][row][16 int32]
constexpr int kWeightBytes = 2 * 16 * 64;     // for a register of values: [half][four tokens][row][16]
constexpr int kMost = 65535;                  // of a weight

// Values in halves, more by `offset`, by code.
inline __m512i halves_by_code(int offset) {
  const __m128i x = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  return _mm512_broadcast_i32x4(_mm_add_epi8(x, _mm_set1_epi8((char)offset)));
}

// The codes of the lower and the upper halves of bytes -> x[0], x[1].
inline void look_up(__m512i table, __m512i codes, __m512i* x) {
  for (int i = 0; i < 2; ++i) x[i] = _mm512_shuffle_epi8(table, part_of<kInt4>(codes, i));
}

// The query as 16 bits hi + lo / 256, in the order of query_of(), dword by dword for four tokens, and 12 times its sum by block, which the
// codes of keys bring with them as they are unsigned.
void start_query(Rows& rows, Work& w) {
  alignas(64) float steps[4];
  for (int r = 0; r < 4; ++r) {
    const float* q = rows.q + (size_t)r * w.q_width;
    float largest = 1e-30f;
    for (int e = 0; e < w.q_width; ++e) largest = std::max(largest, std::fabs(q[e]));
    const float inverse = 127.0f * 256.0f / largest;
    steps[r] = 0.5f * largest / (127.0f * 256.0f);
    for (int b = 0; b < w.k_blocks; ++b) {
      uint8_t* to = rows.q_codes + (size_t)b * kQueryBytes;
      int sums[kBlocks] = {};
      for (int nibble = 0; nibble < 2; ++nibble) {
        alignas(64) int8_t bytes[2][64];
        for (int i = 0; i < 64; ++i) {
          const int whole = (int)std::lrint(q[128 * b + 64 * nibble + i] * inverse), hi = (whole + 128) >> 8;
          bytes[0][i] = (int8_t)hi, bytes[1][i] = (int8_t)(whole - 256 * hi);
          sums[i / 8] += whole;
        }
        for (int part = 0; part < 2; ++part) {
          const __m512i x = _mm512_load_si512(bytes[part]);
          const auto put = [&](int dword, __m512i four_times) { _mm512_store_si512(to + (((dword * 2 + nibble) * 4 + r) * 2 + part) * 64, four_times); };
          put(0, _mm512_shuffle_epi32(x, _MM_PERM_AAAA)), put(1, _mm512_shuffle_epi32(x, _MM_PERM_BBBB));
          put(2, _mm512_shuffle_epi32(x, _MM_PERM_CCCC)), put(3, _mm512_shuffle_epi32(x, _MM_PERM_DDDD));
        }
      }
      for (int half = 0; half < 2; ++half) {
        int32_t* taken = reinterpret_cast<int32_t*>(to + 4096) + (half * 4 + r) * 16;
        for (int i = 0; i < 16; ++i) taken[i] = -12 * sums[i / 4 * 2 + half];
      }
    }
  }
  _mm512_store_ps(rows.q_codes + (size_t)w.k_blocks * kQueryBytes, by_row<4>(steps));
}

// e4m3 without a sign, in bits 20 to 26 of a lane.
inline __m512 scale_values(__m512i x) { return _mm512_mul_ps(_mm512_castsi512_ps(x), _mm512_set1_ps(0x1p120f)); }

// The scales of a register of keys of four tokens, `blocks` of a row: lane L token t is that of block 2 L, of block 2 L + 1.
inline void key_scales(const uint8_t* at, int blocks, __m512* x) {
  __m256i pairs;
  if (blocks == kBlocks) {
    pairs = _mm256_loadu_si256((const __m256i*)at);
  } else {
    long long row[4];
    for (int t = 0; t < 4; ++t) std::memcpy(row + t, at + t * blocks, 8);
    pairs = _mm256_setr_epi64x(row[0], row[1], row[2], row[3]);
  }
  const __m512i by_lane = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i both = _mm512_permutexvar_epi32(by_lane, _mm512_cvtepu16_epi32(pairs));
  x[0] = scale_values(_mm512_slli_epi32(_mm512_and_si512(both, _mm512_set1_epi32(0x7f)), 20));
  x[1] = scale_values(_mm512_slli_epi32(_mm512_and_si512(both, _mm512_set1_epi32(0x7f00)), 12));
}

// Block-wise parts of the scores of 8 tokens: y[4 g + r] has four tokens of group g, by lane for the blocks of a half.
template <int HALF>
inline void add_half(const uint8_t* k, int64_t stride, __mmask64 there, const uint8_t* q, __m512i table, const __m512 (*scale)[2], __m512* y) {
  __m512i x[2][4], sums[8];
#pragma GCC unroll 2
  for (int g = 0; g < 2; ++g) {
    __m512i row[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) row[t] = _mm512_maskz_loadu_epi8(there, k + (4 * g + t) * stride);
    const __m512i a = HALF ? _mm512_unpackhi_epi32(row[0], row[1]) : _mm512_unpacklo_epi32(row[0], row[1]);
    const __m512i b = HALF ? _mm512_unpackhi_epi32(row[2], row[3]) : _mm512_unpacklo_epi32(row[2], row[3]);
    look_up(table, _mm512_unpacklo_epi64(a, b), x[g]), look_up(table, _mm512_unpackhi_epi64(a, b), x[g] + 2);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) sums[i] = _mm512_setzero_si512();
  const uint8_t* taken = q + 4096 + HALF * 256;
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
    const uint8_t* at = q + HALF * 2048 + part * 64;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r, at += 128) {
        const __m512i bytes = _mm512_load_si512(at);
        add_dots(sums[r], x[0][j], bytes), add_dots(sums[4 + r], x[1][j], bytes);
      }
    if (part) break;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sums[i] = _mm512_add_epi32(_mm512_slli_epi32(sums[i], 8), _mm512_load_si512(taken + i % 4 * 64));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) y[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i]), scale[i / 4][HALF], y[i]);
}

void scores(const Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  const __m512i table = halves_by_code(12);
  const __m512 step = _mm512_load_ps(rows.q_codes + (size_t)w.k_blocks * kQueryBytes);
  const uint8_t *k = phase.k, *scales = phase.k_scale;
  const int blocks = fp4_blocks(w.k_dim);
  Ahead next = ahead;
#pragma GCC unroll 1
  for (int i = 0; i < phase.count / 4; i += 2, k += 8 * phase.k_stride, scales += 8 * blocks) {
    read_ahead(next, 2 * lines);
    __m512 y[8], scale[2][2];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) y[j] = _mm512_setzero_ps();
#pragma GCC unroll 1
    for (int b = 0; b < w.k_blocks; ++b) {
      const __mmask64 there = b + 1 < w.k_blocks ? ~0ull : w.k_last;
      for (int g = 0; g < 2; ++g) key_scales(scales + 4 * g * blocks + kBlocks * b, blocks, scale[g]);
      const uint8_t* q = rows.q_codes + (size_t)b * kQueryBytes;
      add_half<0>(k + 64 * b, phase.k_stride, there, q, table, scale, y), add_half<1>(k + 64 * b, phase.k_stride, there, q, table, scale, y);
    }
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
      const __m512 s = rows_of_lanes(y + 4 * g, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
      _mm512_store_ps(w.s + 16 * (i + g), _mm512_mul_ps(_mm512_mul_ps(s, step), token_powers<false>(phase.k_zero, 0, i + g)));
    }
  }
  ahead = next;
}

// The scales of values as floats, [eight tokens][register][block][8 tokens], and the largest of each token.
void widen_scales(const Phase& phase, Work& w) {
  const int blocks = fp4_blocks(w.v_dim);
  const __m512i rows_at = _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(blocks));
  const __m512i row = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);  // byte 8 b + t of what is asked for is byte 8 t + b
  __m512i by_block = _mm512_setzero_si512();
  for (int t = 7; t >= 0; --t) by_block = _mm512_or_si512(_mm512_slli_epi64(by_block, 8), _mm512_add_epi64(row, _mm512_set1_epi64(8 * t)));
  float* to = w.v_scales;
  for (int t = 0; t < phase.count; t += 8) {
    __m512 top = _mm512_setzero_ps();
    for (int b = 0; b < w.v_blocks; ++b, to += 64) {
      const uint8_t* at = phase.v_scale + (int64_t)t * blocks + kBlocks * b;
      const int left = blocks - kBlocks * b;
      __m512i x = blocks == kBlocks ? _mm512_loadu_si512(at) : _mm512_i64gather_epi64(rows_at, at, 1);
      if (left < kBlocks) x = _mm512_and_si512(x, _mm512_set1_epi64((1ll << 8 * left) - 1));
      x = _mm512_and_si512(_mm512_permutexvar_epi8(by_block, x), _mm512_set1_epi8(0x7f));
      const __m128i part[4] = {_mm512_castsi512_si128(x), _mm512_extracti32x4_epi32(x, 1), _mm512_extracti32x4_epi32(x, 2), _mm512_extracti32x4_epi32(x, 3)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512 scale = scale_values(_mm512_slli_epi32(_mm512_cvtepu8_epi32(part[i]), 20));
        _mm512_store_ps(to + 16 * i, scale);
        top = _mm512_max_ps(top, scale);
      }
    }
    _mm256_store_ps(w.v_tops + t, _mm256_max_ps(_mm512_castps512_ps256(top), _mm512_extractf32x8_ps(top, 1)));
  }
}

// Weights with the scales of a half of the blocks -> their low and high bytes, [row][lane][token].
inline void put_weights(__m512 e, const float* scales, uint8_t* lo, uint8_t* hi) {
  __m512i x[4];
#pragma GCC unroll 4
  for (int lane = 0; lane < 4; ++lane) x[lane] = _mm512_cvtps_epi32(_mm512_mul_ps(e, _mm512_broadcast_f32x4(_mm_load_ps(scales + 16 * lane))));
  const __m512i a = _mm512_packus_epi32(x[0], x[1]), b = _mm512_packus_epi32(x[2], x[3]), low = _mm512_set1_epi16(255);
  _mm512_store_si512(lo, _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low)));
  _mm512_store_si512(hi, _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
}

template <bool MASKED>
void soften_rows(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  Ahead next = ahead;
  widen_scales(phase, w);
  const __m512 m = find_top<4, MASKED>(rows, phase, w);
  __m512 l = _mm512_setzero_ps(), big = l;
#pragma GCC unroll 4
  for (int i = 0; i < phase.count / 4; ++i) {
    read_ahead(next, lines);
    __m512 e = weight<4, MASKED>(phase, w, i, m);
    l = _mm512_add_ps(l, e);
    e = _mm512_mul_ps(e, token_powers<MASKED>(phase.v_zero, phase.visible, i));
    big = _mm512_max_ps(big, _mm512_mul_ps(e, _mm512_broadcast_f32x4(_mm_load_ps(w.v_tops + 4 * i))));
    _mm512_store_ps(w.s + 16 * i, e);
  }
  _mm512_store_ps(rows.l, _mm512_add_ps(_mm512_load_ps(rows.l), l));
  if (phase.page_lse) _mm512_store_ps(rows.page_l, _mm512_add_ps(_mm512_load_ps(rows.page_l), l));
  big = _mm512_max_ps(group_max<4>(big), _mm512_set1_ps(1e-30f));
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(kMost), big);
  _mm512_store_ps(w.w_step, _mm512_mul_ps(big, _mm512_set1_ps(0.5f / kMost)));
#pragma GCC unroll 1
  for (int i = 0; i < phase.count / 4; ++i) {
    const __m512 e = _mm512_mul_ps(_mm512_load_ps(w.s + 16 * i), inverse);
    for (int b = 0; b < w.v_blocks; ++b) {
      const float* scales = w.v_scales + (size_t)(i / 2 * w.v_blocks + b) * 64 + i % 2 * 4;
      const int at = b * kWeightBytes + 64 * i;
      put_weights(e, scales, w.w_lo + at, w.w_hi + at);
      put_weights(e, scales + 8, w.w_lo + at + kWeightBytes / 2, w.w_hi + at + kWeightBytes / 2);
    }
  }
  ahead = next;
}

void soften(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  if (phase.all) soften_rows<false>(rows, phase, w, ahead, lines);
  else soften_rows<true>(rows, phase, w, ahead, lines);
}

// 32 sums of each row: those of one dword of each lane, both halves of its bytes.
template <int PASS>
inline void add_pass(Rows& rows, const Phase& phase, const Work& w, int block, __mmask64 there, Ahead& ahead, int lines) {
  const __m512i table = halves_by_code(0), lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  __m512i hi[8], lo[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) hi[i] = lo[i] = _mm512_setzero_si512();
  const int64_t at = block * kWeightBytes + PASS / 2 * (kWeightBytes / 2);
  const uint8_t *v = phase.v + 64 * block, *w_hi = w.w_hi + at, *w_lo = w.w_lo + at;
  Ahead next = ahead;
#pragma GCC unroll 1
  for (int t = 0; t < phase.count; t += 4, v += 4 * phase.v_stride, w_hi += 64, w_lo += 64) {
    read_ahead(next, lines);
    __m512i x[2];
    quads<kInt4, false, 2, false>(v, phase.v_stride, there, PASS, x);
    for (int j = 0; j < 2; ++j) x[j] = _mm512_shuffle_epi8(table, x[j]);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m512i y = _mm512_permutexvar_epi32(lanes, _mm512_loadu_si512(w_hi + 16 * r));
      const __m512i z = _mm512_permutexvar_epi32(lanes, _mm512_loadu_si512(w_lo + 16 * r));
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) add_dots(hi[2 * r + j], y, x[j]), add_dots(lo[2 * r + j], z, x[j]);
    }
  }
  ahead = next;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(hi[i], 8), lo[i]));
    float* acc = rows.acc + (size_t)(i / 2) * w.sums + 16 * (8 * block + 2 * PASS + i % 2);
    _mm512_store_ps(acc, _mm512_fmadd_ps(sum, lane_of_row(w.w_step, 4, i / 2), _mm512_load_ps(acc)));
  }
}

void add(Rows& rows, const Phase& phase, Work& w, Ahead& ahead, int lines) {
  for (int b = 0; b < w.v_blocks; ++b) {
    const __mmask64 there = b + 1 < w.v_blocks ? ~0ull : w.v_last;
    add_pass<0>(rows, phase, w, b, there, ahead, lines), add_pass<1>(rows, phase, w, b, there, ahead, lines);
    add_pass<2>(rows, phase, w, b, there, ahead, lines), add_pass<3>(rows, phase, w, b, there, ahead, lines);
  }
}

}  // namespace

KeyPhase fp4_key_phase() { return {nullptr, start_query, nullptr, scores}; }
ValuePhase fp4_value_phase() { return {nullptr, soften, add}; }
int64_t fp4_query_bytes(int k_blocks) { return (int64_t)k_blocks * kQueryBytes + 64; }
int64_t fp4_weight_bytes(int v_blocks) { return (int64_t)v_blocks * kWeightBytes + 64; }

}  // namespace pikv::phases
