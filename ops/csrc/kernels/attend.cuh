// Attention of up to Tile::rows query rows to the pages of one block table and kv head: decode and prefill_cached.
//
// A block of 4 warps takes the parts of one worker (work.cuh) for one pass: every warp takes units of tokens of its own and keeps a running
// softmax over them, and the four are merged at the end. A group with more rows takes several passes, so that registers do not grow with it.
// A lane holds 8 neighbouring columns of each of its chunks, the lanes of a token lie side by side. Lengths are read here and nowhere on the
// host.

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

// The running softmax of the rows of a block, in powers of two: out = acc / sum, lse = (top + log2 sum) ln 2. `sum` counts the tokens of
// this lane only.
template <class T>
struct Running {
  float top[T::rows], sum[T::rows], acc[T::rows][T::value_chunks][8];
};

// Which positions the rows of a block see, in shared memory: sight[g] to sight[rows + g]. The caller puts a barrier behind it.
template <class T>
__device__ __forceinline__ void look(const Attend& a, int request, int first_row, int num_rows, int* sight) {
  constexpr int far = 0x7fffffff;
  const int g = threadIdx.x;
  if (g >= T::rows) return;
  const bool asks = (a.window || a.causal) && g < num_rows;
  const int asked = asks ? at(a.asked, (long long)request * a.T + (first_row + g) / a.G) : far;
  sight[g] = asks && a.window ? max(asked - a.window, -1) + 1 : -far;
  sight[T::rows + g] = asks && a.causal ? asked : far;
}

__device__ __forceinline__ float finite_or_zero(float top) { return top == minus_infinity() ? 0.0f : top; }

// TAIL: the keys are raw, in the tail; few tokens of each sequence are, so one at a time will do.
template <int FORMAT, int WIDTH, int ROWS, bool PLAIN, bool TAIL>
__device__ __forceinline__ void add_span(const Attend& a, const Place& place, int start, int stop, int num_rows, const int* sight,
                                         const float (*q)[Tile<FORMAT, WIDTH, ROWS, PLAIN>::key_chunks][8],
                                         Running<Tile<FORMAT, WIDTH, ROWS, PLAIN>>& run, float* page) {
  using T = Tile<FORMAT, WIDTH, ROWS, PLAIN, TAIL ? 1 : 0>;
  const int lane = threadIdx.x % 32, column = lane % T::lanes * 8, sub = lane / T::lanes;
  const long long grid = (long long)(start / a.f.group) * a.f.k_coded;
  Grid kept = {};
  if constexpr (T::grouped && !T::latent && !TAIL) kept.load(a, place, grid, column);
#pragma unroll 1
  for (int t0 = start; t0 < stop; t0 += T::tokens) {
    Keys<T> keys;
    Values<T> values;
    float score[T::steps][T::rows], x[8];
    // Of raw rotary columns, which no value has, `as_keys` only; zeros else.
    const auto key_floats = [&](int step, int c, bool as_keys) {
      if (T::rope && as_keys && column + 256 * c >= a.f.k_coded) {
        const int t = t0 + step * (32 / T::lanes) + sub;
        return rope_floats(a, place, t, column + 256 * c, t < stop, x);
      }
      Grid used = kept;  // a latent lane has too many columns to keep theirs in registers: read again, from L1
      if constexpr (T::grouped && T::latent) used.load(a, place, grid, column + 256 * c);
      if constexpr (T::reads_twice) {
        const int t = t0 + step * (32 / T::lanes) + sub;
        keys.load_chunk(a, place, t, step, c, column, t < stop);
      }
      keys.floats(step, c, used, x);
    };
#pragma unroll
    for (int step = 0; step < T::steps; ++step) {
      const int t = t0 + step * (32 / T::lanes) + sub;
      if constexpr (!TAIL && !T::reads_twice) keys.load(a, place, t, step, column, t < stop);
      if constexpr (!T::latent) values.load(a, place, t, step, column, t < stop);
    }
#pragma unroll
    for (int step = 0; step < T::steps; ++step) {
      const int t = t0 + step * (32 / T::lanes) + sub;
      const bool valid = t < stop;
      const int position = !PLAIN && valid && (a.window || a.causal) ? __ldg(place.positions + t) : 0;
#pragma unroll
      for (int g = 0; g < T::rows; ++g) score[step][g] = 0;
#pragma unroll
      for (int c = 0; c < T::key_chunks; ++c) {
        if constexpr (TAIL) tail_floats(a, place, t, column + 256 * c, valid, x);
        else key_floats(step, c, true);
#pragma unroll
        for (int g = 0; g < T::rows; ++g) {
          if (!PLAIN && g >= num_rows) continue;
#pragma unroll
          for (int i = 0; i < 8; ++i) score[step][g] += q[g][c][i] * x[i];
        }
      }
#pragma unroll
      for (int g = 0; g < T::rows; ++g) {
        if (!PLAIN && g >= num_rows) continue;
        const float s = lane_sum<1, T::lanes / 2>(score[step][g]);
        bool visible = valid;
        if constexpr (!PLAIN) visible = valid && position >= sight[g] && position <= sight[T::rows + g];
        score[step][g] = visible ? s : minus_infinity();
      }
    }
#pragma unroll
    for (int g = 0; g < T::rows; ++g) {
      if (!PLAIN && g >= num_rows) continue;
      float top = score[0][g];
#pragma unroll
      for (int step = 1; step < T::steps; ++step) top = fmaxf(top, score[step][g]);
      top = lane_max<T::lanes, 16>(top);
      if (!PLAIN && a.page_lse) {
        float* state = page + 2 * g * kBlock;
        const float highest = fmaxf(state[0], top), base = finite_or_zero(highest);
        float sum = state[kBlock] * power2(state[0] - base);
#pragma unroll
        for (int step = 0; step < T::steps; ++step) sum += power2(score[step][g] - base);
        state[0] = highest, state[kBlock] = sum;
      }
      const float highest = fmaxf(run.top[g], top), base = finite_or_zero(highest), shrink = power2(run.top[g] - base);
      run.top[g] = highest;
      run.sum[g] *= shrink;
#pragma unroll
      for (int c = 0; c < T::value_chunks; ++c)
#pragma unroll
        for (int i = 0; i < 8; ++i) run.acc[g][c][i] *= shrink;
#pragma unroll
      for (int step = 0; step < T::steps; ++step) {
        score[step][g] = power2(score[step][g] - base);
        run.sum[g] += score[step][g];
      }
    }
#pragma unroll
    for (int step = 0; step < T::steps; ++step) {
      const int t = t0 + step * (32 / T::lanes) + sub;
#pragma unroll
      for (int c = 0; c < T::value_chunks; ++c) {
        if constexpr (!T::latent) values.floats(step, x);
        else if constexpr (TAIL) tail_floats(a, place, t, column + 256 * c, t < stop, x);
        else key_floats(step, c, false);
#pragma unroll
        for (int g = 0; g < T::rows; ++g) {
          if (!PLAIN && g >= num_rows) continue;
#pragma unroll
          for (int i = 0; i < 8; ++i) run.acc[g][c][i] += score[step][g] * x[i];
        }
      }
    }
  }
}

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

