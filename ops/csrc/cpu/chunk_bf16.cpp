// Products of bf16 by dot products of pairs with AVX512 BF16, for chunks of the query. Weights are bf16 twice, hi + lo: 16 bits of them.
#include "chunk_tile.h"

namespace pikv::chunks {
namespace {

struct Bf16 {
  static constexpr int kSteps = 16;
  static inline __m512 product(__m512 sum, __m512i x, __m512i y) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }
  // Where the scores of 32 tokens lay: hi of all, then lo.
  static inline void store_weights(float* s, __m512 e, __m512 e2) {
    const __m512i hi = (__m512i)_mm512_cvtne2ps_pbh(e2, e);
    const auto rest = [](__m512 x, __m256i h) { return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))); };
    const __m512 lo = rest(e, _mm512_castsi512_si256(hi)), lo2 = rest(e2, _mm512_extracti64x4_epi64(hi, 1));
    _mm512_store_si512(s, hi), _mm512_store_si512(s + 16, (__m512i)_mm512_cvtne2ps_pbh(lo2, lo));
  }
};

// Two tokens of a column beside each other.
void pack_values(const uint32_t* rows, int tokens, int v_width, uint32_t* to) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const uint16_t* row = reinterpret_cast<const uint16_t*>(rows);
  for (int t = 0; t < tokens; t += 2, row += 2 * v_width, to += v_width)
    for (int d = 0; d < v_width; d += 32) {
      const __mmask32 there = v_width - d >= 32 ? ~0u : 0xffffu;
      const __m512i a = _mm512_maskz_loadu_epi16(there, row + d), b = _mm512_maskz_loadu_epi16(there, row + v_width + d);
      _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(a, first, b));
      if (there == ~0u) _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(a, second, b));
    }
}

}  // namespace

const Keys kBf16Keys = {2, scores<Bf16>, pack_keys};
const Values kBf16Values = {2, soften<Bf16>, add<Bf16>, pack_values};

}  // namespace pikv::chunks
