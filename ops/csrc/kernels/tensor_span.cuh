// The loop over the tokens of a page on tensor cores.

namespace pikv {

// What a warp reads of one page: tokens [start, stop) of one group, the keys of the first tile already asked for.
template <class T>
struct TensorSpan {
  using K = typename T::K;
  using V = typename T::V;
  const unsigned char *head, *k, *v;  // k, v: the first bytes that this lane reads of a token
  const int* positions;
  const unsigned char *k_scales, *v_scales;  // fp4: the first that this lane reads of a token
  unsigned keys[T::columns][T::K::words], scales[T::columns][T::K::blocks ? T::K::scale_words : 1];

  __device__ __forceinline__ void enter(const Attend& a, const unsigned char* record, int own_head) {
    head = record + own_head * a.f.head_bytes, positions = reinterpret_cast<const int*>(record + a.f.positions);
    k = head + a.f.k + K::bytes * (threadIdx.x % 4), v = head + a.f.v + V::bytes * (threadIdx.x % 32 / 4);
    if constexpr (K::blocks) k_scales = head + a.f.k_scale + K::first_block(threadIdx.x % 4);
    if constexpr (V::blocks) v_scales = head + a.f.v_scale + V::first_block(threadIdx.x % 32 / 4);
  }

  __device__ __forceinline__ void load_keys(int t0, int last) {
#pragma unroll
    for (int b = 0; b < T::columns; ++b) {
      const int t = min(t0 + 8 * b + (int)(threadIdx.x % 32 / 4), last);
      T::K::load(row_of(k, t, T::K::row_bytes), keys[b]);
      if constexpr (T::K::blocks) load_block_scales<K>(row_of(k_scales, t, T::K::row_bytes / 8), scales[b]);
    }
  }
};

__device__ __forceinline__ unsigned load_pair(const unsigned char* head, long long block, int t) {
  return __ldg(reinterpret_cast<const unsigned*>(head + block) + t / 2);
}

// What two neighbouring rows of coded keys or values are times: fp16, or the exponents of fp4.
template <int F>
__device__ __forceinline__ void load_row_scales(const unsigned char* head, long long scales, long long exponents, int t, float* x) {
  if constexpr (F == kFp4) {
    const unsigned e = __ldg(reinterpret_cast<const unsigned short*>(head + exponents) + t / 2);
    x[0] = power_of_two(e & 0xffu), x[1] = power_of_two(e >> 8);
  } else {
    const unsigned s = load_pair(head, scales, t);
    x[0] = half_of(&s, 0), x[1] = half_of(&s, 1);
  }
}

template <class T>
__device__ __forceinline__ void add_tensor_span(const Attend& a, TensorSpan<T>& span, const TensorQueries<T>& q, int start, int stop, float scale,
                                                const int* sight, TensorRunning<T>& run, float* page_top, float* page_sum) {
  using K = typename T::K;
  using V = typename T::V;
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, last = stop - 1;
#pragma unroll 1
  for (int t0 = start; t0 < stop; t0 += T::tokens) {
    unsigned values[T::tokens / 16][4][V::words], v_blocks[T::tokens / 16][4][V::blocks ? V::scale_words : 1];
    const auto load_values = [&] {
#pragma unroll
      for (int s = 0; s < T::tokens / 16; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = min(t0 + 16 * s + 2 * c + (i & 1) + 8 * (i >> 1), last);
          V::load(row_of(span.v, t, V::row_bytes), values[s][i]);
          if constexpr (V::blocks) load_block_scales<V>(row_of(span.v_scales, t, V::row_bytes / 8), v_blocks[s][i]);
        }
    };
    // At the end the last token again: a branch would cost more.
    const auto load_next_keys = [&] { span.load_keys(t0 + T::tokens, last); };
    if constexpr (!T::late) load_values();
    float score[T::columns][4];
#pragma unroll
    for (int b = 0; b < T::columns; ++b) score[b][0] = score[b][1] = score[b][2] = score[b][3] = 0;
    const auto add_product = [&](int b, int i, const unsigned* x) {
      unsigned k[2];
      key_operand<K::format>(span.keys[b], i, k);
      if constexpr (K::blocks) scale_key<K>(span.scales[b], i, k);
      mma_16816<K::type>(score[b], x[0], x[1], x[2], x[3], k[0], k[1]);
      if constexpr (T::split && T::sets == 2) mma_16816<K::type>(score[b], q.low[i][0], q.low[i][1], q.low[i][2], q.low[i][3], k[0], k[1]);
    };
    if constexpr (T::wide) {  // what is read of Q serves all columns
#pragma unroll
      for (int i = 0; i < T::products; ++i) {
        unsigned x[4];
        q.operand(i, x);
#pragma unroll
        for (int b = 0; b < T::columns; ++b) add_product(b, i, x);
      }
    } else {
#pragma unroll
      for (int b = 0; b < T::columns; ++b)
#pragma unroll
        for (int i = 0; i < T::products; ++i) add_product(b, i, q.high[i]);
    }
    if constexpr (T::split && T::sets == 1)
#pragma unroll
      for (int b = 0; b < T::columns; ++b) score[b][0] += score[b][2], score[b][1] += score[b][3];
    if constexpr (T::late && kLateValuesFirst) load_values();
    if constexpr (!T::late) load_next_keys();
    const bool whole = t0 + T::tokens <= stop, hides = !whole || a.window || a.causal;
    float v_scale[T::columns][2], v_zero[T::columns][2], ratio = 1.0f;
    if constexpr (V::coded) {  // of two neighbouring tokens at once; t0 is even, and there are bytes behind an odd last one
      float most = 0;
#pragma unroll
      for (int b = 0; b < T::columns; ++b) {
        const int t = t0 + 8 * b + 2 * c, from = min(t, last & ~1);
        const unsigned z = V::integer ? load_pair(span.head, a.f.v_zero, from) : 0;
        load_row_scales<V::format>(span.head, a.f.v_scale, a.f.v_zero, from, v_scale[b]);
#pragma unroll
        for (int e = 0; e < 2; ++e) v_zero[b][e] = V::integer ? half_of(&z, e) : 0.0f;
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
    if constexpr (K::by_row)
#pragma unroll
      for (int b = 0; b < T::columns; ++b)
        load_row_scales<K::format>(span.head, a.f.k_scale, a.f.k_zero, min(t0 + 8 * b + 2 * c, last & ~1), k_scale[b]);
#pragma unroll
    for (int set = 0; set < T::sets; ++set) {
      const float factor = T::split ? scale * q.factor[set] : scale, add = T::grouped ? scale * q.add[set] : 0.0f;
      float most = minus_infinity();
#pragma unroll
      for (int b = 0; b < T::columns; ++b)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = score[b][2 * set + e];
          if constexpr (K::by_row) x *= k_scale[b][e];
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
    if constexpr (T::late && !kLateValuesFirst) load_values();
#pragma unroll
    for (int s = 0; s < T::tokens / 16; ++s)
#pragma unroll
      for (int m = 0; m < T::products; ++m) {
        unsigned x[2], y[2];
        value_operand<V::format>(values[s][0], values[s][1], m, x);
        value_operand<V::format>(values[s][2], values[s][3], m, y);
        if constexpr (V::blocks) scale_value<V>(v_blocks[s][0], v_blocks[s][1], m, x), scale_value<V>(v_blocks[s][2], v_blocks[s][3], m, y);
#pragma unroll
        for (int set = 0; set < T::sets; ++set) {
          mma_16816<V::type>(run.o[set][m], x[0], x[1], y[0], y[1], p[set][2 * s], p[set][2 * s + 1]);
          mma_16816<V::type>(run.o[set][m], x[0], x[1], y[0], y[1], p_low[set][2 * s], p_low[set][2 * s + 1]);
        }
      }
    if constexpr (T::late) load_next_keys();
  }
}

}  // namespace pikv
