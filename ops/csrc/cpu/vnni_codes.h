// Values of integer latents, which are columns of the keys and have their scales: weighted sums of codes, and what they become.
#pragma once
#include <cstring>

#include "avx512.h"
#include "vnni.h"

namespace pikv::vnni {
namespace {

inline __mmask16 mask_of(int left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }
inline float lanes(const float* sums, int row) { return _mm512_reduce_add_ps(_mm512_load_ps(sums + row * 16)); }

// 32 scales or zeros of columns as floats, in the order in which the codes are summed.
inline void column_halves(const uint16_t* p, int d, int left, bool pairs, __m512* x) {
  const __m512 low = halves(mask_of(left), p + d), high = halves(mask_of(left - 16), p + d + 16);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  x[0] = pairs ? _mm512_permutex2var_ps(low, even, high) : low;
  x[1] = pairs ? _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high) : high;
}

// The codes of an integer latent's group become values: sum p (code scale + zero) = scale sum p code + zero sum p.
inline void take_in_codes(const PageFormat& f, const uint8_t* head, int group, Work& w, int M) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(head + f.k_scale) + (int64_t)group * f.k_coded;
  const uint16_t* zeros = reinterpret_cast<const uint16_t*>(head + f.k_zero) + (int64_t)group * f.k_coded;
  const bool pairs = in_pairs(f.format);
  for (int row = 0; row < M; ++row) {
    const float weight = lanes(w.zeros, row);
    if (weight == 0) continue;  // nothing of the group is seen: it may hold anything
    float *acc = w.acc + (size_t)row * w.Dv, *codes = w.codes + (size_t)row * w.Dv;
    for (int d = 0; d < f.v_dim; d += 32) {
      __m512 scale[2], zero[2];
      column_halves(scales, d, f.v_dim - d, pairs, scale);
      column_halves(zeros, d, f.v_dim - d, pairs, zero);
      for (int i = 0; i < 2; ++i) {
        const __m512 sum = _mm512_fmadd_ps(scale[i], _mm512_load_ps(codes + d + 16 * i), _mm512_mul_ps(zero[i], _mm512_set1_ps(weight)));
        _mm512_store_ps(acc + d + 16 * i, _mm512_add_ps(_mm512_load_ps(acc + d + 16 * i), sum));
      }
    }
    std::memset(codes, 0, (size_t)w.Dv * sizeof(float));
  }
  std::memset(w.zeros, 0, (size_t)M * 16 * sizeof(float));
}

}  // namespace
}  // namespace pikv::vnni
