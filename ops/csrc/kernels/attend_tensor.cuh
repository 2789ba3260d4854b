// Decode on tensor cores, for 16-bit queries: keys and values of DIM columns each, without shared memory for them.
//
//   S [rows, tokens]  = Q K^T    Q is A, K is B: a lane needs neighbouring columns of one token.
//   O^T [dims, rows]  = V^T P^T  V^T is A: a lane needs one column of neighbouring tokens, bytes of two tokens are interleaved. P^T is B, and
//                                C of the first product has exactly that layout.
// Integer keys: their scale goes into Q, once per group of tokens, their zero into one number per row and group. Values: the scale of a token goes
// into P, its zero into a sum of p z. So a code costs no arithmetic of its own, only its expansion to fp16. Q of coded keys, and P always, are the sum
// of two 16-bit numbers, so that the result is as exact as fp32 would be; both are scaled by powers of two that keep them in the range of fp16.
//
// Work is shared as in work.cuh. Behind the blocks of the workers there is one for each table: the raw keys of the group that is not full, by
// the code of attend.cuh; it leaves a part of its own.

namespace pikv {

template <int FORMAT, int DIM, int ROWS>
struct TensorTile {
  using K = Side<key_format(FORMAT), DIM, 4>;
  using V = Side<value_format(FORMAT), DIM, 8>;
  static constexpr int rows = ROWS, sets = ROWS / 8, value_width = DIM, products = DIM / 16;
  static constexpr bool grouped = K::integer, split = K::coded;  // split: Q in two parts
  static constexpr bool served = K::served && V::served && (ROWS == 8 || !split || DIM < 128);  // Q in two parts of 16 rows would be spilled
  static constexpr int tokens = (K::row_bytes + V::row_bytes) * sets > 256 || DIM * sets > 128 ? 16 : 32, columns = tokens / 8;  // of a tile
  // Floats of shared memory: out, maximum and sum of every warp and row; queries, in the order of a lane's columns; what rows see, the row of work.
  static constexpr int shared = kWarps * ROWS * (DIM + 2) + (split ? ROWS * DIM : 0) + 2 * ROWS + Parts::shared;
};
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

// Q as A, four registers a product: rows 0..7 and 8..15 of the first columns, then of the others. Of raw keys as it is given, else times what
// the codes lack, in two parts. With 8 rows the lower parts are rows 8..15. `add`: to every score of the group.
template <class T>
struct TensorQueries {
  static constexpr bool both = T::split && T::sets == 1;  // parts in one product
  unsigned high[T::products][4], low[T::split && !both ? T::products : 1][4];
  float factor[T::sets], add[T::sets];

  __device__ __forceinline__ void take(const Attend& a, long long row_of_lane, int set, int c, bool present) {
#pragma unroll
    for (int i = 0; i < T::products; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const long long d = T::K::column(c, key_column<T::K::format>(i, 2 * e));
        high[i][2 * e + set] = present ? __ldg(reinterpret_cast<const unsigned*>(a.q) + (row_of_lane * a.f.k_dim + d) / 2) : 0u;
        if (T::sets == 1) high[i][2 * e + 1] = kept_zero();
      }
  }

  // q: of this lane, its columns in order. scale, zero: of the group, null = none.
  __device__ __forceinline__ void code(const float* q, int set, int c, const unsigned char* scale, const unsigned char* zero) {
    float x[4 * T::products], most = 0, offset = 0;
#pragma unroll
    for (int l = 0; l < 4 * T::products; l += 8) {
      float y[8];
      load_floats8(q + l * 32, y);
      unsigned s[4], z[4];
      if (T::grouped) {
        const int d = T::K::column(c, l);
        load_words<4>(scale + 2 * d, s);
        load_words<4>(zero + 2 * d, z);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (T::grouped) offset += y[k] * half_of(z, k), y[k] *= half_of(s, k);
        x[l + k] = y[k], most = fmaxf(most, fabsf(y[k]));
      }
    }
    most = exponent_of(lane_max<1, 2>(most));
    const float inverse = inverse_of(most) * 64.0f;
    factor[set] = most * (1.0f / 64.0f) * (T::K::format == kFp8 ? kFp8Factor : 1.0f);
    add[set] = T::grouped ? lane_sum<1, 2>(offset) : 0.0f;
#pragma unroll
    for (int i = 0; i < T::products; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float first = x[key_column<T::K::format>(i, 2 * e)] * (inverse / key_factor<T::K::format>(i, 2 * e));
        const float second = x[key_column<T::K::format>(i, 2 * e + 1)] * (inverse / key_factor<T::K::format>(i, 2 * e + 1));
        split2<Mma::fp16>(first, second, &high[i][2 * e + set], both ? &high[i][2 * e + 1] : &low[both ? 0 : i][2 * e + set]);
      }
  }

