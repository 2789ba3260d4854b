// Scores of a phase for fp4 keys as integers, with AVX512 BF16 and VBMI beside: the part of a block in a score is whole before it meets the
// scale of the block. Eight tokens and four rows of the query at a time.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "phase_fp4.h"

namespace pikv::phases {
namespace {

// Of a register of keys: [half][dword, nibble][row][hi, lo][64], then [half][row][16 int32].
constexpr int kQueryBytes = 4096 + 2 * 4 * 64;

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
          const auto put = [&](int dword, __m512i four_times) {
            _mm512_store_si512(to + (((dword * 2 + nibble) * 4 + r) * 2 + part) * 64, four_times);
          };
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
inline void add_half(const uint8_t* k, int64_t stride, __mmask64 there, const uint8_t* q, __m512i table, const __m512 (*scale)[2],
                     __m512* y) {
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
      add_half<0>(k + 64 * b, phase.k_stride, there, q, table, scale, y);
      add_half<1>(k + 64 * b, phase.k_stride, there, q, table, scale, y);
    }
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
      const __m512 s = rows_of_lanes(y + 4 * g, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
      _mm512_store_ps(w.s + 16 * (i + g), _mm512_mul_ps(_mm512_mul_ps(s, step), token_powers<false>(phase.k_zero, 0, i + g)));
    }
  }
  ahead = next;
}

}  // namespace

KeyPhase fp4_key_phase() { return {nullptr, start_query, nullptr, scores}; }
int64_t fp4_query_bytes(int k_blocks) { return (int64_t)k_blocks * kQueryBytes + 64; }

}  // namespace pikv::phases
