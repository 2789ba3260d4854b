// Queries as an operand of the products on tensor cores.

namespace pikv {

// Q as A, four registers a product: rows 0..7 and 8..15 of the first columns, then of the others. Of raw keys as it is given, else times what
// the codes lack, in two parts. With 8 rows the lower parts are rows 8..15. `add`: to every score of the group.
//
// Of wide tiles the registers lie in shared memory, a lane's own places, so that there is nothing to wait for.
template <class T>
struct TensorQueries {
  static constexpr bool both = T::split && T::sets == 1;  // parts in one product
  unsigned high[T::wide ? 1 : T::products][4], low[T::split && !both ? T::products : 1][4];
  uint4* kept;  // of product i: kept[32 * i]
  float factor[T::sets], add[T::sets];

  __device__ __forceinline__ void take(const Attend& a, long long row_of_lane, int set, int c, bool present) {
#pragma unroll
    for (int i = 0; i < T::products; ++i) {
      unsigned* x = high[T::wide ? 0 : i];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const long long d = T::K::column(c, key_column<T::K::format>(i, 2 * e));
        x[2 * e + set] = present ? __ldg(reinterpret_cast<const unsigned*>(a.q) + (row_of_lane * a.f.k_dim + d) / 2) : 0u;
        if (T::sets == 1) x[2 * e + 1] = T::wide ? 0u : kept_zero();
      }
      if constexpr (T::wide) kept[32 * i] = {x[0], x[1], x[2], x[3]};
    }
  }

  // The registers of product i.
  __device__ __forceinline__ void operand(int i, unsigned* x) const {
    if constexpr (T::wide) {
      const uint4 w = kept[32 * i];
      x[0] = w.x, x[1] = w.y, x[2] = w.z, x[3] = w.w;
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = high[i][k];
    }
  }

  // q: of this lane, its columns in order. scale, zero: of the group, null = none.
  __device__ __forceinline__ void code(const float* q, int set, int c, const unsigned char* scale, const unsigned char* zero) {
    float x[4 * T::products], most = 0, offset = 0;
#pragma unroll
    for (int l = 0; l < 4 * T::products; l += 8) {
      float y[8];
      load_floats8(q + l * 32, y);
      unsigned s[4], z[4];
      if (T::grouped) {
        const int d = T::K::column(c, l);
        load_words<4>(scale + 2 * d, s);
        load_words<4>(zero + 2 * d, z);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (T::grouped) offset += y[k] * half_of(z, k), y[k] *= half_of(s, k);
        x[l + k] = y[k], most = fmaxf(most, fabsf(y[k]));
      }
    }
    most = exponent_of(lane_max<1, 2>(most));
    const float inverse = inverse_of(most) * 64.0f;
    factor[set] = most * (1.0f / 64.0f) * code_factor<T::K::format>();
    add[set] = T::grouped ? lane_sum<1, 2>(offset) : 0.0f;
#pragma unroll
    for (int i = 0; i < T::products; ++i) {
      unsigned* to = high[T::wide ? 0 : i];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float first = x[key_column<T::K::format>(i, 2 * e)] * (inverse / key_factor<T::K::format>(i, 2 * e));
        const float second = x[key_column<T::K::format>(i, 2 * e + 1)] * (inverse / key_factor<T::K::format>(i, 2 * e + 1));
        split2<Mma::fp16>(first, second, &to[2 * e + set], both ? &to[2 * e + 1] : &low[both ? 0 : i][2 * e + set]);
      }
      if constexpr (T::wide) kept[32 * i] = {to[0], to[1], to[2], to[3]};
    }
  }

  // As they are stored in shared memory: 8 columns of a lane side by side, then those of the next lane.
  static __device__ __forceinline__ void load_floats8(const float* from, float* x) {
#pragma unroll
    for (int k = 0; k < 8; k += 4) {
      const uint4 w = *reinterpret_cast<const uint4*>(from + k);
      x[k] = __uint_as_float(w.x), x[k + 1] = __uint_as_float(w.y), x[k + 2] = __uint_as_float(w.z), x[k + 3] = __uint_as_float(w.w);
    }
  }
};

}  // namespace pikv
