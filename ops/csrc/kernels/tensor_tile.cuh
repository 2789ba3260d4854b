// The shape of a block on tensor cores, what it keeps of a running softmax, and the numbers that keep operands in the range of fp16.

namespace pikv {

// DIM: 64, 96, 128, 192 or 256 columns of keys and values. ROWS: query rows of a block, 8 or 16.
template <int FORMAT, int DIM, int ROWS>
struct TensorTile {
  using K = Side<key_format(FORMAT), DIM, 4>;
  using V = Side<value_format(FORMAT), DIM, 8>;
  static constexpr int rows = ROWS, sets = ROWS / 8, value_width = DIM, products = DIM / 16;
  static constexpr bool grouped = K::integer, split = K::coded;  // split: Q in two parts
  static constexpr bool wide = DIM > 128;  // Q waits in shared memory, where a warp's O will lie
  static constexpr bool late = wide && (K::row_bytes + V::row_bytes) > 768;  // a late tile's values are asked for when its scores are there, the next keys when it is done
  static constexpr bool served = K::served && V::served && (ROWS == 8 || (DIM <= 128 && (!split || DIM < 128)));  // else registers would be spilled
  static constexpr int tokens = (K::row_bytes + V::row_bytes) * sets > 256 || DIM * sets > 128 ? 16 : 32, columns = tokens / 8;  // of a tile
  static constexpr int tail_width = DIM <= 64 ? 64 : DIM <= 128 ? 128 : 256;  // of Tile
  // Floats of shared memory: out, maximum and sum of every warp and row; queries, in the order of a lane's columns; what rows see, the row of work.
  static constexpr int shared = kWarps * ROWS * (DIM + 2) + (split ? ROWS * DIM : 0) + 2 * ROWS + Parts::shared;
};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kLateValuesFirst = true;  // late values before the softmax: for either architecture what does not spill registers
#else
constexpr bool kLateValuesFirst = false;  // late values behind it
#endif
constexpr float kProbabilityScale = 256.0f;  // keeps p * scale, and the lower part of p, in fp16's normal range

__device__ __forceinline__ float exponent_of(float x) { return __uint_as_float(max(__float_as_uint(x) & 0x7f800000u, 0x10000000u)); }
__device__ __forceinline__ float inverse_of(float power) { return __uint_as_float(0x7f000000u - __float_as_uint(power)); }

// Token t of a block of rows, from a lane's place in the first: one multiplication into 64 bits.
__device__ __forceinline__ const unsigned char* row_of(const unsigned char* first, int t, int row_bytes) { return first + (unsigned long long)(unsigned)t * (unsigned)row_bytes; }

// The running softmax of a lane's row r of each set, in powers of two, and O of its columns. sum and zeros count this lane's tokens only.
template <class T>
struct TensorRunning {
  float top[T::sets], sum[T::sets], zeros[T::sets], o[T::sets][T::products][4];
  float unit;  // of o: the largest scale of a value so far, a power of two
};

}  // namespace pikv
