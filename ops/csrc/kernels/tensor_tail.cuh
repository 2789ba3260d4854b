// The group that is not full, beside the kernels on tensor cores.

namespace pikv {

// The column of a list that names a block of tokens of a table, -1 = none does. By a warp.
__device__ __forceinline__ int listed_column(const Attend& a, long long list, int number) {
  int column = a.list.data ? -1 : number;
  for (int i = threadIdx.x % 32; i < a.num_columns && a.list.data; i += 32)
    if (at(a.list, list + i) == number) column = i;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) column = max(column, __shfl_xor_sync(kAll, column, step));
  return column;
}

// The raw keys of the group that is not full, of one table: ROWS rows after ROWS, a quarter of the tokens to a warp, or whole blocks of a page in
// turns, of which it writes page_lse. WIDTH: of Tile; SHARED: words of shared memory that are there.
template <int FORMAT, int WIDTH, int ROWS, int SHARED>
__device__ __forceinline__ void attend_tail(const Attend& a, int t, float* shared) {
  using T = Tile<FORMAT, WIDTH, ROWS, false>;
  static_assert(kWarps * ROWS * (T::value_width + 2) + 2 * ROWS + T::page_floats <= SHARED, "the tail needs more shared memory than the rest");
  float *warp_top = shared + kWarps * ROWS * T::value_width, *warp_sum = warp_top + kWarps * ROWS;
  float* page = warp_sum + kWarps * ROWS + threadIdx.x;  // without blocks not read: the part has the lse
  int* sight = reinterpret_cast<int*>(warp_sum + kWarps * ROWS + T::page_floats);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane % T::lanes * 8;
  const int n = t / a.H, h = t % a.H, own_head = T::latent || a.f.num_kv_heads == 1 ? 0 : h, M = a.T * a.G, P = a.f.page_size;
  const int len = length_of(a, t), limit = len - len % a.f.group, page_column = limit / P;
  if (len == limit) return;
  const long long list = ((long long)n * a.list_heads + (a.list_heads == 1 ? 0 : h)) * a.num_columns;
  const int step = a.blocks > 1 ? a.block : (len - limit + kWarps - 1) / kWarps;
  const long long table = ((long long)n * a.table_heads + (a.table_heads == 1 ? 0 : h)) * a.max_pages;
  const unsigned char* record = a.pages + (long long)at(a.table, table + page_column) * a.f.record_bytes;
  const long long tail_row = at(a.tail_rows, (long long)n * a.tail_heads + (a.tail_heads == 1 ? 0 : h));
  Place place = {};
  place.head = record + own_head * a.f.head_bytes, place.positions = reinterpret_cast<const int*>(record + a.f.positions);
  place.tail = (tail_row * a.f.num_kv_heads + own_head) * a.f.group * a.f.k_dim;
#pragma unroll 1
  for (int first_row = 0; first_row < M; first_row += ROWS) {
    const int num_rows = min(ROWS, M - first_row);
    float q[ROWS][T::key_chunks][8];
    Running<T> run;
    look<T>(a, n / a.S, first_row, num_rows, sight);
    __syncthreads();
#pragma unroll
    for (int g = 0; g < ROWS; ++g) {
      const int m = first_row + min(g, num_rows - 1);
      const long long row = ((long long)(n / a.S) * a.T + m / a.G) * a.H * a.G + (long long)h * a.G + m % a.G;
      run.top[g] = minus_infinity(), run.sum[g] = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int c = 0; c < T::key_chunks; ++c) {
          const int d = column + 256 * c + i;
          q[g][c][i] = d < a.f.k_dim ? load_float(a.q, a.q_type, row * a.f.k_dim + d) * (a.scale * 1.4426950408889634f) : 0.0f;
        }
#pragma unroll
        for (int c = 0; c < T::value_chunks; ++c) run.acc[g][c][i] = 0;
      }
    }
#pragma unroll 1
    for (int start = limit + warp * step; start < len; start += kWarps * step) {
      const int listed = listed_column(a, list, start / a.block);
      if (listed < 0) continue;
      for (int g = 0; g < ROWS; ++g) page[2 * g * kBlock] = minus_infinity(), page[(2 * g + 1) * kBlock] = 0;
      add_span<FORMAT, WIDTH, ROWS, false, true>(a, place, start - page_column * P, min(len, start + step) - page_column * P, num_rows, sight, q, run, page);
      if (a.page_lse && a.blocks > 1) write_page_lse<T>(a, n, h, first_row, num_rows, listed, page);
    }
    gather_warps<T>(run, num_rows, shared, warp_top, warp_sum);
    __syncthreads();
    write_part<T>(a, {t, 0, 0, a.tail_parts + t}, first_row, num_rows, shared, warp_top, warp_sum);
    __syncthreads();
  }
}

}  // namespace pikv
