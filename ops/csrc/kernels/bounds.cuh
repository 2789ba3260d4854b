// Smallest and largest key of each page, and the largest logit a query can have inside them. Bounds are rounded away from the keys, so that a
// 16-bit bound still is one.

namespace pikv {

constexpr float kLargest = 3.402823466e38f;

// An fp16 bound may be infinite, and 0 * inf would be NaN.
__device__ __forceinline__ float finite(float x) { return fminf(fmaxf(x, -kLargest), kLargest); }

// The next 16-bit float towards -inf; both types count up with their magnitude.
__device__ __forceinline__ unsigned next_below(unsigned h) { return (h & 0x7fffu) == 0 ? 0x8001u : h & 0x8000u ? h + 1 : h - 1; }

// The largest 16-bit float that is not above x.
__device__ __forceinline__ unsigned not_above(float x, int type) {
  const unsigned h = type == kBf16 ? float_to_bf16(x) : float_to_half(x);
  return (type == kBf16 ? bf16_to_float(h) : half_to_float(h)) > x ? next_below(h) : h;
}

__device__ __forceinline__ void store_edge(void* bounds, int type, long long i, float x, bool upper) {
  if (type == kFp32) static_cast<float*>(bounds)[i] = x;
  else static_cast<unsigned short*>(bounds)[i] = (unsigned short)(upper ? not_above(-x, type) ^ 0x8000u : not_above(x, type));
}

// A bound that this kernel also writes, so not through the read-only cache.
__device__ __forceinline__ float load_edge(const void* bounds, int type, long long i) {
  if (type == kFp32) return static_cast<const float*>(bounds)[i];
  const unsigned h = static_cast<const unsigned short*>(bounds)[i];
  return type == kBf16 ? bf16_to_float(h) : half_to_float(h);
}

// The scale of a row of int8 bounds whose largest |bound| is top: top / 127 rounded up, which a division rounds down at times.
__device__ __forceinline__ unsigned bound_scale(float top) {
  const unsigned scale = not_above(-__fdiv_rn(top, 127.0f), kBf16) ^ 0x8000u;
  return bf16_to_float(scale) * 127.0f < top ? scale + 1 : scale;
}

// The code of a minimum, or of the negative of a maximum. A quotient may have been rounded up to a whole number.
__device__ __forceinline__ int bound_code(float x, float scale) {
  const float code = floorf(__fdiv_rn(x, scale));
  return scale > 0 ? (int)(__fmul_rn(code, scale) > x ? code - 1.0f : code) : 0;
}

// Column d of the key in slot t, from its code: the bits of ops/reference/formats.py.
__device__ __forceinline__ float stored_key(const PageFormat& f, const unsigned char* head, int t, int d) {
  if (d >= f.k_coded) return load_float(head + f.rope, kFp16, (long long)t * (f.k_dim - f.k_coded) + d - f.k_coded);
  const unsigned char* row = head + f.k + (long long)t * f.k_row_bytes;
  if (f.format <= kFp16) return load_float(row, f.format, d);
  if (f.format == kFp4) {
    const float s = fp8_to_float(head[f.k_scale + t * fp4_blocks(f.k_coded) + d / kFp4Block]);
    return __fmul_rn(fp4_to_float(row[d / 2] >> 4 * (d % 2) & 15u), __fmul_rn(s, power_of_two(head[f.k_zero + t])));
  }
  const unsigned short* scale = reinterpret_cast<const unsigned short*>(head + f.k_scale);
  if (f.format == kFp8) return __fmul_rn(fp8_to_float(row[d]), half_to_float(scale[t]));
  const long long grid = (long long)(t / f.group) * f.k_coded + d;
  const int bits = format_bits(f.format);
  const unsigned code = row[d * bits / 8] >> d * bits % 8 & (unsigned)format_levels(f.format);
  return __fadd_rn(__fmul_rn((float)code, half_to_float(scale[grid])), half_to_float(reinterpret_cast<const unsigned short*>(head + f.k_zero)[grid]));
}

// Of tokens [start, stop) of a page the box of column d. raw(t): whether the key of a token is in the tail, from `tail` on.
template <class Raw>
__device__ __forceinline__ void box_of(const PageBounds& b, const unsigned char* head, long long tail, int start, int stop, int d, const Raw& raw, float* low,
                                       float* high) {
  *low = -minus_infinity(), *high = minus_infinity();
  for (int t = start; t < stop; ++t) {
    const float x = raw(t) ? load_float(b.tail, b.tail_type, (tail + t % b.f.group) * b.f.k_dim + d) : stored_key(b.f, head, t, d);
    *low = x < *low ? x : *low, *high = x > *high ? x : *high;
  }
}

// Eight blocks to a multiprocessor leave 64 registers, six 80. Without a number NVRTC 13.5 spills a few to fit more blocks.
// Grid: x = token, y = head. A span is what one token changes: a page, a block of one, or a group of keys that share scales. The first token of a
// span answers for all of its tokens; every other block of threads ends at once.
__global__ void __launch_bounds__(kBlock, 8) page_bounds_kernel(const PageBounds b) {
  PK_SHARED(shared);
  int* newest = reinterpret_cast<int*>(shared);  // the last token of this call in the same table
  int* last = newest + 1;                        // the highest slot of the span with a token of this call
  int* top = newest + 2;                         // [2] int8: the largest |minimum| and |maximum|, bits of floats
  int* present = newest + 4;                     // [page_size] 1 = a token of this call is in the slot
  float* box = reinterpret_cast<float*>(present + b.f.page_size);  // [2, D] int8: minima, maxima
  const int token = blockIdx.x, h = blockIdx.y, H = b.f.num_kv_heads, D = b.f.k_dim, P = b.f.page_size, group = b.f.group;
  const bool grouped = format_grouped(b.f.format), whole = b.block == P;
  const int span = whole ? P : grouped ? group : b.block;
  const int slot = at(b.slots, token);
  if (slot < 0) return;
  const int own = slot / span, begin = own * span % P, page = slot / P;
  for (int first = token - 1; first >= 0; first -= kBlock) {  // backwards: the token before is most often of the same page
    const int j = first - (int)threadIdx.x, other = j >= 0 ? at(b.slots, j) : -1;
    if (__syncthreads_or(other >= 0 && other / span == own)) return;
  }
  for (int t = threadIdx.x; t < P; t += kBlock) present[t] = 0;
  if (threadIdx.x == 0) *newest = -1, *last = 0;
  __syncthreads();
  const int row = grouped ? at(b.tail_rows, token) : 0;
  for (int j = threadIdx.x; j < b.T; j += kBlock) {
    const int other = at(b.slots, j);
    if (other < 0) continue;
    if (other / span == own) {
      present[other % P] = 1;
      atomicMax(last, other % P);
    }
    if (grouped && at(b.tail_rows, j) == row) atomicMax(newest, j);
  }
  __syncthreads();
  const int last_slot = at(b.slots, *newest < 0 ? token : *newest);
  const int open = last_slot % group == group - 1 ? -1 : last_slot / group;  // its keys are in the tail
  const bool anew = present[0];
  const unsigned char* head = b.pages + page * b.f.record_bytes + h * b.f.head_bytes;
  const long long edges = ((long long)page * H + h) * 2 * D, tail = ((long long)row * H + h) * group;
  if (!whole || b.type == kInt8) {  // made from all keys of the span: widening a coded box would round it again and again
    const auto raw = [&](int t) { return grouped && (page * P + t) / group == open; };
    for (int start = begin; start <= *last; start += b.block) {
      const int stop = min(start + b.block, *last + 1);
      const long long at_block = ((long long)page * (P / b.block) + start / b.block) * H + h;
      float low, high;
      if (b.type != kInt8) {
        for (int d = threadIdx.x; d < D; d += kBlock) {
          box_of(b, head, tail, start, stop, d, raw, &low, &high);
          store_edge(b.bounds, b.type, at_block * 2 * D + d, low, false), store_edge(b.bounds, b.type, at_block * 2 * D + D + d, high, true);
        }
        continue;
      }
      __syncthreads();  // nobody reads the box of the block before any more
      if (threadIdx.x == 0) top[0] = top[1] = 0;
      __syncthreads();
      for (int d = threadIdx.x; d < D; d += kBlock) {
        box_of(b, head, tail, start, stop, d, raw, &low, &high);
        box[d] = finite(low), box[D + d] = finite(high);
        atomicMax(&top[0], (int)__float_as_uint(fabsf(box[d])));
        atomicMax(&top[1], (int)__float_as_uint(fabsf(box[D + d])));
      }
      __syncthreads();
      signed char* codes = static_cast<signed char*>(b.bounds) + at_block * 2 * (D + kBoundScale);
      for (int upper = 0; upper < 2; ++upper, codes += D + kBoundScale) {
        const unsigned scale = bound_scale(__uint_as_float((unsigned)top[upper]));
        for (int d = threadIdx.x; d < D; d += kBlock) {
          const float x = box[upper * D + d];
          codes[d] = (signed char)(upper ? -bound_code(-x, bf16_to_float(scale)) : bound_code(x, bf16_to_float(scale)));
        }
        if (threadIdx.x == 0) *reinterpret_cast<unsigned short*>(codes + D) = (unsigned short)scale;
      }
    }
    return;
  }
  for (int d = threadIdx.x; d < D; d += kBlock) {
    const float old_low = anew ? -minus_infinity() : load_edge(b.bounds, b.type, edges + d);
    const float old_high = anew ? minus_infinity() : load_edge(b.bounds, b.type, edges + D + d);
    float low = old_low, high = old_high;
    const auto take = [&](float x) { low = x < low ? x : low, high = x > high ? x : high; };
    for (int t = 0; t < P; ++t) {
      if (!present[t]) continue;
      if (!grouped) {
        take(stored_key(b.f, head, t, d));
      } else if (t % group == group - 1) {  // brings the codes of the whole group
        for (int other = t - group + 1; other <= t; ++other) take(stored_key(b.f, head, other, d));
      } else if ((page * P + t) / group == open) {
        take(load_float(b.tail, b.tail_type, (tail + t % group) * D + d));
      }
    }
    if (anew || low < old_low) store_edge(b.bounds, b.type, edges + d, low, false);
    if (anew || high > old_high) store_edge(b.bounds, b.type, edges + D + d, high, true);
  }
}

// 4 neighbouring columns of queries, or of bounds that are no codes. `some`: how many there are, read one by one; 0 = all 4 at once, from a
// multiple of their bytes.
__device__ __forceinline__ void load_columns(const void* p, int type, long long i, int some, float* x) {
  if (some) {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = k < some ? load_float(p, type, i + k) : 0.0f;
    return;
  }
  if (type == kFp32) return load_floats4(static_cast<const float*>(p) + i, x);
  unsigned w[2];
  load_words<2>(static_cast<const unsigned char*>(p) + 2 * i, w);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const unsigned h = k % 2 ? w[k / 2] >> 16 : w[k / 2] & 0xffffu;
    x[k] = type == kBf16 ? bf16_to_float(h) : half_to_float(h);
  }
}

