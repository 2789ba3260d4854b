// The fp32 tier's loop over the tokens of a page: scores, running softmax, weighted values.

namespace pikv {

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

}  // namespace pikv
