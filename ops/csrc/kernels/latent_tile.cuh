// Latent pages (MLA) on tensor cores: the shape of a block, the walk through its tiles, and how a tile comes into shared memory.
//
// A tile is up to 32 neighbouring tokens of a page, and of one group. Raw keys lie there as they are; e4m3 codes, and e2m1 codes times the scale
// of their block, as bf16, which holds each of them exactly, while the scale of a token is that of its score and of its probability. Integers are
// decoded: a number is the sum of two of bf16, in two tiles. Rotary columns that are raw fp16 are such a sum too, beside e4m3 in 64 columns more.
// Values are the first 512 columns.

namespace pikv {

// BULK: raw keys come by bulk copies, a row of a token each, into one of two tiles; all others through registers.
template <int FORMAT, bool BULK>
struct LatentTile {
  static constexpr int keys = key_format(FORMAT), k_dim = 576, v_dim = 512, rows = 16, tokens = 32;
  static constexpr bool rope = rope_raw(FORMAT), coded = keys > kFp16, bulk = BULK && !coded, grouped = format_grouped(keys), by_row = coded && !grouped;
  static constexpr Mma type = keys == kFp16 ? Mma::fp16 : Mma::bf16;
  static constexpr int k_coded = rope ? v_dim : k_dim, parts = grouped ? 2 : 1, width = k_dim + (rope && by_row ? k_dim - v_dim : 0), products = width / 16;
  static constexpr int stride = width + 8;  // 16-bit numbers of a row: eight rows of ldmatrix lie in all banks
  static constexpr int row_bytes = k_coded * format_bits(keys) / 8, eights = k_coded / 8, words = Eight<keys>::words;
  // Words of shared memory, in this order: tiles, and the barriers that their copies count at; queries, in the order of a lane's registers;
  // scores, padded; scales of tokens; what rows see; the row of work; the lower parts of queries, where there are any.
  static constexpr int tile_words = tokens * stride / 2, all_tile_words = bulk ? 2 * tile_words + 4 : parts * tile_words;
  static constexpr int query_words = products * 128, score_stride = tokens + 4;
  static constexpr int shared = (all_tile_words + query_words + rows * score_stride + tokens + 2 * rows + Parts::shared + 3) / 4 * 4;

  // Queries of fp16 are the sum of two numbers of bf16.
  static PK_HD int shared_for(int q_type) { return shared + (coded && q_type != kBf16 ? query_words : 0); }
};

// Where tokens [t, t + count) of a page are. Nothing is left: count is 0.
struct LatentSpan {
  const unsigned char* record;
  int column, t, count;
  bool first, last;  // of what this part reads of the page
};

// All threads of the block walk alike.
struct LatentWalk {
  const unsigned char* record;
  int u, column, t, start, stop;

  __device__ __forceinline__ void enter(const Part& part) { *this = {nullptr, part.begin, 0, 0, 0, 0}; }

  template <class T>
  __device__ __forceinline__ void next(const Attend& a, const Part& part, long long table, long long list, int limit, int len, int first_row,
                                       int num_rows, LatentSpan* span) {
    const int P = a.f.page_size, of_column = units_of_column(a);
    span->count = 0;
#pragma unroll 1
    while (t >= stop) {
      if (u >= part.end) return;
      column = u / of_column;
      const int beyond = min(part.end, (column + 1) * of_column);
      const Column from(a, list, column);
      start = t = from.first + u % of_column * a.unit;
      stop = from.page < 0 ? 0 : min(from.first + min(a.block, (beyond - column * of_column) * a.unit), limit - from.page * P);
      u = beyond;
      if (t < stop) record = a.pages + (long long)at(a.table, table + from.page) * a.f.record_bytes;
      else if (a.page_lse && (int)threadIdx.x < num_rows && !(T::grouped && from.in_tail(a, limit, len))) *page_lse_of(a, part.t, first_row + (int)threadIdx.x, column) = minus_infinity();
    }
    int end = min(stop, t + T::tokens);
    if constexpr (T::grouped) end = min(end, t - t % a.f.group + a.f.group);
    *span = {record, column, t, end - t, t == start, end == stop};
    t = end;
  }
};

template <class T>
__device__ __forceinline__ float latent_row_scale(const Attend& a, const unsigned char* record, int t) {
  if constexpr (T::keys == kFp4) return power_of_two(__ldg(record + a.f.k_zero + t));
  else return half_to_float(__ldg(reinterpret_cast<const unsigned short*>(record + a.f.k_scale) + t));
}

// N times 8 neighbouring columns of tokens `token`, token + step, ...: from the page into the tile. Tokens beyond the span become zeros.
template <class T, int N>
__device__ __forceinline__ void store_latent_eights(const Attend& a, const LatentSpan& span, unsigned short* tile, int token, int step, int eight) {
  unsigned word[N][T::words], scale[T::keys == kFp4 ? N : 1];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int t = token + k * step;
#pragma unroll
    for (int i = 0; i < T::words; ++i) word[k][i] = 0;
    if constexpr (T::keys == kFp4) scale[k] = 0;
    if (t >= span.count) continue;
    load_eight<T::keys>(row_of(span.record + a.f.k, span.t + t, T::row_bytes) + eight * Eight<T::keys>::bytes, word[k]);
    if constexpr (T::keys == kFp4) scale[k] = __ldg(span.record + a.f.k_scale + (span.t + t) * (T::k_coded / kFp4Block) + eight / 2);
  }
  unsigned s[4], z[4];
  if constexpr (T::grouped) {
    const long long grid = ((long long)(span.t / a.f.group) * T::k_coded + 8 * eight) * 2;
    load_words<4>(span.record + a.f.k_scale + grid, s), load_words<4>(span.record + a.f.k_zero + grid, z);
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int t = token + k * step;
    unsigned short* to = tile + t * T::stride + 8 * eight;
    if constexpr (!T::coded) {
      *reinterpret_cast<uint4*>(to) = {word[k][0], word[k][1], word[k][2], word[k][3]};
      continue;
    }
    float x[8];
    unpack<T::keys>(word[k], x);
    unsigned high[4], low[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (T::keys == kFp4) x[i] *= fp8_to_float(scale[k]);
      if constexpr (T::grouped) x[i] = t < span.count ? x[i] * half_of(s, i) + half_of(z, i) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (T::grouped) split2<Mma::bf16>(x[2 * i], x[2 * i + 1], &high[i], &low[i]);
      else high[i] = pack2<Mma::bf16>(x[2 * i], x[2 * i + 1]);
    }
    *reinterpret_cast<uint4*>(to) = {high[0], high[1], high[2], high[3]};
    if constexpr (T::grouped) *reinterpret_cast<uint4*>(to + 2 * T::tile_words) = {low[0], low[1], low[2], low[3]};
  }
}

