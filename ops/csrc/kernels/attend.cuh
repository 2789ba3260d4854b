// Attention of up to Tile::rows query rows to the pages of one block table and kv head: decode and prefill_cached.
//
// A block of 4 warps takes the parts of one worker (work.cuh) for one pass: every warp takes units of tokens of its own and keeps a running
// softmax over them, and the four are merged at the end. A group with more rows takes several passes, so that registers do not grow with it.
// Lengths are read here and nowhere on the host.

namespace pikv {

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
  const int P = a.f.page_size, segment = T::grouped ? a.f.group : P, of_column = units_of_column(a);
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
    int tail_unit = part.end;  // my first one that holds tokens whose keys are in the tail
    const auto enter_page = [&](int page_column) {
      const unsigned char* record = a.pages + (long long)at(a.table, (long long)table * a.max_pages + page_column) * a.f.record_bytes;
      place.head = record + own_head * a.f.head_bytes;
      place.positions = reinterpret_cast<const int*>(record + a.f.positions);
      if (!PLAIN && a.page_lse)
        for (int g = 0; g < T::rows; ++g) page[2 * g * kBlock] = minus_infinity(), page[(2 * g + 1) * kBlock] = 0;
    };
#pragma unroll 1
    for (int u = part.begin + warp; u < part.end; u += kWarps) {
      const Column column(a, (long long)list * a.num_columns, u / of_column);
      const int start = column.first + u % of_column * a.unit, end = min(column.first + a.block, start + a.unit);
      const int stop = column.page < 0 ? 0 : min(end, limit - column.page * P);
      if (T::grouped && tail_unit == part.end && column.page >= 0 && min(end, len - column.page * P) > max(start, limit - column.page * P)) tail_unit = u;
      if (stop > start) {
        enter_page(column.page);
        if constexpr (!T::grouped) {
          add_span<FORMAT, WIDTH, ROWS, PLAIN, false>(a, place, start, stop, num_rows, sight, q, run, page);
        } else {
#pragma unroll 1
          for (int first = start; first < stop; first += segment - first % segment)
            add_span<FORMAT, WIDTH, ROWS, PLAIN, false>(a, place, first, min(stop, first + segment - first % segment), num_rows, sight, q, run, page);
        }
      }
      if (!PLAIN && a.page_lse) write_page_lse<T>(a, n, h, first_row, num_rows, u / of_column, stop > start ? page : nullptr);
    }
    if constexpr (T::grouped) {
#pragma unroll 1
      for (int u = tail_unit; u < part.end; u += kWarps) {
        const Column column(a, (long long)list * a.num_columns, u / of_column);
        const int unit_start = column.first + u % of_column * a.unit, start = max(unit_start, limit - column.page * P);
        const int stop = column.page < 0 ? 0 : min(min(column.first + a.block, unit_start + a.unit), len - column.page * P);
        if (stop <= start) continue;
        enter_page(column.page);
        place.tail = ((long long)at(a.tail_rows, (long long)n * a.tail_heads + (a.tail_heads == 1 ? 0 : h)) * a.f.num_kv_heads + own_head) * segment * a.f.k_dim;
        add_span<FORMAT, WIDTH, ROWS, PLAIN, true>(a, place, start, stop, num_rows, sight, q, run, page);
        if (!PLAIN && a.page_lse) write_page_lse<T>(a, n, h, first_row, num_rows, u / of_column, page, true);
      }
    }
    if (!PLAIN && a.page_lse && part.begin == 0)  // columns beyond the length
      for (int c = (units_of(a, part.t) + of_column - 1) / of_column + (int)threadIdx.x / T::rows; c < a.num_columns; c += kBlock / T::rows) {
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
