// Stored codes as operands of mma_16816. A lane reads neighbouring bytes of a token: the order of columns inside a product is free, so that
// what lies side by side in memory goes to one lane, and Q is laid out in the same order. Codes become 16-bit floats: bf16 and fp16 as they
// are, integers as fp16 through 1024 + code, e4m3 as fp16, e2m1 as fp16 times the scale of its block.

namespace pikv {

constexpr int load_bytes(int bytes) { return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : bytes % 2 == 0 ? 2 : 1; }

// What is known of one side (keys: 4 lanes a token; values: 8 lanes a token) of DIM columns.
template <int F, int DIM, int LANES>
struct Side {
  static constexpr int format = F, bits = format_bits(F), row_bytes = DIM * bits / 8;
  static constexpr Mma type = F == kBf16 ? Mma::bf16 : Mma::fp16;
  static constexpr bool integer = format_grouped(F), coded = F > kFp16, by_row = coded && !integer;  // by_row: keys have scales of their rows
  static constexpr int bytes = load_bytes(row_bytes / LANES);  // of a load
  static constexpr int loads = row_bytes / LANES / bytes, words = (row_bytes / LANES + 3) / 4;
  static constexpr int run = bytes * 8 / bits;  // neighbouring columns of a lane
  static constexpr bool served = row_bytes % (LANES == 4 ? 16 : 8) == 0;  // keys: whole words of a lane, whose halves are pairs of codes

  // fp4: as many of a lane's columns share a scale; scales of a lane and token, a byte each, in this order.
  static constexpr int block_columns = run < 16 ? run : 16, blocks = F == kFp4 ? DIM / LANES / block_columns : 0, scale_words = (blocks + 3) / 4;

  // Column of the lane's column l.
  static __device__ __forceinline__ int column(int lane, int l) { return (l / run * LANES + lane) * run + l % run; }

  static __device__ __forceinline__ int first_block(int lane) { return lane * run / kFp4Block; }

