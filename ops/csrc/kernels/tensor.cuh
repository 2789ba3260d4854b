// Products on tensor cores, and the conversions around them: PTX on a device, emu/simt_host.h under the emulation.

namespace pikv {

enum class Mma { bf16, fp16 };

// C[16 x 8] += A[16 x 16] B[16 x 8], sums in fp32. Lane (r = lane / 4, c = lane % 4) holds
//   a0 = A[r][2c, 2c+1]  a1 = A[r+8][2c, 2c+1]  a2 = A[r][2c+8, 2c+9]  a3 = A[r+8][2c+8, 2c+9]
//   b0 = B[2c, 2c+1][r]  b1 = B[2c+8, 2c+9][r]    c0, c1 = C[r][2c, 2c+1]  c2, c3 = C[r+8][2c, 2c+1]
template <Mma TYPE>
__device__ __forceinline__ void mma_16816(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#if defined(PK_HOST_EMU)
  simt::mma_16816(TYPE == Mma::bf16, c, a0, a1, a2, a3, b0, b1);
#else
  if constexpr (TYPE == Mma::bf16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane l names row l % 8 of matrix l / 8, and gets elements 2c and 2c + 1 of row r
// (transposed: of column r) of each.
template <bool TRANSPOSED>
__device__ __forceinline__ void ldmatrix4(unsigned* x, const unsigned short* row) {
#if defined(PK_HOST_EMU)
  simt::ldmatrix_x4(x, row, TRANSPOSED);
#else
  const unsigned from = (unsigned)__cvta_generic_to_shared(row);
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
  else asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
#endif
}

// A zero that stays in its register, where an operand needs it beside others: known as one, it would be made anew for every product.
__device__ __forceinline__ unsigned kept_zero() {
  unsigned x = 0;
#if !defined(PK_HOST_EMU)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Two floats as a pair of 16-bit floats, the first in the low half.
template <Mma TYPE>
__device__ __forceinline__ unsigned pack2(float x, float y) {
#if defined(PK_HOST_EMU)
  return TYPE == Mma::bf16 ? float_to_bf16(x) | float_to_bf16(y) << 16 : float_to_half(x) | float_to_half(y) << 16;
#else
  unsigned d;
  if constexpr (TYPE == Mma::bf16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(y), "f"(x));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(y), "f"(x));
  return d;
#endif
}
template <Mma TYPE>
__device__ __forceinline__ float low2(unsigned p) { return TYPE == Mma::bf16 ? __uint_as_float(p << 16) : half_to_float(p & 0xffffu); }
template <Mma TYPE>
__device__ __forceinline__ float high2(unsigned p) { return TYPE == Mma::bf16 ? __uint_as_float(p & 0xffff0000u) : half_to_float(p >> 16); }

// x = high + low, each a pair of 16-bit floats.
template <Mma TYPE>
__device__ __forceinline__ void split2(float x, float y, unsigned* high, unsigned* low) {
  *high = pack2<TYPE>(x, y);
  *low = pack2<TYPE>(x - low2<TYPE>(*high), y - high2<TYPE>(*high));
}

// Differences and products of pairs of fp16.
__device__ __forceinline__ unsigned subtract2(unsigned x, unsigned y) {
#if defined(PK_HOST_EMU)
  return float_to_half(half_to_float(x & 0xffffu) - half_to_float(y & 0xffffu)) | float_to_half(half_to_float(x >> 16) - half_to_float(y >> 16)) << 16;
#else
  unsigned d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(x), "r"(y));
  return d;
#endif
}
__device__ __forceinline__ unsigned multiply2(unsigned x, unsigned y) {
#if defined(PK_HOST_EMU)
  return float_to_half(half_to_float(x & 0xffffu) * half_to_float(y & 0xffffu)) | float_to_half(half_to_float(x >> 16) * half_to_float(y >> 16)) << 16;
#else
  unsigned d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(x), "r"(y));
  return d;
#endif
}

// (x & MASK) | 1024.0 in both halves: one LOP3, which has room for one constant only.
template <unsigned MASK>
__device__ __forceinline__ unsigned masked(unsigned x) {
#if defined(PK_HOST_EMU)
  return (x & MASK) | 0x64006400u;
#else
  unsigned y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "n"(MASK), "r"(0x64006400u));
  return y;
#endif
}

// 16, 8 or 4 bytes that are read once.
template <int BYTES>
__device__ __forceinline__ void load_once(const unsigned char* p, unsigned* w) {
#if defined(PK_HOST_EMU)
  memcpy(w, p, BYTES);
#else
  if constexpr (BYTES == 16)
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
  else if constexpr (BYTES == 8) asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
  else asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
#endif
}

// 2 bytes or 1.
template <int BYTES>
__device__ __forceinline__ unsigned load_short(const unsigned char* p) {
#if defined(PK_HOST_EMU)
  return BYTES == 2 ? p[0] | p[1] << 8 : p[0];
#else
  unsigned short x;
  if constexpr (BYTES == 2) asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(x) : "l"(p));
  else asm volatile("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=h"(x) : "l"(p));
  return x;
#endif
}

}  // namespace pikv
