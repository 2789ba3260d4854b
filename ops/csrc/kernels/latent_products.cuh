// Latent pages on tensor cores: queries as an operand, scores of a tile, and its values.
//
//   S [16 rows, tokens] = Q K^T    a warp has 8 tokens of the tile. O [16 rows, 512] += P V    a warp has 128 columns.
// P is the sum of two 16-bit numbers, as Q of fp16 is beside codes, and as decoded integers are.

namespace pikv {

// Registers of products with Q as A into shared memory: [product, lane, 4]; low: where the lower parts go, null = there are none.
template <class T>
__device__ __forceinline__ void store_latent_queries(const Attend& a, const long long* row, const bool* present, uint4* queries, uint4* low_queries) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = lane % 4;
#pragma unroll 1
  for (int i = warp; i < T::products; i += kWarps) {
    unsigned high[4], low[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {  // rows r and r + 8 of columns 2c, then of 2c + 8
      const int column = 16 * i + 2 * c + 8 * (e / 2), d = column < T::k_dim ? column : column - (T::k_dim - T::v_dim);
      high[e] = present[e % 2] ? __ldg(reinterpret_cast<const unsigned*>(a.q) + (row[e % 2] * T::k_dim + d) / 2) : 0u;
      if (T::coded && low_queries) split2<Mma::bf16>(low2<Mma::fp16>(high[e]), high2<Mma::fp16>(high[e]), &high[e], &low[e]);
    }
    queries[32 * i + lane] = {high[0], high[1], high[2], high[3]};
    if (T::coded && low_queries) low_queries[32 * i + lane] = {low[0], low[1], low[2], low[3]};
  }
}

// Scores of this warp's 8 tokens, not scaled by a.scale, into shared memory: [row, score_stride].
template <class T>
__device__ __forceinline__ void score_latent_tile(const unsigned short* tile, const uint4* queries, const uint4* low_queries, const float* scales, float* scores) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  float sum[4][4];  // of even and odd products, so that they need not wait for each other; of the lower parts
#pragma unroll
  for (int k = 0; k < 4; ++k) sum[k][0] = sum[k][1] = sum[k][2] = sum[k][3] = 0;
  const unsigned short* row = tile + (8 * warp + lane % 8) * T::stride + 8 * (lane / 8);
#pragma unroll 2
  for (int i = 0; i < T::products; i += 2) {
    unsigned k[4], k_low[4];
    ldmatrix4<false>(k, row + 16 * i);
    if constexpr (T::grouped) ldmatrix4<false>(k_low, row + 2 * T::tile_words + 16 * i);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint4 q = queries[32 * (i + j) + lane];
      mma_16816<T::type>(sum[j], q.x, q.y, q.z, q.w, k[2 * j], k[2 * j + 1]);
      if constexpr (T::grouped) mma_16816<T::type>(sum[2 + j], q.x, q.y, q.z, q.w, k_low[2 * j], k_low[2 * j + 1]);
      if (T::coded && low_queries) {
        q = low_queries[32 * (i + j) + lane];
        mma_16816<T::type>(sum[2 + j], q.x, q.y, q.z, q.w, k[2 * j], k[2 * j + 1]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int t = 8 * warp + 2 * c + e, k = 2 * half + e;
      const float x = (sum[0][k] + sum[1][k]) + (sum[2][k] + sum[3][k]);
      scores[(8 * half + r) * T::score_stride + t] = T::by_row ? x * scales[t] : x;
    }
}

// The running softmax of a lane's rows r and r + 8, in powers of two, and O of these rows: 16 times columns 2c and 2c + 1 of 8. `sum` counts
// this lane's tokens only; every warp has the same.
template <class T>
struct LatentRunning {
  float top[2], sum[2], page_top[2], page_sum[2], o[16][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int half = 0; half < 2; ++half) top[half] = page_top[half] = minus_infinity(), sum[half] = page_sum[half] = 0;
#pragma unroll
    for (int n = 0; n < 16; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) o[n][k] = 0;
  }

  // scores, scales: of the tile, in shared memory. scale: of scores, to powers of two.
  __device__ __forceinline__ void add(const Attend& a, const LatentSpan& span, const float* scores, const float* scales, float scale, const int* sight,
                                      const unsigned short* tile) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
    float x[2][4][2], most[2] = {minus_infinity(), minus_infinity()}, shrink[2];
    const bool hides = span.count < T::tokens || a.window || a.causal;
    const int* positions = reinterpret_cast<const int*>(span.record + a.f.positions) + span.t;
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int half = k % 2, t = 16 * s + 8 * (k / 2) + 2 * c + e, row = 8 * half + r;
          x[s][k][e] = scores[row * T::score_stride + t] * scale;
          if (hides) {
            const int position = a.window || a.causal ? __ldg(positions + min(t, span.count - 1)) : 0;
            if (t >= span.count || position < sight[row] || position > sight[T::rows + row]) x[s][k][e] = minus_infinity();
          }
          most[half] = fmaxf(most[half], x[s][k][e]);
        }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      most[half] = lane_max<1, 2>(most[half]);
      if (a.page_lse) {
        const float highest = fmaxf(page_top[half], most[half]), base = finite_or_zero(highest);
        page_sum[half] *= power2(page_top[half] - base), page_top[half] = highest;
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int k = half; k < 4; k += 2) page_sum[half] += power2(x[s][k][0] - base) + power2(x[s][k][1] - base);
      }
      const float highest = fmaxf(top[half], most[half]), base = finite_or_zero(highest);
      shrink[half] = power2(top[half] - base);
      top[half] = highest, sum[half] *= shrink[half], most[half] = base;
    }
    if (__any_sync(kAll, shrink[0] != 1.0f || shrink[1] != 1.0f))  // seldom, once the highest score has been seen
#pragma unroll
      for (int n = 0; n < 16; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) o[n][k] *= shrink[k / 2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      unsigned p[4], p_low[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float probability = power2(x[s][k][e] - most[k % 2]);
          sum[k % 2] += probability;
          y[e] = T::by_row ? probability * scales[16 * s + 8 * (k / 2) + 2 * c + e] : T::type == Mma::fp16 ? probability * kProbabilityScale : probability;
        }
        split2<T::type>(y[0], y[1], &p[k], &p_low[k]);
      }
      const unsigned short* row = tile + (16 * s + lane % 16) * T::stride + 128 * warp + 8 * (lane / 16);
#pragma unroll
      for (int n = 0; n < 16; n += 2) {
        unsigned v[4];
        ldmatrix4<true>(v, row + 8 * n);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          mma_16816<T::type>(o[n + j], p[0], p[1], p[2], p[3], v[2 * j], v[2 * j + 1]);
          mma_16816<T::type>(o[n + j], p_low[0], p_low[1], p_low[2], p_low[3], v[2 * j], v[2 * j + 1]);
        }
        if constexpr (T::grouped) {
          ldmatrix4<true>(v, row + 2 * T::tile_words + 8 * n);
#pragma unroll
          for (int j = 0; j < 2; ++j) mma_16816<T::type>(o[n + j], p[0], p[1], p[2], p[3], v[2 * j], v[2 * j + 1]);
        }
      }
    }
  }
};

}  // namespace pikv
