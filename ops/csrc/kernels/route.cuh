// Rows of tokens to the ranks that need them and back, in messages with a place for every token: nothing is counted, so nothing waits. Row t
// of a group belongs to token t, -1 in its tokens where the rank does not need it.

namespace pikv {

__device__ __forceinline__ bool needs(const Route& r, int group, long long row) {
  return r.need[(long long)group * r.G * r.N + row];
}

__device__ __forceinline__ int* token_of(const Route& r, int group, int rank, int t) {
  return reinterpret_cast<int*>(r.buffer + rank * r.most + r.token_start[group]) + t;
}

template <class Word>
__device__ __forceinline__ void route_words(const Route& r, const RouteField& f, bool unpack) {
  const long long per_row = f.row_bytes / (long long)sizeof(Word);
  for (long long row = blockIdx.x; row < (long long)r.G * r.N; row += gridDim.x) {
    const int rank = (int)(row / r.N), t = (int)(row % r.N);
    if (f.group >= 0 && !(unpack ? *token_of(r, f.group, rank, t) >= 0 : needs(r, f.group, row))) continue;
    Word* there = reinterpret_cast<Word*>(r.buffer + rank * r.most + f.start + t * f.row_bytes);
    Word* here = reinterpret_cast<Word*>(f.data + (unpack ? row : t) * f.row_bytes);
    for (long long word = threadIdx.x; word < per_row; word += kBlock) {
      if (unpack) here[word] = there[word];
      else if (t < f.rows) there[word] = here[word];
      else pad(there + word, f.padding, word);
    }
  }
}

__device__ __forceinline__ void route_field(const Route& r, const RouteField& f, bool unpack) {
  const long long all = f.row_bytes | f.start | r.most | (long long)f.data | (long long)r.buffer;
  if (all % 16 == 0) route_words<uint4>(r, f, unpack);
  else if (all % 4 == 0) route_words<unsigned>(r, f, unpack);
  else route_words<unsigned char>(r, f, unpack);
}

// Grid: x = rows; y = a field, then the tokens of a group.
__global__ void __launch_bounds__(kBlock, 8) route_pack_kernel(const Route r) {
  if ((int)blockIdx.y < r.num_fields) return route_field(r, r.fields[blockIdx.y], false);
  const int group = (int)blockIdx.y - r.num_fields;
  for (long long row = (long long)blockIdx.x * kBlock + threadIdx.x; row < (long long)r.G * r.N; row += (long long)gridDim.x * kBlock) {
    const int rank = (int)(row / r.N), t = (int)(row % r.N);
    *token_of(r, group, rank, t) = needs(r, group, row) ? t : -1;
  }
  if (group || blockIdx.x) return;
  for (int i = threadIdx.x; i < 4 * r.G; i += kBlock) reinterpret_cast<int*>(r.buffer + i / 4 * r.most)[i % 4] = i % 4 < r.K ? r.N : 0;
}

__global__ void __launch_bounds__(kBlock, 8) route_unpack_kernel(const Route r) {
  if ((int)blockIdx.y < r.num_fields) return route_field(r, r.fields[blockIdx.y], true);
  const int group = (int)blockIdx.y - r.num_fields;
  for (long long row = (long long)blockIdx.x * kBlock + threadIdx.x; row < (long long)r.G * r.N; row += (long long)gridDim.x * kBlock) {
    const int rank = (int)(row / r.N), t = (int)(row % r.N), token = *token_of(r, group, rank, t);
    r.tokens[(long long)group * r.G * r.N + row] = token < 0 ? -1 : (int)row - t + token;
    if (t == 0) r.counts[group * r.G + rank] = r.N;
  }
}

// Partials of one token and head over the ranks that were asked, as merge.cuh: a warp each, divided once, at the end.
__global__ void __launch_bounds__(kBlock, 8) route_merge_kernel(const RouteMerge m) {
  const long long item = (long long)blockIdx.x * kWarps + threadIdx.x / 32;
  const int lane = (int)threadIdx.x % 32, width = m.D + 1;
  if (item >= (long long)m.N * m.H) return;
  const long long t = item / m.H, h = item % m.H;
  // null = rank i of the order was not asked
  const auto part = [&](int i) {
    const long long row = (long long)m.order[i] * m.N + t;
    return m.need[row] ? m.partials + (row * m.H + h) * width : nullptr;
  };
  float top = minus_infinity();
  for (int i = lane; i < m.G; i += 32) {
    const float* own = part(i);
    if (own) top = fmaxf(top, own[m.D]);
  }
  top = lane_max<1, 16>(top);
  const float base = top == minus_infinity() ? 0.0f : top;
  float total = 0;
  for (int i = 0; i < m.G; ++i) {
    const float* own = part(i);
    if (own && own[m.D] != minus_infinity()) total += expf(own[m.D] - base);
  }
  for (int d = lane; d < m.D; d += 32) {
    float sum = 0;
    for (int i = 0; i < m.G; ++i) {
      const float* own = part(i);
      if (own && own[m.D] != minus_infinity()) sum += expf(own[m.D] - base) * own[d];
    }
    m.out[item * m.D + d] = sum / (total == 0 ? 1.0f : total);
  }
  if (lane == 0) m.lse[item] = top + logf(total);
}

}  // namespace pikv
