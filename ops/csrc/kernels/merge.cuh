// Partial attention over several key sets into one, in their order. A warp per row. As merge_rows of cpu/attend.cpp: divided once, at the
// end, and the row of an empty set (lse -inf) counts for nothing, whatever it holds.
//
// Weights go to the lanes once, 32 sets at a time; of the rows eight are in flight.

namespace pikv {

// VEC (1 or 4) columns of a lane, from column d.
template <int VEC>
struct Merged {
  float sum[VEC], total;

  // lse and out of set s at s * step and s * step * D; count and base are those of the warp.
  __device__ __forceinline__ void add(const float* lse, const float* out, long long step, int count, int D, int d, float base) {
    const int lane = threadIdx.x % 32;
    for (int first = 0; first < count; first += 32) {
      const float own = first + lane < count ? __ldg(lse + (first + lane) * step) : minus_infinity();
      const float weight = own == minus_infinity() ? -0.0f : expf(own - base);  // -0: nothing there
      const int some = min(32, count - first);
#pragma unroll 1
      for (int i = 0; i < some; i += 8) {
        float w[8], x[8][VEC];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          w[k] = __shfl_sync(kAll, weight, min(i + k, 31));
          if (i + k >= some) w[k] = -0.0f;
          const float* row = out + (first + min(i + k, some - 1)) * step * D + d;
#pragma unroll
          for (int j = 0; j < VEC; ++j) x[k][j] = 0;
          if constexpr (VEC == 4) {
            if (d < D) load_floats4(row, x[k]);
          } else {
            if (d < D) x[k][0] = __ldg(row);
          }
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          total += w[k];
#pragma unroll
          for (int j = 0; j < VEC; ++j) sum[j] = __float_as_uint(w[k]) == 0x80000000u ? sum[j] : sum[j] + w[k] * x[k][j];
        }
      }
    }
  }

  __device__ __forceinline__ void clear() {
    total = 0;
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[j] = 0;
  }

  __device__ __forceinline__ void store(float* to, int D, int d) const {
    const float divisor = total == 0 ? 1.0f : total;
    if (d >= D) return;
#pragma unroll
    for (int j = 0; j < VEC; ++j) to[d + j] = sum[j] / divisor;
  }
};

// The largest lse of `count`, `step` apart; NaN is passed over: the total has it.
__device__ __forceinline__ float largest(const float* lse, long long step, int count) {
  float top = minus_infinity();
  for (int s = threadIdx.x % 32; s < count; s += 32) top = fmaxf(top, __ldg(lse + s * step));
  return lane_max<1, 16>(top);
}

template <int VEC>
__device__ __forceinline__ void merge_row(const Merge& m, long long row) {
  const float top = largest(m.lse + row, m.rows, m.S), base = top == minus_infinity() ? 0.0f : top;
  Merged<VEC> merged;
  for (int d0 = 0; d0 < m.D; d0 += 32 * VEC) {
    const int d = d0 + VEC * (int)(threadIdx.x % 32);
    merged.clear();
    merged.add(m.lse + row, m.out + row * m.D, m.rows, m.S, m.D, d, base);
    merged.store(m.merged + row * m.D, m.D, d);
  }
  if (m.D == 0) merged.clear();
  if (threadIdx.x % 32 == 0) m.merged_lse[row] = top + logf(merged.total);
}

__global__ void __launch_bounds__(kBlock, 6) merge_kernel(const Merge m) {
  const long long row = (long long)blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= m.rows) return;
  if (m.D % 4 == 0 && (unsigned long long)m.out % 16 == 0) merge_row<4>(m, row);
  else merge_row<1>(m, row);
}

// Length of the tail of table t where that is a part of its own, else 0.
__device__ __forceinline__ int tail_of(const Attend& a, int t) { return a.tail_parts ? length_of(a, t) % a.f.group : 0; }

// The lse of a tail, of row m, to that of the page that it will belong to; blocks have theirs from tensor_tail.cuh. By a warp.
__device__ __forceinline__ void add_tail_lse(const Attend& a, int t, int m) {
  const int page_column = length_of(a, t) / a.f.group * a.f.group / a.f.page_size;
  const long long list = ((long long)(t / a.H) * a.list_heads + (a.list_heads == 1 ? 0 : t % a.H)) * a.num_columns;
  const float tail = a.part_lse[(long long)(a.tail_parts + t) * a.T * a.G + m];
  for (int c = threadIdx.x % 32; c < a.num_columns; c += 32) {
    if ((a.list.data ? at(a.list, list + c) : c) != page_column || tail == minus_infinity()) continue;
    float* lse = page_lse_of(a, t, m, c);
    const float top = fmaxf(*lse, tail);
    *lse = top + logf(expf(*lse - top) + expf(tail - top));
  }
}

// The parts that the blocks of an attention kernel have left: out and lse of [R, T, H * G]. Grid: x = (request, kv head), y = 4 rows.
__global__ void __launch_bounds__(kBlock, 6) finish_kernel(const Attend a) {
  PK_SHARED(scratch);
  const int r = (int)blockIdx.x / a.H, h = (int)blockIdx.x % a.H, D = a.f.v_dim, M = a.T * a.G;
  const int m = (int)blockIdx.y * kWarps + (int)threadIdx.x / 32;
  Row row = {};
  if (a.workers) row.count(a, reinterpret_cast<int*>(scratch));
  if (m >= M) return;
  const long long to = ((long long)r * a.T + m / a.G) * a.H * a.G + (long long)h * a.G + m % a.G;
  float top = minus_infinity();
  // use(first part, how many): of every shard, then of its tail
  const auto each = [&](const auto& use) {
    for (int s = 0; s < a.S; ++s) {
      const int t = (r * a.S + s) * a.H + h;
      int first, last;
      parts_of(a, row, t, &first, &last);
      use((long long)first * M + m, last - first + 1);
      if (tail_of(a, t)) use((long long)(a.tail_parts + t) * M + m, 1);
    }
  };
  each([&](long long from, int count) { top = fmaxf(top, largest(a.part_lse + from, M, count)); });
  const float base = top == minus_infinity() ? 0.0f : top;
  Merged<4> merged;
  for (int d0 = 0; d0 < D; d0 += 128) {
    const int d = d0 + 4 * (int)(threadIdx.x % 32);
    merged.clear();
    each([&](long long from, int count) { merged.add(a.part_lse + from, a.part_out + from * D, M, count, D, d, base); });
    merged.store(a.out + to * D, D, d);
  }
  if (threadIdx.x % 32 == 0) a.lse[to] = top + logf(merged.total);
  if (a.page_lse && a.blocks == 1)
    for (int s = 0; s < a.S; ++s)
      if (tail_of(a, (r * a.S + s) * a.H + h)) add_tail_lse(a, (r * a.S + s) * a.H + h, m);
}

}  // namespace pikv