  // From the lane's first byte of a token.
  static __device__ __forceinline__ void load(const unsigned char* from, unsigned* w) {
#pragma unroll
    for (int j = 0; j < loads; ++j) {
      if constexpr (bytes >= 4) {
        load_once<bytes>(from + bytes * LANES * j, w + bytes / 4 * j);
      } else {  // side by side
        const unsigned part = load_short<bytes>(from + bytes * LANES * j) << bytes * j % 4 * 8;
        w[bytes * j / 4] = bytes * j % 4 ? w[bytes * j / 4] | part : part;
      }
    }
  }
};

// The scales of a lane's columns, from its first one of the token (Side::first_block).
template <class S>
__device__ __forceinline__ void load_block_scales(const unsigned char* first, unsigned* w) {
  constexpr int step = S::run >= 32 ? 2 : 1;  // neighbouring blocks
#pragma unroll
  for (int k = 0; k < S::blocks; k += step) {
    const unsigned char* from = first + S::column(0, k * S::block_columns) / kFp4Block;
    const unsigned part = step == 2 ? __ldg(reinterpret_cast<const unsigned short*>(from)) : __ldg(from);
    w[k / 4] = k % 4 ? w[k / 4] | part << k % 4 * 8 : part;
  }
}

// How often a pair of codes is contained in what `pair` makes of them: a power of two.
template <int F>
__device__ __forceinline__ constexpr float pair_factor(int which) {
  return F == kInt4 ? (which % 2 ? 16.0f : 1.0f) : F == kInt2 ? (which % 4 == 0 ? 1.0f : which % 4 == 1 ? 4.0f : which % 4 == 2 ? 16.0f : 64.0f) : 1.0f;
}

// Two e4m3 as fp16, times 2^-8 where the device has no instruction for it.
template <bool UPPER>
__device__ __forceinline__ unsigned fp8_pair(unsigned x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  unsigned y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"((unsigned short)(UPPER ? x >> 16 : x)));
  return y;
#else
  const unsigned y = __byte_perm(x, 0, UPPER ? 0x3424 : 0x1404);
  return (y & 0x80008000u) | (y >> 1 & 0x3f803f80u);
#endif
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
constexpr float kFp8Factor = 1.0f;
#else
constexpr float kFp8Factor = 256.0f;
#endif

// The e4m3 scales in bytes 0 and 1 as fp16, exact.
__device__ __forceinline__ unsigned block_scales(unsigned x) {
  const unsigned y = fp8_pair<false>(x);
  return kFp8Factor == 1.0f ? y : multiply2(y, 0x5c005c00u);
}
constexpr float kFp4Factor = 16384.0f;

// What is missing of a code as an operand, besides pair_factor.
template <int F>
__device__ __forceinline__ constexpr float code_factor() {
  return F == kFp8 ? kFp8Factor : F == kFp4 ? kFp4Factor : 1.0f;
}

// Two codes as fp16, times pair_factor. int8, fp8: bytes 0 and 1 of x; int4: the nibbles `which` of both halves, int2: so the pairs of bits.
template <int F>
__device__ __forceinline__ unsigned pair(unsigned x, int which) {
  if constexpr (F == kInt8) return subtract2(__byte_perm(x, 0x64646464u, 0x4140), 0x64006400u);
  if constexpr (F == kInt4) {
    const unsigned y = which / 2 ? x >> 8 : x;
    return subtract2(which % 2 ? masked<0x00f000f0u>(y) : masked<0x000f000fu>(y), 0x64006400u);
  }
  if constexpr (F == kInt2) {
    const unsigned y = which / 4 ? x >> 8 : x;
    const unsigned z = which % 4 == 0 ? masked<0x00030003u>(y) : which % 4 == 1 ? masked<0x000c000cu>(y) : which % 4 == 2 ? masked<0x00300030u>(y) : masked<0x00c000c0u>(y);
    return subtract2(z, 0x64006400u);
  }
  if constexpr (F == kFp8) return fp8_pair<false>(x);
  return x;
}
// bytes 2 and 3 of x
template <int F>
__device__ __forceinline__ unsigned upper_pair(unsigned x) {
  if constexpr (F == kInt8) return subtract2(__byte_perm(x, 0x64646464u, 0x4342), 0x64006400u);
  return fp8_pair<true>(x);
}

// The four lower (ODD: upper) nibbles of the bytes of x, as the upper bytes of fp16: the bits of a code in their places, which is the code times
// 2^-14. With its scale no smaller than 2^-24, so nothing is rounded.
template <bool ODD>
__device__ __forceinline__ unsigned fp4_bytes(unsigned x) {
  return ((ODD ? x : x << 4) & 0x80808080u) | ((ODD ? x >> 3 : x << 1) & 0x0e0e0e0eu);
}
template <bool UPPER>
__device__ __forceinline__ unsigned fp4_pair(unsigned bytes) {
  return __byte_perm(bytes, 0, UPPER ? 0x3424 : 0x1404);
}
// Of the bytes 0 and 1 of x (UPPER: 2 and 3) their lower nibbles, then their upper ones.
__device__ __forceinline__ void fp4_pairs(unsigned x, bool upper, unsigned* y) {
  const unsigned even = fp4_bytes<false>(x), odd = fp4_bytes<true>(x);
  y[0] = upper ? fp4_pair<true>(even) : fp4_pair<false>(even), y[1] = upper ? fp4_pair<true>(odd) : fp4_pair<false>(odd);
}

// b0, b1 of product i from the words of a lane for one token.
template <int F>
__device__ __forceinline__ void key_operand(const unsigned* w, int i, unsigned* b) {
  if constexpr (F <= kFp16) b[0] = w[2 * i], b[1] = w[2 * i + 1];
  if constexpr (F == kInt8 || F == kFp8) b[0] = pair<F>(w[i], 0), b[1] = upper_pair<F>(w[i]);
  if constexpr (F == kInt4) b[0] = pair<F>(w[i / 2], 2 * (i % 2)), b[1] = pair<F>(w[i / 2], 2 * (i % 2) + 1);
  if constexpr (F == kFp4) fp4_pairs(w[i / 2], i % 2, b);
  if constexpr (F == kInt2) b[0] = pair<F>(w[i / 4], 2 * (i % 4)), b[1] = pair<F>(w[i / 4], 2 * (i % 4) + 1);
}

// The lane's column of element e (b0 low, b0 high, b1 low, b1 high) of product i, and the factor of its code.
template <int F>
__device__ __forceinline__ constexpr int key_column(int i, int e) {
  return F == kFp4 ? 4 * i + e / 2 + 2 * (e % 2) : F == kInt4 ? 8 * (i / 2) + 2 * (i % 2) + e / 2 + 4 * (e % 2) : F == kInt2 ? 16 * (i / 4) + 2 * (i % 4) + e / 2 + 8 * (e % 2) : 4 * i + e;
}
template <int F>
__device__ __forceinline__ constexpr float key_factor(int i, int e) {
  return F == kInt4 ? pair_factor<F>(e / 2) : F == kInt2 ? pair_factor<F>(2 * (i % 4) + e / 2) : 1.0f;
}

// a0, a1 of product m from the words of two neighbouring tokens: of each half, x is the lower. a2, a3: the same of the tokens 8 further.
template <int F>
__device__ __forceinline__ void value_operand(const unsigned* x, const unsigned* y, int m, unsigned* a) {
  if constexpr (F <= kFp16) a[0] = __byte_perm(x[m], y[m], 0x5410), a[1] = __byte_perm(x[m], y[m], 0x7632);
  if constexpr (F == kInt8 || F == kFp8) {
    const unsigned both = __byte_perm(x[m / 2], y[m / 2], m % 2 ? 0x7362 : 0x5140);
    a[0] = pair<F>(both, 0), a[1] = upper_pair<F>(both);
  }
  if constexpr (F == kFp4) fp4_pairs(__byte_perm(x[m / 4], y[m / 4], m % 4 / 2 ? 0x7362 : 0x5140), m % 2, a);
  if constexpr (F == kInt4) {
    const unsigned both = __byte_perm(x[m / 4], y[m / 4], m % 4 / 2 ? 0x7632 : 0x5410);
    a[0] = pair<F>(both, 2 * (m % 2)), a[1] = pair<F>(both, 2 * (m % 2) + 1);
  }
  if constexpr (F == kInt2) {
    const unsigned both = __byte_perm(x[m / 8], y[m / 8], m % 8 / 4 ? 0x7632 : 0x5410);
    a[0] = pair<F>(both, 2 * (m % 4)), a[1] = pair<F>(both, 2 * (m % 4) + 1);
  }
}
// Times the scales of the blocks: w of the key's token; x, y of two neighbouring tokens.
template <class S>
__device__ __forceinline__ void scale_key(const unsigned* w, int i, unsigned* b) {
  const int k = i / 2 * 8 / S::block_columns;
  const unsigned s = block_scales(__byte_perm(w[k / 4], 0, 0x4400 | k % 4 * 0x11));
  b[0] = multiply2(b[0], s), b[1] = multiply2(b[1], s);
}
template <class S>
__device__ __forceinline__ void scale_value(const unsigned* x, const unsigned* y, int m, unsigned* a) {
  const int k = 2 * m / S::block_columns;
  const unsigned s = block_scales(__byte_perm(x[k / 4], y[k / 4], k % 4 * 0x11 | 0x40));
  a[0] = multiply2(a[0], s), a[1] = multiply2(a[1], s);
}
// The lane's column of row r (k = 0) and row r + 8 (k = 1) of product m is 2 m + k; the factor of its code:
template <int F>
__device__ __forceinline__ constexpr float value_factor(int m, int k) {
  return F == kInt4 ? pair_factor<F>(k) : F == kInt2 ? pair_factor<F>(2 * (m % 4) + k) : 1.0f;
}

}  // namespace pikv