  // As they are stored in shared memory: 8 columns of a lane side by side, then those of the next lane.
  static __device__ __forceinline__ void load_floats8(const float* from, float* x) {
#pragma unroll
    for (int k = 0; k < 8; k += 4) {
      const uint4 w = *reinterpret_cast<const uint4*>(from + k);
      x[k] = __uint_as_float(w.x), x[k + 1] = __uint_as_float(w.y), x[k + 2] = __uint_as_float(w.z), x[k + 3] = __uint_as_float(w.w);
    }
  }
};

// What a warp reads of one page: tokens [start, stop) of one group, the keys of the first tile already asked for.
template <class T>
struct TensorSpan {
  const unsigned char *head, *k, *v;  // k, v: the first bytes that this lane reads of a token
  const int* positions;
  unsigned keys[T::columns][T::K::words];

  __device__ __forceinline__ void enter(const Attend& a, const unsigned char* record, int own_head) {
    head = record + own_head * a.f.head_bytes, positions = reinterpret_cast<const int*>(record + a.f.positions);
    k = head + a.f.k + T::K::bytes * (threadIdx.x % 4), v = head + a.f.v + T::V::bytes * (threadIdx.x % 32 / 4);
  }

  __device__ __forceinline__ void load_keys(int t0, int last) {
#pragma unroll
    for (int b = 0; b < T::columns; ++b) T::K::load(row_of(k, min(t0 + 8 * b + (int)(threadIdx.x % 32 / 4), last), T::K::row_bytes), keys[b]);
  }
};

__device__ __forceinline__ unsigned load_pair(const unsigned char* head, long long block, int t) {
  return __ldg(reinterpret_cast<const unsigned*>(head + block) + t / 2);
}

template <class T>
__device__ __forceinline__ void add_tensor_span(const Attend& a, TensorSpan<T>& span, const TensorQueries<T>& q, int start, int stop, float scale,
                                                const int* sight, TensorRunning<T>& run, float* page_top, float* page_sum) {
  using K = typename T::K;
  using V = typename T::V;
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, last = stop - 1;
#pragma unroll 1
  for (int t0 = start; t0 < stop; t0 += T::tokens) {
    unsigned values[T::tokens / 16][4][V::words];
#pragma unroll
    for (int s = 0; s < T::tokens / 16; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        V::load(row_of(span.v, min(t0 + 16 * s + 2 * c + (i & 1) + 8 * (i >> 1), last), V::row_bytes), values[s][i]);
    float score[T::columns][4];
#pragma unroll
    for (int b = 0; b < T::columns; ++b) {
      score[b][0] = score[b][1] = score[b][2] = score[b][3] = 0;
#pragma unroll
      for (int i = 0; i < T::products; ++i) {
        unsigned k[2];
        key_operand<K::format>(span.keys[b], i, k);
        mma_16816<K::type>(score[b], q.high[i][0], q.high[i][1], q.high[i][2], q.high[i][3], k[0], k[1]);
        if constexpr (T::split && T::sets == 2) mma_16816<K::type>(score[b], q.low[i][0], q.low[i][1], q.low[i][2], q.low[i][3], k[0], k[1]);
      }
      if constexpr (T::split && T::sets == 1) score[b][0] += score[b][2], score[b][1] += score[b][3];
    }
    span.load_keys(t0 + T::tokens, last);  // of the next tile; at the end the last token again: a branch would cost more
    const bool whole = t0 + T::tokens <= stop, hides = !whole || a.window || a.causal;
    float v_scale[T::columns][2], v_zero[T::columns][2], ratio = 1.0f;
    if constexpr (V::coded) {  // of two neighbouring tokens at once; t0 is even, and there are bytes behind an odd last one
      float most = 0;
#pragma unroll
      for (int b = 0; b < T::columns; ++b) {
        const int t = t0 + 8 * b + 2 * c, from = min(t, last & ~1);
        const unsigned s = load_pair(span.head, a.f.v_scale, from), z = V::integer ? load_pair(span.head, a.f.v_zero, from) : 0;
#pragma unroll
        for (int e = 0; e < 2; ++e) v_scale[b][e] = half_of(&s, e), v_zero[b][e] = V::integer ? half_of(&z, e) : 0.0f;
      }
      if (!whole)
#pragma unroll
        for (int b = 0; b < T::columns; ++b)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (t0 + 8 * b + 2 * c + e > last) v_scale[b][e] = v_zero[b][e] = 0;
#pragma unroll
      for (int b = 0; b < T::columns; ++b) most = fmaxf(most, fmaxf(v_scale[b][0], v_scale[b][1]));
      const float unit = fmaxf(run.unit, exponent_of(lane_max<1, 2>(most)));
      ratio = run.unit * inverse_of(unit), run.unit = unit;
    }
    unsigned p[T::sets][T::columns], p_low[T::sets][T::columns];
    float k_scale[T::columns][2];
    if constexpr (K::format == kFp8) {
#pragma unroll
      for (int b = 0; b < T::columns; ++b) {
        const unsigned s = load_pair(span.head, a.f.k_scale, min(t0 + 8 * b + 2 * c, last & ~1));
        k_scale[b][0] = half_of(&s, 0), k_scale[b][1] = half_of(&s, 1);
      }
    }
#pragma unroll
    for (int set = 0; set < T::sets; ++set) {
      const float factor = T::split ? scale * q.factor[set] : scale, add = T::grouped ? scale * q.add[set] : 0.0f;
      float most = minus_infinity();
#pragma unroll
      for (int b = 0; b < T::columns; ++b)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = score[b][2 * set + e];
          if constexpr (K::format == kFp8) x *= k_scale[b][e];
          x = T::grouped ? x * factor + add : x * factor;
        }
      if (hides)
#pragma unroll
        for (int b = 0; b < T::columns; ++b)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int t = t0 + 8 * b + 2 * c + e, position = a.window || a.causal ? __ldg(span.positions + min(t, last)) : 0;
            const bool visible = t <= last && position >= sight[8 * set + r] && position <= sight[T::rows + 8 * set + r];
            if (!visible) score[b][2 * set + e] = minus_infinity();
          }
#pragma unroll
      for (int b = 0; b < T::columns; ++b) most = fmaxf(most, fmaxf(score[b][2 * set], score[b][2 * set + 1]));
      most = lane_max<1, 2>(most);
      if (a.page_lse) {
        const float highest = fmaxf(page_top[set], most), base = finite_or_zero(highest);
        page_sum[set] *= power2(page_top[set] - base), page_top[set] = highest;
#pragma unroll
        for (int b = 0; b < T::columns; ++b) page_sum[set] += power2(score[b][2 * set] - base) + power2(score[b][2 * set + 1] - base);
      }
      const float highest = fmaxf(run.top[set], most), base = finite_or_zero(highest), shrink = power2(run.top[set] - base);
      run.top[set] = highest, run.sum[set] *= shrink, run.zeros[set] *= shrink;
#pragma unroll
      for (int b = 0; b < T::columns; ++b) {
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          x[e] = power2(score[b][2 * set + e] - base), run.sum[set] += x[e];
          if constexpr (V::integer) run.zeros[set] += x[e] * v_zero[b][e];
          if constexpr (V::coded) x[e] *= v_scale[b][e] * (inverse_of(run.unit) * kProbabilityScale);
          else if constexpr (V::type == Mma::fp16) x[e] *= kProbabilityScale;
        }
        split2<V::type>(x[0], x[1], &p[set][b], &p_low[set][b]);
      }
      const float of_row = shrink * ratio;
      if (__any_sync(kAll, of_row != 1.0f)) {  // seldom, once the highest score has been seen
        const float shrink0 = __shfl_sync(kAll, of_row, 8 * c), shrink1 = __shfl_sync(kAll, of_row, 8 * c + 4);
#pragma unroll
        for (int m = 0; m < T::products; ++m) {
          float* o = run.o[set][m];
          o[0] *= shrink0, o[1] *= shrink1, o[2] *= shrink0, o[3] *= shrink1;
        }
      }
    }
#pragma unroll
    for (int s = 0; s < T::tokens / 16; ++s)
#pragma unroll
      for (int m = 0; m < T::products; ++m) {
        unsigned x[2], y[2];
        value_operand<V::format>(values[s][0], values[s][1], m, x);
        value_operand<V::format>(values[s][2], values[s][3], m, y);
#pragma unroll
        for (int set = 0; set < T::sets; ++set) {
          mma_16816<V::type>(run.o[set][m], x[0], x[1], y[0], y[1], p[set][2 * s], p[set][2 * s + 1]);
          mma_16816<V::type>(run.o[set][m], x[0], x[1], y[0], y[1], p_low[set][2 * s], p_low[set][2 * s + 1]);
        }
      }
  }
}

