// The shape of a block of the fp32 tier, and what its lanes load of a token: keys, values, their scales, the raw tail, as floats.
//
// A lane holds 8 neighbouring columns of each of its chunks, the lanes of a token lie side by side.

namespace pikv {

// FORMAT: that of a layout: K, V and whether the rotary columns of a latent are fp16, see page_format.h. WIDTH: the largest k_dim and v_dim served, 32, 64 or 128; 576 = latent (k_dim up to 576, v_dim up to 512,
// values are key columns).
// ROWS: query rows of a block, 0 = chosen here. PLAIN: no window, nothing hidden by causality, no lse of pages, and all ROWS are computed:
// nothing of that is asked in the loop. STEPS: tokens a lane works on together, 0 = chosen here.
template <int FORMAT, int WIDTH, int ROWS = 0, bool PLAIN = false, int STEPS = 0>
struct Tile {
  static constexpr int keys = key_format(FORMAT), values = value_format(FORMAT);
  static constexpr bool latent = WIDTH == 576, rope = rope_raw(FORMAT);
  static constexpr bool grouped = format_grouped(keys);
  static constexpr int rows = ROWS ? ROWS : latent ? 2 : 4;
  static constexpr bool plain = PLAIN;
  static constexpr int lanes = latent ? 32 : WIDTH / 8;  // of a token
  static constexpr int key_chunks = latent ? 3 : 1;      // of a lane
  static constexpr int value_chunks = latent ? 2 : 1;
  static constexpr int value_width = latent ? 512 : WIDTH;
  // Tokens of a lane that are in flight together: as many as 168 registers allow.
  static constexpr bool wide = keys == kFp32 || grouped || (latent && keys == kFp4);
  // Codes are not kept from scores to values, but read again, from L1: registers would be spilled.
  static constexpr bool reads_twice = latent && (grouped || keys == kFp8);
  static constexpr int steps = STEPS ? STEPS : latent ? (wide ? 1 : 2) : wide ? 2 : 4;
  static constexpr int tokens = steps * (32 / lanes);
  // Floats of shared memory: out, maximum and sum of every warp and row; in front, for page_lse, maximum and sum of every thread and row;
  // behind, what rows see and the row of work.
  static constexpr int page_floats = PLAIN ? 0 : 2 * rows * kBlock;
  static constexpr int shared = page_floats + kWarps * rows * (value_width + 2) + 2 * rows + Parts::shared;
};

__device__ __forceinline__ float half_of(const unsigned* pairs, int i) { return half_to_float(i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffffu); }

// One (table, head): where it lies, resolved once.
struct Place {
  const unsigned char* head;  // section of the kv head in the page being read
  const int* positions;       // of that page
  long long tail;             // element of the tail where this head starts
};

// Scale and zero of 8 columns, as the fp16 pairs they are stored as.
struct Grid {
  unsigned scale[4], zero[4];

  __device__ __forceinline__ void load(const Attend& a, const Place& place, long long group_start, int d) {
    if (d >= a.f.k_coded) return;
    load_words<4>(place.head + a.f.k_scale + 2 * (group_start + d), scale);
    load_words<4>(place.head + a.f.k_zero + 2 * (group_start + d), zero);
  }
};

// fp4: the scale of 8 columns and the exponent of the row, a byte each.
__device__ __forceinline__ unsigned load_fp4_scale(const unsigned char* scales, const unsigned char* exponents, int t, int dim, int d) {
  return __ldg(scales + t * fp4_blocks(dim) + d / kFp4Block) | (unsigned)__ldg(exponents + t) << 8;
}
__device__ __forceinline__ float fp4_scale(unsigned scale) { return fp8_to_float(scale & 0xffu) * power_of_two(scale >> 8); }

template <class T>
struct Keys {
  static constexpr int F = T::keys, words = Eight<F>::words, scales = F == kFp4 ? T::key_chunks : 1;
  unsigned word[T::steps][T::key_chunks][words];
  unsigned scale[T::steps][scales];  // fp8: of the token; fp4: of the columns

