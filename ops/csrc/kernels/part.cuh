// What a block has found of a part: the lse of its pages, and the merge of its four warps.

namespace pikv {

// Lane 0 writes the lse of the page it has the state of (null = not read). `more`: to the lse already there.
template <class T>
__device__ __forceinline__ void write_page_lse(const Attend& a, int n, int h, int first_row, int num_rows, int c, const float* page, bool more = false) {
#pragma unroll 1
  for (int g = 0; g < num_rows; ++g) {
    const int m = first_row + g;
    float* to = a.page_lse + (((long long)n * a.T + m / a.G) * a.H * a.G + (long long)h * a.G + m % a.G) * a.num_columns + c;
    float sum = page ? lane_sum<T::lanes, 16>(page[(2 * g + 1) * kBlock]) : 0.0f, top = page ? page[2 * g * kBlock] : minus_infinity();
    if (threadIdx.x % 32) continue;
    if (more) {
      const float before = *to * 1.4426950408889634f, highest = fmaxf(top, before), base = finite_or_zero(highest);
      sum = sum * power2(top - base) + power2(before - base), top = highest;
    }
    *to = (top + log2f(sum)) * 0.6931471805599453f;  // log2 0 = -inf
  }
}

// Of the lanes of a warp into shared memory, for write_part.
template <class T>
__device__ __forceinline__ void gather_warps(const Running<T>& run, int num_rows, float* warp_out, float* warp_top, float* warp_sum) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane % T::lanes * 8;
#pragma unroll
  for (int g = 0; g < T::rows; ++g) {
    if (!T::plain && g >= num_rows) continue;
    const float sum = lane_sum<T::lanes, 16>(run.sum[g]);
    if (lane == 0) warp_top[warp * T::rows + g] = run.top[g], warp_sum[warp * T::rows + g] = sum;
#pragma unroll
    for (int c = 0; c < T::value_chunks; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float x = lane_sum<T::lanes, 16>(run.acc[g][c][i]);
        if (lane < T::lanes) warp_out[(warp * T::rows + g) * T::value_width + column + 256 * c + i] = x;
      }
  }
}

// What the warps have found of a part, merged: to its place among the parts, or straight to out. [warp, row, column] and [warp, row].
template <class T>
__device__ __forceinline__ void write_part(const Attend& a, const Part& part, int first_row, int num_rows, const float* warp_out,
                                           const float* warp_top, const float* warp_sum) {
  const int M = a.T * a.G, n = part.t / a.H, h = part.t % a.H;
  for (int j = threadIdx.x; j < num_rows * a.f.v_dim; j += kBlock) {
    const int g = j / a.f.v_dim, d = j % a.f.v_dim, m = first_row + g;
    float top = minus_infinity(), sum = 0, out = 0;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, warp_top[w * T::rows + g]);
    const float base = finite_or_zero(top);
    for (int w = 0; w < kWarps; ++w) {
      const float weight = power2(warp_top[w * T::rows + g] - base);
      sum += weight * warp_sum[w * T::rows + g];
      out += weight * warp_out[(w * T::rows + g) * T::value_width + d];
    }
    const long long row = a.part_out ? (long long)part.part * M + m : ((long long)n * a.T + m / a.G) * a.H * a.G + (long long)h * a.G + m % a.G;
    (a.part_out ? a.part_out : a.out)[row * a.f.v_dim + d] = sum == 0 ? 0.0f : out / sum;
    if (d == 0) (a.part_out ? a.part_lse : a.lse)[row] = sum == 0 ? minus_infinity() : (top + log2f(sum)) * 0.6931471805599453f;
  }
}

}  // namespace pikv
