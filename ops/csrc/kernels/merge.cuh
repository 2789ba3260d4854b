// Partial attention over S key sets into one, in their order. A warp per row. As merge_rows of cpu/attend.cpp: divided once, at the end,
// and the row of an empty set (lse -inf) is not read.

namespace pikv {

__global__ void __launch_bounds__(kBlock) merge_kernel(const Merge m) {
  const long long row = (long long)blockIdx.x * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= m.rows) return;
  float top = minus_infinity(), total = 0;
  for (int s = 0; s < m.S; ++s) top = fmaxf(top, m.lse[s * m.rows + row]);  // passes NaN over: the total has it
  const float base = top == minus_infinity() ? 0.0f : top;
  for (int s = 0; s < m.S; ++s) total += expf(m.lse[s * m.rows + row] - base);
  const float divisor = total == 0 ? 1.0f : total;
  for (int d = lane; d < m.D; d += 32) {
    float sum = 0;
    for (int s = 0; s < m.S; ++s) {
      const float lse = m.lse[s * m.rows + row];
      if (lse != minus_infinity()) sum += expf(lse - base) * m.out[(s * m.rows + row) * m.D + d];
    }
    m.merged[row * m.D + d] = sum / divisor;
  }
  if (lane == 0) m.merged_lse[row] = top + logf(total);
}

}  // namespace pikv
