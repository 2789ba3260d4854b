// Shared memory, reductions over a warp, indices of either width.

#if defined(PK_HOST_EMU)
#define PK_SHARED(name) float* name = static_cast<float*>(simt::shared())
#else
#define PK_SHARED(name)                            \
  extern __shared__ __align__(16) float pk_shared[]; \
  float* name = pk_shared
#endif

namespace pikv {

constexpr int kBlock = 128;  // threads of every block here
constexpr int kWarps = kBlock / 32;
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

__device__ __forceinline__ int at(const Index& x, long long i) {
  if (!x.wide) return __ldg(static_cast<const int*>(x.data) + i);
  const long long value = __ldg(static_cast<const long long*>(x.data) + i);
  return value < -1 ? -1 : value > 0x7fffffff ? 0x7fffffff : (int)value;
}

// Sum and maximum over the lanes whose numbers differ in bits [LOW, HIGH]; powers of two.
template <int LOW, int HIGH>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int bit = HIGH; bit >= LOW; bit >>= 1) x += __shfl_xor_sync(kAll, x, bit);
  return x;
}

template <int LOW, int HIGH>
__device__ __forceinline__ float lane_max(float x) {
#pragma unroll
  for (int bit = HIGH; bit >= LOW; bit >>= 1) x = fmaxf(x, __shfl_xor_sync(kAll, x, bit));
  return x;
}

// N 32-bit words; the address is a multiple of 4 N bytes, at most 16.
template <int N>
__device__ __forceinline__ void load_words(const unsigned char* from, unsigned* w) {
  if constexpr (N == 1) {
    w[0] = __ldg(reinterpret_cast<const unsigned*>(from));
  } else if constexpr (N == 2) {
    const uint2 x = __ldg(reinterpret_cast<const uint2*>(from));
    w[0] = x.x, w[1] = x.y;
  } else {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const uint4 x = __ldg(reinterpret_cast<const uint4*>(from) + i);
      w[4 * i] = x.x, w[4 * i + 1] = x.y, w[4 * i + 2] = x.z, w[4 * i + 3] = x.w;
    }
  }
}

// 4 floats from a 16-byte boundary.
__device__ __forceinline__ void load_floats4(const float* from, float* x) {
  unsigned w[4];
  load_words<4>(reinterpret_cast<const unsigned char*>(from), w);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(w[i]);
}

// 2^x. The device's own approximation, two units in the last place off: exp2f is five instructions.
__device__ __forceinline__ float power2(float x) {
#if defined(PK_HOST_EMU)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace pikv
