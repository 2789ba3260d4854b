// Who reads which tokens of which table, so that every block has as much to read as any other, whatever the lengths are.
//
// A table is read in rounds: a unit of tokens, at most a page or the part of one that a list names, for each warp of a block. The rounds of all tables (n * H + h) stand in one
// row, table after table, and worker w takes the next `per` of them. What it finds of one table is a part. Part w + t belongs to worker w and
// table t alone: along the row w or t grows. Every table has a round at least, and so a part. Lengths are read here, on the device; the grid
// depends on shapes only.
// With a number of splits each table is cut by itself: part t * splits + split.

namespace pikv {

__device__ __forceinline__ int length_of(const Attend& a, int t) {
  return at(a.seqlens, a.seqlen_heads == 1 ? t / a.H : (long long)t);
}

// Units of a column, which is what a list and page_lse name as one.
__device__ __forceinline__ int units_of_column(const Attend& a) { return (a.block + a.unit - 1) / a.unit; }

__device__ __forceinline__ int units_of(const Attend& a, int t) {
  const int of_column = units_of_column(a);
  if (a.list.data) return a.num_columns * of_column;
  const int tokens = (int)(length_of(a, t) < (long long)a.num_columns * a.block ? length_of(a, t) : (long long)a.num_columns * a.block);
  return tokens / a.block * of_column + (tokens % a.block + a.unit - 1) / a.unit;
}

// Where the tokens of a column are: from token `first` of the page in column `page` of the table; page -1 = nowhere. list: of the table's row.
struct Column {
  int page, first;

  __device__ __forceinline__ Column(const Attend& a, long long list, int column) : page(a.list.data ? at(a.list, list + column) : column), first(0) {
    if (a.blocks > 1 && page >= 0) first = page % a.blocks * a.block, page /= a.blocks;
  }

  // Whether its keys are raw, in the tail: a block then is whole, as it divides the group. The tail's own code writes its page_lse.
  __device__ __forceinline__ bool in_tail(const Attend& a, int limit, int len) const {
    const int token = page * a.f.page_size + first;
    return a.blocks > 1 && page >= 0 && token >= limit && token < len;
  }
};

__device__ __forceinline__ int rounds_of(const Attend& a, int t) { return max(1, (units_of(a, t) + kWarps - 1) / kWarps); }

// The row: thread i has counted tables i * chunk to (i + 1) * chunk.
struct Row {
  static constexpr int shared = kBlock + 1 + kWarps;  // ints
  int chunk, total, per;
  const int* before;  // [kBlock + 1] rounds in front of each chunk

  // Every thread of the block. Barriers.
  __device__ __forceinline__ void count(const Attend& a, int* scratch) {
    const int tables = a.R * a.S * a.H, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    chunk = (tables + kBlock - 1) / kBlock;
    int sum = 0;
    for (int t = (int)threadIdx.x * chunk; t < min(tables, ((int)threadIdx.x + 1) * chunk); ++t) sum += rounds_of(a, t);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_sync(kAll, sum, max(lane - step, 0));
      if (lane >= step) sum += other;
    }
    if (lane == 31) scratch[kBlock + 1 + warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += scratch[kBlock + 1 + w];
    scratch[threadIdx.x + 1] = sum;
    if (threadIdx.x == 0) scratch[0] = 0;
    __syncthreads();
    before = scratch, total = scratch[kBlock];
    per = max(a.least, (total + a.workers - 1) / a.workers);
  }

  __device__ __forceinline__ int start_of(const Attend& a, int t) const {
    int start = before[t / chunk];
    for (int i = t / chunk * chunk; i < t; ++i) start += rounds_of(a, i);
    return start;
  }

  // The table that `round` (below total) belongs to, and where it starts.
  __device__ __forceinline__ int table_at(const Attend& a, int round, int* start) const {
    int low = 0;
#pragma unroll
    for (int step = kBlock / 2; step > 0; step /= 2)
      if (before[low + step] <= round) low += step;
    int t = low * chunk;
    *start = before[low];
    for (int rounds = rounds_of(a, t); *start + rounds <= round; rounds = rounds_of(a, t)) *start += rounds, ++t;
    return t;
  }
};

// What a block reads next: units [begin, end) of table t go to part `part`.
struct Part {
  int t, begin, end, part;
};

// The parts of worker w one after another. Its state lies in shared memory: registers are short where this is used.
class Parts {
 public:
  static constexpr int shared = Row::shared + 4;  // ints

  // Every thread of the block. Barriers.
  __device__ __forceinline__ Parts(const Attend& a, int w, int* scratch) : state_(scratch + Row::shared) {
    int first, last, t = 0, start = 0;
    if (a.workers) {
      Row row;
      row.count(a, scratch);
      first = w * row.per, last = min(row.total, first + row.per);
      if (first < last) t = row.table_at(a, first, &start);
      else last = 0;  // more workers than rounds
    } else {
      t = w / a.splits;
      const int rounds = rounds_of(a, t), per = (rounds + a.splits - 1) / a.splits;
      first = min(rounds, w % a.splits * per), last = min(rounds, first + per);
    }
    if (threadIdx.x == 0) state_[kFirst] = first, state_[kLast] = last, state_[kTable] = t, state_[kStart] = start;
    __syncthreads();
  }

  // False = none is left. A split of a table is a part even where it is empty.
  __device__ __forceinline__ bool get(const Attend& a, int w, Part* p) const {
    const int start = state_[kStart], last = state_[kLast];
    p->t = state_[kTable];
    if (start >= last && (a.workers || start > 0)) return false;
    p->part = a.workers ? w + p->t : w;
    p->begin = max(state_[kFirst] - start, 0) * kWarps, p->end = min((last - start) * kWarps, units_of(a, p->t));
    return true;
  }

  // By one thread, with a barrier since every `get` and one before the next.
  __device__ __forceinline__ void advance(const Attend& a) {
    const int t = state_[kTable];
    state_[kStart] = a.workers ? state_[kStart] + rounds_of(a, t) : 0x7fffffff, state_[kTable] = t + 1;
  }

 private:
  enum { kFirst, kLast, kTable, kStart };
  int* state_;
};

// First and last part of table t. The row is counted unless the splits are fixed.
__device__ __forceinline__ void parts_of(const Attend& a, const Row& row, int t, int* first, int* last) {
  if (!a.workers) {
    *first = t * a.splits, *last = *first + a.splits - 1;
    return;
  }
  const int start = row.start_of(a, t);
  *first = start / row.per + t, *last = (start + rounds_of(a, t) - 1) / row.per + t;
}

// Where the lse of row m goes, of what table t has in the page of a column.
__device__ __forceinline__ float* page_lse_of(const Attend& a, int t, int m, int column) {
  const long long row = ((long long)(t / a.H) * a.T + m / a.G) * a.H * a.G + (long long)(t % a.H) * a.G + m % a.G;
  return a.page_lse + row * a.num_columns + column;
}

}  // namespace pikv