// The raw keys of the group that is not full, of one table: 4 rows after 4, a quarter of the tokens to a warp.
template <int FORMAT, int DIM, int ROWS>
__device__ __forceinline__ void attend_tail(const Attend& a, int t, float* shared) {
  constexpr int width = DIM <= 64 ? 64 : DIM <= 128 ? 128 : 256;
  using T = Tile<FORMAT, width, 4, false>;
  static_assert(kWarps * 4 * (width + 2) + 8 + T::page_floats <= TensorTile<FORMAT, DIM, ROWS>::shared, "the tail needs more shared memory than the rest");
  float *warp_top = shared + kWarps * 4 * width, *warp_sum = warp_top + kWarps * 4;
  float* page = warp_sum + kWarps * 4 + threadIdx.x;  // written, not read: the part has the lse
  int* sight = reinterpret_cast<int*>(warp_sum + kWarps * 4 + T::page_floats);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane % T::lanes * 8;
  const int n = t / a.H, h = t % a.H, own_head = a.f.num_kv_heads == 1 ? 0 : h, M = a.T * a.G, P = a.f.page_size;
  const int len = length_of(a, t), limit = len - len % a.f.group, page_column = limit / P;
  if (len == limit) return;
  bool listed = !a.list.data;
  for (int i = threadIdx.x; i < a.num_columns && a.list.data; i += kBlock)
    listed = listed || at(a.list, ((long long)n * a.list_heads + (a.list_heads == 1 ? 0 : h)) * a.num_columns + i) == page_column;
  const int quarter = (len - limit + kWarps - 1) / kWarps, start = limit + warp * quarter, stop = __syncthreads_or(listed) ? min(len, start + quarter) : start;
  const long long table = ((long long)n * a.table_heads + (a.table_heads == 1 ? 0 : h)) * a.max_pages;
  const unsigned char* record = a.pages + (long long)at(a.table, table + page_column) * a.f.record_bytes;
  const long long tail_row = at(a.tail_rows, (long long)n * a.tail_heads + (a.tail_heads == 1 ? 0 : h));
  Place place = {};
  place.head = record + own_head * a.f.head_bytes, place.positions = reinterpret_cast<const int*>(record + a.f.positions);
  place.tail = (tail_row * a.f.num_kv_heads + own_head) * a.f.group * a.f.k_dim;
#pragma unroll 1
  for (int first_row = 0; first_row < M; first_row += 4) {
    const int num_rows = min(4, M - first_row);
    float q[4][1][8];
    Running<T> run;
    look<T>(a, n / a.S, first_row, num_rows, sight);
    __syncthreads();
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const int m = first_row + min(g, num_rows - 1);
      const long long row = ((long long)(n / a.S) * a.T + m / a.G) * a.H * a.G + (long long)h * a.G + m % a.G;
      run.top[g] = minus_infinity(), run.sum[g] = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        q[g][0][i] = column + i < DIM ? load_float(a.q, a.q_type, row * DIM + column + i) * (a.scale * 1.4426950408889634f) : 0.0f;
        run.acc[g][0][i] = 0;
      }
    }
    if (start < stop)
      add_span<FORMAT, width, 4, false, true>(a, place, start - page_column * P, stop - page_column * P, num_rows, sight, q, run, page);
    gather_warps<T>(run, num_rows, shared, warp_top, warp_sum);
    __syncthreads();
    write_part<T>(a, {t, 0, 0, a.tail_parts + t}, first_row, num_rows, shared, warp_top, warp_sum);
    __syncthreads();
  }
}