// Minima (edge 0) or maxima (edge 1) of 4 columns from d; row: page and head.
__device__ __forceinline__ void bounds_at(const PageScore& s, long long row, int edge, int d, int some, float* x) {
  if (s.bounds_type != kInt8) {
    load_columns(s.bounds, s.bounds_type, (2 * row + edge) * s.D + d, some, x);
  } else {
    const signed char* codes = static_cast<const signed char*>(s.bounds) + (2 * row + edge) * (s.D + kBoundScale);
    const float scale = bf16_to_float(__ldg(reinterpret_cast<const unsigned char*>(codes + s.D)) | (unsigned)__ldg(reinterpret_cast<const unsigned char*>(codes + s.D + 1)) << 8);
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = !some || k < some ? (float)__ldg(codes + d + k) * scale : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) x[k] = finite(x[k]);
}

// Grid: (table, kv head, 4 columns), columns fastest; a warp per column, 4 neighbouring columns of the key and 4 queries at a time.
__global__ void __launch_bounds__(kBlock, 6) page_score_kernel(const PageScore s) {
  const int steps = (s.max_pages + kWarps - 1) / kWarps, lane = threadIdx.x % 32;
  const int c = (int)(blockIdx.x % steps) * kWarps + threadIdx.x / 32, h = (int)(blockIdx.x / steps % s.H), n = (int)(blockIdx.x / steps / s.H);
  if (c >= s.max_pages) return;
  float* score = s.scores + ((long long)n * s.H + h) * s.max_pages + c;
  const int len = at(s.seqlens, (long long)n * s.seqlen_heads + (s.seqlen_heads == 1 ? 0 : h));
  if (c >= (len + s.page_size - 1) / s.page_size) {
    if (lane == 0) *score = minus_infinity();
    return;
  }
  const long long page = at(s.table, ((long long)n * s.table_heads + (s.table_heads == 1 ? 0 : h)) * s.max_pages + c);
  const long long row = page * s.bound_heads + (s.bound_heads == 1 ? 0 : h);
  const long long queries = ((long long)(n / s.S) * s.H + h) * s.G * s.D;
  const bool wide = s.D % 4 == 0 && ((unsigned long long)s.q | (unsigned long long)s.width | (unsigned long long)s.bounds) % 16 == 0;
  float top = -kLargest;
#pragma unroll 1
  for (int g0 = 0; g0 < s.G; g0 += 4) {
    float sum[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int d = 4 * lane; d < s.D; d += 128) {
      float low[4], high[4], x[4], w[4];
      const int some = wide ? 0 : min(4, s.D - d);
      bounds_at(s, row, 0, d, some, low);
      bounds_at(s, row, 1, d, some, high);
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const long long from = queries + (long long)min(g0 + g, s.G - 1) * s.D + d;
        load_columns(s.q, s.q_type, from, some, x);
        if (s.width) load_columns(s.width, s.q_type, from, some, w);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float q = x[k] * s.scale, reach = s.width ? w[k] * s.scale : fabsf(q);
          sum[g] += 0.5f * (q - reach) * low[k] + 0.5f * (q + reach) * high[k];
        }
      }
    }
#pragma unroll
    for (int g = 0; g < 4; ++g) top = fmaxf(top, lane_sum<1, 16>(sum[g]));
  }
  if (lane == 0) *score = top;
}

}  // namespace pikv