// 8 raw rotary columns of two tokens.
template <class T>
__device__ __forceinline__ void store_latent_rope(const Attend& a, const LatentSpan& span, unsigned short* tile) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int t = (int)threadIdx.x / 8 + 16 * k, eight = threadIdx.x % 8;
    unsigned w[4] = {0, 0, 0, 0}, high[4], low[4];
    float x[8], inverse = 1.0f;
    if (t < span.count) {
      load_words<4>(span.record + a.f.rope + 16 * ((span.t + t) * 8 + eight), w);
      if constexpr (T::by_row) inverse = inverse_of(latent_row_scale<T>(a, span.record, span.t + t));  // scores are times the scale, a power of two
    }
    unpack<kFp16>(w, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) split2<Mma::bf16>(x[2 * i] * inverse, x[2 * i + 1] * inverse, &high[i], &low[i]);
    unsigned short* to = tile + t * T::stride + T::v_dim + 8 * eight;
    *reinterpret_cast<uint4*>(to) = {high[0], high[1], high[2], high[3]};
    *reinterpret_cast<uint4*>(to + (T::by_row ? T::k_dim - T::v_dim : 2 * T::tile_words)) = {low[0], low[1], low[2], low[3]};
  }
}

// A tile through registers: a thread has the same columns of all its tokens. By all threads, when nobody reads the tile any more.
template <class T>
__device__ __forceinline__ void store_latent_tile(const Attend& a, const LatentSpan& span, unsigned short* tile, float* scales) {
  if constexpr (T::by_row)
    if (threadIdx.x < T::tokens) scales[threadIdx.x] = (int)threadIdx.x < span.count ? latent_row_scale<T>(a, span.record, span.t + (int)threadIdx.x) : 0.0f;
#pragma unroll 1
  for (int first = 0; first < 16; first += 8) store_latent_eights<T, 8>(a, span, tile, (int)threadIdx.x / 64 * 16 + first, 1, threadIdx.x % 64);
  if constexpr (T::rope) store_latent_rope<T>(a, span, tile);
  else store_latent_eights<T, 2>(a, span, tile, (int)threadIdx.x / 8, 16, 64 + threadIdx.x % 8);
}

// Bulk copies of a tile; tokens beyond the span become zeros. By all threads, when nobody reads the tile any more.
template <class T>
__device__ __forceinline__ void copy_latent_tile(const Attend& a, const LatentSpan& span, unsigned short* tile, Barrier* full) {
  if (span.count < T::tokens) {
    uint4* to = reinterpret_cast<uint4*>(tile);
    for (int i = span.count * T::stride / 8 + (int)threadIdx.x; i < T::tokens * T::stride / 8; i += kBlock) to[i] = {0, 0, 0, 0};
    bulk_fence();
  }
  if (threadIdx.x >= 32) return;
  const int token = threadIdx.x;
  if (token == 0) barrier_expect(full, span.count * T::row_bytes);
  __syncwarp();
  if (token < span.count) bulk_copy(tile + token * T::stride, row_of(span.record + a.f.k, span.t + token, T::row_bytes), T::row_bytes, full);
}

}  // namespace pikv
