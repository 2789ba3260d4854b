// Tensor cores under the emulation: ldmatrix and mma.sync.m16n8k16 with 16-bit operands and fp32 sums. Part of simt_host.h.
//
// A tensor core does not round each addition: it takes the exact products and the old sum, cuts all of them off at 2^-24 of the largest, adds
// these, and cuts the result to fp32. How it adds is not documented; this is what has been measured on several generations, in its plainest
// form, and no better than any of them. So an error found here is one that a device may have.
#pragma once

namespace simt {

inline float half_value(bool bf16, unsigned h) {
  unsigned u = h << 16;
  float x;
  if (!bf16) {
    const unsigned magnitude = (h & 0x7fffu) << 13;
    std::memcpy(&x, &magnitude, 4);
    x *= 0x1p112f;
    std::memcpy(&u, &x, 4);
    u = (h & 0x8000u) << 16 | ((h & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : u);
  }
  std::memcpy(&x, &u, 4);
  return x;
}

// The sum of n terms as a tensor core has it.
inline float truncated_sum(const double* terms, int n) {
  double largest = 0, sum = 0;
  for (int i = 0; i < n; ++i) {
    if (!std::isfinite(terms[i])) {
      for (int j = 0; j < n; ++j) sum += terms[j];
      return (float)sum;
    }
    largest = std::fmax(largest, std::fabs(terms[i]));
  }
  if (largest == 0) return 0;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  for (int i = 0; i < n; ++i) sum += std::trunc(terms[i] / unit) * unit;
  if (sum == 0) return 0;
  const double last = std::ldexp(1.0, std::max(std::ilogb(sum) - 23, -149));
  return (float)(std::trunc(sum / last) * last);
}

// C[16 x 8] += A[16 x 16] B[16 x 8], in the lanes as kernels/tensor.cuh says.
inline void mma_16816(bool bf16, float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, PK_SITE) {
  const unsigned own[6] = {a0, a1, a2, a3, b0, b1};
  unsigned all[32][6];
  const unsigned char* found = collect(own, sizeof own, {file, line});
  for (int i = 0; i < 32; ++i) std::memcpy(all[i], found + i * kSlot, sizeof own);
  const int lane = current->linear % 32, r = lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const int row = r + i / 2 * 8, n = column + i % 2;
    double terms[17] = {c[i]};
    for (int k = 0; k < 16; ++k) {
      const unsigned a = all[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8], b = all[n * 4 + k % 8 / 2][4 + k / 8];
      terms[k + 1] = (double)half_value(bf16, k % 2 ? a >> 16 : a & 0xffffu) * half_value(bf16, k % 2 ? b >> 16 : b & 0xffffu);
    }
    c[i] = truncated_sum(terms, 17);
  }
}

// ldmatrix.x4: four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8, and gets row r (transposed: column
// r), elements 2c and 2c + 1, of each.
inline void ldmatrix_x4(unsigned* to, const void* row, bool transposed = false, PK_SITE) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("a row of ldmatrix must start on a 16-byte boundary", {file, line});
  const unsigned char* found = collect(&row, sizeof row, {file, line});
  const int lane = current->linear % 32, r = lane / 4, column = lane % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](int i, int j) {
      const unsigned short* from;
      std::memcpy(&from, found + (matrix * 8 + i) * kSlot, sizeof from);
      return (unsigned)from[j];
    };
    to[matrix] = transposed ? element(column, r) | element(column + 1, r) << 16 : element(r, column) | element(r, column + 1) << 16;
  }
}

}  // namespace simt
