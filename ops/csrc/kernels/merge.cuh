// Partial attention over S key sets into one, in their order. A warp per row.

namespace pikv {

__global__ void __launch_bounds__(kBlock) merge_kernel(const Merge m) {
  const long long row = (long long)blockIdx.x * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= m.rows) return;
  float top = minus_infinity(), total = 0;
  for (int s = 0; s < m.S; ++s) top = fmaxf(top, m.lse[s * m.rows + row]);
  const float base = top == minus_infinity() ? 0.0f : top;
  for (int s = 0; s < m.S; ++s) total += expf(m.lse[s * m.rows + row] - base);
  const float inverse = total == 0 ? 0.0f : 1 / total;
  for (int d = lane; d < m.D; d += 32) {
    float sum = 0;
    for (int s = 0; s < m.S; ++s) {
      const float weight = expf(m.lse[s * m.rows + row] - base) * inverse;
      if (weight != 0) sum += weight * m.out[(s * m.rows + row) * m.D + d];
    }
    m.merged[row * m.D + d] = sum;
  }
  if (lane == 0) m.merged_lse[row] = top + logf(total);
}

}  // namespace pikv