// Grid: x = (worker, pass), then a block for each table that may have a tail.
template <int FORMAT, int DIM, int ROWS>
__global__ void __launch_bounds__(kBlock, 2) attend_tensor_kernel(const Attend a) {
  using T = TensorTile<FORMAT, DIM, ROWS>;
  using K = typename T::K;
  using V = typename T::V;
  PK_SHARED(shared);
  float* queries = shared + kWarps * ROWS * DIM;
  float* warp_top = queries + (T::split ? ROWS * DIM : 0);
  float* warp_sum = warp_top + kWarps * ROWS;
  int* sight = reinterpret_cast<int*>(warp_sum + kWarps * ROWS);
  const int M = a.T * a.G, passes = (M + ROWS - 1) / ROWS;
  if constexpr (T::grouped) {
    const int first = (int)gridDim.x - a.R * a.S * a.H;
    if ((int)blockIdx.x >= first) return attend_tail<FORMAT, DIM, ROWS>(a, (int)blockIdx.x - first, shared);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, P = a.f.page_size, units_of_page = (P + a.unit - 1) / a.unit;
  const int first_row = (int)(blockIdx.x % passes) * ROWS, num_rows = min(ROWS, M - first_row);
  const float scale = a.scale * 1.4426950408889634f;
  Part part;
  Parts parts(a, (int)(blockIdx.x / passes), sight + 2 * ROWS);
#pragma unroll 1
  while (parts.get(a, (int)(blockIdx.x / passes), &part)) {
    const int n = part.t / a.H, h = part.t % a.H, own_head = a.f.num_kv_heads == 1 ? 0 : h, len = length_of(a, part.t);
    const int limit = T::grouped ? len - len % a.f.group : len;
    const long long table = ((long long)n * a.table_heads + (a.table_heads == 1 ? 0 : h)) * a.max_pages;
    const long long list = ((long long)n * a.list_heads + (a.list_heads == 1 ? 0 : h)) * a.num_columns;
    const auto q_row = [&](int g) {
      const int m = first_row + min(g, num_rows - 1);
      return ((long long)(n / a.S) * a.T + m / a.G) * a.H * a.G + (long long)h * a.G + m % a.G;
    };
    TensorQueries<T> q;
    TensorRunning<T> run;
    look<T>(a, n / a.S, first_row, num_rows, sight);
    if constexpr (T::split) {  // [set, 8 columns of a lane, lane, 8]
      for (int i = threadIdx.x; i < ROWS * DIM; i += kBlock) {
        const int k = i % 8, of = i / 8 % 32, l = i / 256 % (DIM / 32) * 8 + k, g = i / (8 * DIM) * 8 + of / 4;
        queries[i] = g < num_rows ? load_float(a.q, a.q_type, q_row(g) * DIM + K::column(of % 4, l)) : 0.0f;
      }
    }
    __syncthreads();
    run.unit = 0x1p-95f;
#pragma unroll
    for (int set = 0; set < T::sets; ++set) {
      run.top[set] = minus_infinity(), run.sum[set] = run.zeros[set] = 0;
#pragma unroll
      for (int m = 0; m < T::products; ++m) run.o[set][m][0] = run.o[set][m][1] = run.o[set][m][2] = run.o[set][m][3] = 0;
      if constexpr (!T::split) q.take(a, q_row(8 * set + r), set, c, 8 * set + r < num_rows);
      else if constexpr (!T::grouped) q.code(queries + set * 8 * DIM + 8 * lane, set, c, nullptr, nullptr);
    }
#pragma unroll 1
    for (int u = part.begin + warp; u < part.end; u += kWarps) {
      const int column = u / units_of_page, offset = u % units_of_page * a.unit, page_column = a.list.data ? at(a.list, list + column) : column;
      const int stop = page_column < 0 ? 0 : min(min(P, offset + a.unit), limit - page_column * P);
      float page_top[T::sets], page_sum[T::sets];
#pragma unroll
      for (int set = 0; set < T::sets; ++set) page_top[set] = minus_infinity(), page_sum[set] = 0;
      if (stop > offset) {
        TensorSpan<T> span;
        span.enter(a, a.pages + (long long)at(a.table, table + page_column) * a.f.record_bytes, own_head);
        if constexpr (!T::grouped) {
          span.load_keys(offset, stop - 1);
          add_tensor_span<T>(a, span, q, offset, stop, scale, sight, run, page_top, page_sum);
        } else {
#pragma unroll 1
          for (int first = offset; first < stop; first += a.f.group - first % a.f.group) {
            const int end = min(stop, first + a.f.group - first % a.f.group), grid = first / a.f.group * 2 * DIM;
            span.load_keys(first, end - 1);
#pragma unroll
            for (int set = 0; set < T::sets; ++set)
              q.code(queries + set * 8 * DIM + 8 * lane, set, c, span.head + a.f.k_scale + grid, span.head + a.f.k_zero + grid);
            add_tensor_span<T>(a, span, q, first, end, scale, sight, run, page_top, page_sum);
          }
        }
      }
      if (a.page_lse) {
#pragma unroll
        for (int set = 0; set < T::sets; ++set) {
          const float sum = lane_sum<1, 2>(page_sum[set]);
          if (c == 0 && 8 * set + r < num_rows) *page_lse_of(a, part.t, first_row + 8 * set + r, column) = (page_top[set] + log2f(sum)) * 0.6931471805599453f;
        }
      }
    }
    if (a.page_lse && part.begin == 0)  // columns beyond the length
      for (int g = threadIdx.x % ROWS; g < num_rows; g += ROWS)
        for (int column = (units_of(a, part.t) + units_of_page - 1) / units_of_page + (int)threadIdx.x / ROWS; column < a.num_columns; column += kBlock / ROWS)
          *page_lse_of(a, part.t, first_row + g, column) = minus_infinity();
#pragma unroll
    for (int set = 0; set < T::sets; ++set) {
      const float sum = lane_sum<1, 2>(run.sum[set]), zeros = V::integer ? lane_sum<1, 2>(run.zeros[set]) : 0.0f;
      if (c == 0) warp_top[warp * ROWS + 8 * set + r] = run.top[set], warp_sum[warp * ROWS + 8 * set + r] = sum;
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // row 2c + e
        const float z = __shfl_sync(kAll, zeros, 8 * c + 4 * e);
#pragma unroll
        for (int m = 0; m < T::products; ++m)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            float x = run.o[set][m][2 * k + e];
            if constexpr (V::coded)
              x = x * (run.unit * ((V::format == kFp8 ? kFp8Factor : 1.0f) / (kProbabilityScale * value_factor<V::format>(m, k)))) + z;
            else if constexpr (V::type == Mma::fp16) x *= 1.0f / kProbabilityScale;
            shared[(warp * ROWS + 8 * set + 2 * c + e) * DIM + V::column(r, 2 * m + k)] = x;
          }
      }
    }
    __syncthreads();
    write_part<T>(a, part, first_row, num_rows, shared, warp_top, warp_sum);
    if (threadIdx.x == 0) parts.advance(a);
    __syncthreads();
  }
}

}  // namespace pikv
