// Decode from latent pages (MLA: keys of 576 columns, of which 512 are the values) on tensor cores, 16 query rows of a block.
//
// The block works on one tile of tokens at a time (latent_tile.cuh): where bulk copies bring it, the next is on its way while products are
// taken of one.
// Work is shared as in work.cuh, and as in attend_tensor.cuh each table has a block of its own for the raw keys of the group that is not full.

namespace pikv {

template <int FORMAT>
__global__ void __launch_bounds__(kBlock, 2) attend_latent_kernel(const Attend a) {
  using T = LatentTile<FORMAT, kBulkCopies>;
  PK_SHARED(shared);
  unsigned short* tile = reinterpret_cast<unsigned short*>(shared);
  Barrier* full = reinterpret_cast<Barrier*>(shared + 2 * T::tile_words);  // of each tile, when there are two
  uint4* queries = reinterpret_cast<uint4*>(shared + T::all_tile_words);
  float* scores = shared + T::all_tile_words + T::query_words;
  float* scales = scores + T::rows * T::score_stride;
  int* sight = reinterpret_cast<int*>(scales + T::tokens);
  uint4* low_queries = T::coded && a.q_type != kBf16 ? reinterpret_cast<uint4*>(shared + T::shared) : nullptr;
  const int M = a.T * a.G, passes = (M + T::rows - 1) / T::rows;
  if constexpr (T::grouped) {
    const int first = (int)gridDim.x - a.R * a.S * a.H;
    if ((int)blockIdx.x >= first) return attend_tail<FORMAT, 576, 2, T::shared>(a, (int)blockIdx.x - first, shared);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int first_row = (int)(blockIdx.x % passes) * T::rows, num_rows = min(T::rows, M - first_row);
  const float scale = a.scale * 1.4426950408889634f;
  int copied = 0;  // tiles so far
  if (T::bulk && threadIdx.x == 0) barrier_init(full), barrier_init(full + 1);
  Part part;
  Parts parts(a, (int)(blockIdx.x / passes), sight + 2 * T::rows);
#pragma unroll 1
  while (parts.get(a, (int)(blockIdx.x / passes), &part)) {
    const int n = part.t / a.H, h = part.t % a.H, len = length_of(a, part.t), limit = T::grouped ? len - len % a.f.group : len;
    const long long table = ((long long)n * a.table_heads + (a.table_heads == 1 ? 0 : h)) * a.max_pages;
    const long long list = ((long long)n * a.list_heads + (a.list_heads == 1 ? 0 : h)) * a.num_columns;
    const auto row_at = [&](int g) {
      const int m = first_row + min(g, num_rows - 1);
      return ((long long)(n / a.S) * a.T + m / a.G) * a.H * a.G + (long long)h * a.G + m % a.G;
    };
    const long long row[2] = {row_at(r), row_at(r + 8)};
    const bool present[2] = {r < num_rows, r + 8 < num_rows};
    LatentRunning<T> run;
    LatentWalk walk;
    LatentSpan span, next;
    run.clear();
    look<T>(a, n / a.S, first_row, num_rows, sight);
    store_latent_queries<T>(a, row, present, queries, low_queries);
    walk.enter(part);
    walk.next<T>(a, part, table, list, limit, len, first_row, num_rows, &next);
    const auto ask = [&] {
      if constexpr (T::bulk)
        if (next.count) copy_latent_tile<T>(a, next, tile + copied % 2 * 2 * T::tile_words, full + copied % 2);
    };
    ask();
#pragma unroll 1
    while (next.count) {
      span = next;
      const unsigned short* here = tile + (T::bulk ? copied % 2 * 2 * T::tile_words : 0);
      if constexpr (T::bulk) barrier_wait(full + copied % 2, copied / 2 % 2), ++copied;
      else store_latent_tile<T>(a, span, tile, scales);
      __syncthreads();
      walk.next<T>(a, part, table, list, limit, len, first_row, num_rows, &next);
      ask();
      score_latent_tile<T>(here, queries, low_queries, scales, scores);
      __syncthreads();
      run.add(a, span, scores, scales, scale, sight, here);
      if (a.page_lse && span.last) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float sum = lane_sum<1, 2>(run.page_sum[half]);
          if (warp == 0 && c == 0 && present[half])
            *page_lse_of(a, part.t, first_row + 8 * half + r, span.column) = (run.page_top[half] + log2f(sum)) * 0.6931471805599453f;
          run.page_top[half] = minus_infinity(), run.page_sum[half] = 0;
        }
      }
      __syncthreads();
    }
    if (a.page_lse && part.begin == 0) {  // columns beyond the length
      const int used = (units_of(a, part.t) + units_of_column(a) - 1) / units_of_column(a);
      for (int g = threadIdx.x % T::rows; g < num_rows; g += T::rows)
        for (int column = used + (int)threadIdx.x / T::rows; column < a.num_columns; column += kBlock / T::rows)
          *page_lse_of(a, part.t, first_row + g, column) = minus_infinity();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = lane_sum<1, 2>(run.sum[half]);
      if (!present[half]) continue;
      const long long to = a.part_out ? (long long)part.part * M + first_row + 8 * half + r : row[half];
      const float factor = sum == 0 ? 0.0f : (T::type == Mma::fp16 ? 1.0f / kProbabilityScale : 1.0f) / sum;
      float* out = (a.part_out ? a.part_out : a.out) + to * T::v_dim + 128 * warp + 2 * c;
#pragma unroll
      for (int k = 0; k < 16; ++k) out[8 * k] = run.o[k][2 * half] * factor, out[8 * k + 1] = run.o[k][2 * half + 1] * factor;
      if (warp == 0 && c == 0) (a.part_out ? a.part_lse : a.lse)[to] = sum == 0 ? minus_infinity() : (run.top[half] + log2f(sum)) * 0.6931471805599453f;
    }
    if (threadIdx.x == 0) parts.advance(a);
    __syncthreads();
  }
}

}  // namespace pikv
