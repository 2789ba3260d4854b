// fp4 as integers: a value is a whole number of halves, -12 to 12, found by one byte shuffle, and four of them meet four bytes of a query
// or of weights in a dot product. Codes of four tokens are put beside each other so that a lane of 128 bits belongs to one block of 16 columns.
#pragma once
#include "phase_codes.h"
#include "phase_floats.h"

namespace pikv::phases {
namespace {

constexpr int kBlocks = 8;  // of a register of codes: lane L has blocks 2 L and 2 L + 1

// Values in halves, more by `offset`, by code.
inline __m512i halves_by_code(int offset) {
  const __m128i x = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  return _mm512_broadcast_i32x4(_mm_add_epi8(x, _mm_set1_epi8((char)offset)));
}

// The codes of the lower and the upper halves of bytes -> x[0], x[1].
inline void look_up(__m512i table, __m512i codes, __m512i* x) {
  for (int i = 0; i < 2; ++i) x[i] = _mm512_shuffle_epi8(table, part_of<kInt4>(codes, i));
}

// e4m3 without a sign, in bits 20 to 26 of a lane.
inline __m512 scale_values(__m512i x) { return _mm512_mul_ps(_mm512_castsi512_ps(x), _mm512_set1_ps(0x1p120f)); }

}  // namespace
}  // namespace pikv::phases
