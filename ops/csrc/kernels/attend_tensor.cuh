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
// the code of span.cuh; it leaves a part of its own.

namespace pikv {

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
    if ((int)blockIdx.x >= first) return attend_tail<FORMAT, T::tail_width, 4, T::shared>(a, (int)blockIdx.x - first, shared);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, P = a.f.page_size, of_column = units_of_column(a);
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
    q.kept = reinterpret_cast<uint4*>(shared + warp * ROWS * DIM) + lane;
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
      // Dividing unsigned numbers takes ten instructions less.
      const Column column(a, list, (int)((unsigned)u / (unsigned)of_column));
      const int start = column.first + (int)((unsigned)u % (unsigned)of_column) * a.unit;
      const int stop = column.page < 0 ? 0 : min(min(column.first + a.block, start + a.unit), limit - column.page * P);
      float page_top[T::sets], page_sum[T::sets];
#pragma unroll
      for (int set = 0; set < T::sets; ++set) page_top[set] = minus_infinity(), page_sum[set] = 0;
      if (stop > start) {
        TensorSpan<T> span;
        span.enter(a, a.pages + (long long)at(a.table, table + column.page) * a.f.record_bytes, own_head);
        if constexpr (!T::grouped) {
          span.load_keys(start, stop - 1);
          add_tensor_span<T>(a, span, q, start, stop, scale, sight, run, page_top, page_sum);
        } else {
#pragma unroll 1
          for (int first = start; first < stop; first += a.f.group - first % a.f.group) {
            const int end = min(stop, first + a.f.group - first % a.f.group), grid = first / a.f.group * 2 * DIM;
            span.load_keys(first, end - 1);
#pragma unroll
            for (int set = 0; set < T::sets; ++set)
              q.code(queries + set * 8 * DIM + 8 * lane, set, c, span.head + a.f.k_scale + grid, span.head + a.f.k_zero + grid);
            add_tensor_span<T>(a, span, q, first, end, scale, sight, run, page_top, page_sum);
          }
        }
      }
      if (a.page_lse && !(T::grouped && column.in_tail(a, limit, len))) {
#pragma unroll
        for (int set = 0; set < T::sets; ++set) {
          const float sum = lane_sum<1, 2>(page_sum[set]);
          if (c == 0 && 8 * set + r < num_rows) *page_lse_of(a, part.t, first_row + 8 * set + r, u / of_column) = (page_top[set] + log2f(sum)) * 0.6931471805599453f;
        }
      }
    }
    if (a.page_lse && part.begin == 0)  // columns beyond the length
      for (int g = threadIdx.x % ROWS; g < num_rows; g += ROWS)
        for (int column = (units_of(a, part.t) + of_column - 1) / of_column + (int)threadIdx.x / ROWS; column < a.num_columns; column += kBlock / ROWS)
          *page_lse_of(a, part.t, first_row + g, column) = minus_infinity();
    if constexpr (T::wide) __syncwarp();  // all lanes have read Q
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
              x = x * (run.unit * (code_factor<V::format>() / (kProbabilityScale * value_factor<V::format>(m, k)))) + z;
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