// Grid: x = (worker, pass), passes fastest so that they find the pages in L2.
template <int FORMAT, int WIDTH, int ROWS, bool PLAIN>
__global__ void __launch_bounds__(kBlock, 3) attend_kernel(const Attend a) {
  using T = Tile<FORMAT, WIDTH, ROWS, PLAIN>;
  PK_SHARED(shared);
  float* page = shared + threadIdx.x;  // of this thread: no barrier
  float* warp_out = shared + T::page_floats;
  float* warp_top = warp_out + kWarps * T::rows * T::value_width;
  float* warp_sum = warp_top + kWarps * T::rows;
  const int warp = threadIdx.x / 32, column = threadIdx.x % T::lanes * 8;
  const int M = a.T * a.G, passes = (M + T::rows - 1) / T::rows;
  const int first_row = (int)(blockIdx.x % passes) * T::rows, num_rows = min(T::rows, M - first_row);
  const int P = a.f.page_size, segment = T::grouped ? a.f.group : P, units_of_page = (P + a.unit - 1) / a.unit;
  const long long all_heads = (long long)a.H * a.G;
  int* sight = reinterpret_cast<int*>(warp_sum + kWarps * T::rows);
  Part part;
  Parts parts(a, (int)(blockIdx.x / passes), sight + 2 * T::rows);
#pragma unroll 1
  while (parts.get(a, (int)(blockIdx.x / passes), &part)) {
    const int n = part.t / a.H, h = part.t % a.H, own_head = T::latent || a.f.num_kv_heads == 1 ? 0 : h;  // of a latent there is one
    const int len = length_of(a, part.t), limit = T::grouped ? len - len % segment : len;  // entries from here on are in the tail
    const int table = n * a.table_heads + (a.table_heads == 1 ? 0 : h), list = n * a.list_heads + (a.list_heads == 1 ? 0 : h);
    float q[T::rows][T::key_chunks][8];
    Running<T> run;
    if constexpr (!PLAIN) {
      look<T>(a, n / a.S, first_row, num_rows, sight);
      __syncthreads();
    }
#pragma unroll
    for (int g = 0; g < T::rows; ++g) {
      const int m = first_row + g;
      const bool present = g < num_rows;
      const long long row = ((long long)(n / a.S) * a.T + m / a.G) * all_heads + (long long)h * a.G + m % a.G;
      run.top[g] = minus_infinity(), run.sum[g] = 0;
#pragma unroll
      for (int c = 0; c < T::key_chunks; ++c)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int d = column + 256 * c + i;
          q[g][c][i] = present && d < a.f.k_dim ? load_float(a.q, a.q_type, row * a.f.k_dim + d) * (a.scale * 1.4426950408889634f) : 0.0f;
        }
#pragma unroll
      for (int c = 0; c < T::value_chunks; ++c)
#pragma unroll
        for (int i = 0; i < 8; ++i) run.acc[g][c][i] = 0;
    }
    Place place = {};
    int tail_column = -1;  // which of my columns holds tokens whose keys are in the tail
    const auto enter_page = [&](int page_column) {
      const unsigned char* record = a.pages + (long long)at(a.table, (long long)table * a.max_pages + page_column) * a.f.record_bytes;
      place.head = record + own_head * a.f.head_bytes;
      place.positions = reinterpret_cast<const int*>(record + a.f.positions);
      if (!PLAIN && a.page_lse)
        for (int g = 0; g < T::rows; ++g) page[2 * g * kBlock] = minus_infinity(), page[(2 * g + 1) * kBlock] = 0;
    };
#pragma unroll 1
    for (int u = part.begin + warp; u < part.end; u += kWarps) {
      const int c = u / units_of_page, offset = u % units_of_page * a.unit, page_column = a.list.data ? at(a.list, (long long)list * a.num_columns + c) : c;
      const int stop = page_column < 0 ? 0 : min(min(P, offset + a.unit), limit - page_column * P);
      if (T::grouped && page_column >= 0 && limit < len && limit / P == page_column && limit % P / a.unit * a.unit == offset) tail_column = c;
      if (stop > offset) {
        enter_page(page_column);
        if constexpr (!T::grouped) {
          add_span<FORMAT, WIDTH, ROWS, PLAIN, false>(a, place, offset, stop, num_rows, sight, q, run, page);
        } else {
#pragma unroll 1
          for (int first = offset; first < stop; first += segment - first % segment)
            add_span<FORMAT, WIDTH, ROWS, PLAIN, false>(a, place, first, min(stop, first + segment - first % segment), num_rows, sight, q, run, page);
        }
      }
      if (!PLAIN && a.page_lse) write_page_lse<T>(a, n, h, first_row, num_rows, c, stop > offset ? page : nullptr);
    }
    if constexpr (T::grouped) {
      if (tail_column >= 0) {
        enter_page(limit / P);
        place.tail = ((long long)at(a.tail_rows, (long long)n * a.tail_heads + (a.tail_heads == 1 ? 0 : h)) * a.f.num_kv_heads + own_head) * segment * a.f.k_dim;
        add_span<FORMAT, WIDTH, ROWS, PLAIN, true>(a, place, limit % P, len - limit / P * P, num_rows, sight, q, run, page);
        if (!PLAIN && a.page_lse) write_page_lse<T>(a, n, h, first_row, num_rows, tail_column, page, true);
      }
    }
    if (!PLAIN && a.page_lse && part.begin == 0)  // columns beyond the length
      for (int c = units_of(a, part.t) / units_of_page + (int)threadIdx.x / T::rows + (units_of(a, part.t) % units_of_page != 0); c < a.num_columns; c += kBlock / T::rows) {
        const int g = threadIdx.x % T::rows, m = first_row + g;
        if (g < num_rows) a.page_lse[(((long long)n * a.T + m / a.G) * all_heads + (long long)h * a.G + m % a.G) * a.num_columns + c] = minus_infinity();
      }
    gather_warps<T>(run, num_rows, warp_out, warp_top, warp_sum);
    __syncthreads();
    write_part<T>(a, part, first_row, num_rows, warp_out, warp_top, warp_sum);
    if (threadIdx.x == 0) parts.advance(a);
    __syncthreads();
  }
}

}  // namespace pikv