  __device__ __forceinline__ void load_chunk(const Attend& a, const Place& place, int t, int step, int c, int column, bool valid) {
    const unsigned char* row = place.head + a.f.k + (long long)t * a.f.k_row_bytes;
    const int d = column + 256 * c;
#pragma unroll
    for (int i = 0; i < words; ++i) word[step][c][i] = 0;
    if (valid && d < a.f.k_coded) load_eight<F>(row + d / 8 * Eight<F>::bytes, word[step][c]);
    if constexpr (F == kFp8) scale[step][0] = valid ? __ldg(reinterpret_cast<const unsigned short*>(place.head + a.f.k_scale) + t) : 0;
    if constexpr (F == kFp4)
      scale[step][c] = valid && d < a.f.k_coded ? load_fp4_scale(place.head + a.f.k_scale, place.head + a.f.k_zero, t, a.f.k_coded, d) : 0;
  }

  __device__ __forceinline__ void load(const Attend& a, const Place& place, int t, int step, int column, bool valid) {
#pragma unroll
    for (int c = 0; c < T::key_chunks; ++c) load_chunk(a, place, t, step, c, column, valid);
  }

  __device__ __forceinline__ void floats(int step, int chunk, const Grid& grid, float* x) const {
    unpack<F>(word[step][chunk], x);
    if constexpr (T::grouped) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = x[i] * half_of(grid.scale, i) + half_of(grid.zero, i);
    } else if constexpr (F == kFp8 || F == kFp4) {
      const float s = F == kFp8 ? half_to_float(scale[step][0]) : fp4_scale(scale[step][chunk % scales]);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] *= s;
    }
  }
};

// The rotary columns of a latent that are raw: 8 of one token, d of the key.
__device__ __forceinline__ void rope_floats(const Attend& a, const Place& place, int t, int d, bool valid, float* x) {
  const int width = a.f.k_dim - a.f.k_coded;
  unsigned w[4] = {};
  if (valid && d < a.f.k_dim) load_words<4>(place.head + a.f.rope + 2 * ((long long)t * width + d - a.f.k_coded), w);
  unpack<kFp16>(w, x);
}

// Raw keys of the group that is not full: 8 columns of one token.
__device__ __forceinline__ void tail_floats(const Attend& a, const Place& place, int t, int d, bool valid, float* x) {
  const long long from = place.tail + (long long)(t % a.f.group) * a.f.k_dim + d;
  unsigned w[8] = {};
  if (a.tail_type == kFp32) {
    if (valid && d < a.f.k_dim) load_words<8>(static_cast<const unsigned char*>(a.tail) + 4 * from, w);
    unpack<kFp32>(w, x);
    return;
  }
  if (valid && d < a.f.k_dim) load_words<4>(static_cast<const unsigned char*>(a.tail) + 2 * from, w);
  if (a.tail_type == kBf16) unpack<kBf16>(w, x);
  else unpack<kFp16>(w, x);
}

template <class T>
struct Values {
  static constexpr int F = T::values, words = Eight<F>::words;
  unsigned word[T::steps][words];
  unsigned scale[T::steps];  // of the token, fp16; the zero in the upper half; fp4: as of keys

  __device__ __forceinline__ void load(const Attend& a, const Place& place, int t, int step, int column, bool valid) {
    scale[step] = 0;
#pragma unroll
    for (int i = 0; i < words; ++i) word[step][i] = 0;
    if (valid && column < a.f.v_dim) load_eight<F>(place.head + a.f.v + (long long)t * a.f.v_row_bytes + column / 8 * Eight<F>::bytes, word[step]);
    if constexpr (F == kFp4) {
      if (valid && column < a.f.v_dim) scale[step] = load_fp4_scale(place.head + a.f.v_scale, place.head + a.f.v_zero, t, a.f.v_dim, column);
    } else if constexpr (F > kFp16) {
      if (valid) scale[step] = __ldg(reinterpret_cast<const unsigned short*>(place.head + a.f.v_scale) + t);
      if (format_grouped(F) && valid) scale[step] |= (unsigned)__ldg(reinterpret_cast<const unsigned short*>(place.head + a.f.v_zero) + t) << 16;
    }
  }

  __device__ __forceinline__ void floats(int step, float* x) const {
    unpack<F>(word[step], x);
    if constexpr (F == kFp4) {
      const float s = fp4_scale(scale[step]);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] *= s;
    } else if constexpr (F > kFp16) {
      const float s = half_to_float(scale[step] & 0xffffu), z = half_to_float(scale[step] >> 16);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = x[i] * s + z;
    }
  }
};

}  // namespace pikv
