// Products of f32 by FMA with AVX512, for chunks of the query.
#include "chunk_tile.h"

namespace pikv::chunks {
namespace {

struct Float {
  static constexpr int kSteps = 32;  // of the values of 32 tokens
  static inline __m512 product(__m512 sum, __m512i x, __m512i y) { return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum); }
  static inline void store_weights(float* s, __m512 e, __m512 e2) { _mm512_store_ps(s, e), _mm512_store_ps(s + 16, e2); }
};

}  // namespace

const Keys kFloatKeys = {1, scores<Float>, pack_keys};
const Values kFloatValues = {1, soften<Float>, add<Float>, nullptr};

}  // namespace pikv::chunks
