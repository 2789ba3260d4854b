// New entries into their slots, in three launches: rows that need no other token; K groups that become full, from the tail and from this
// call; then the tail. Encoding gives the bits of ops/reference/formats.py: one f32 rounding per step, hence no fused multiply-add.

namespace pikv {

// What encodes a set of numbers in one grid: code = round((x - low) * inverse).
struct Coder {
  unsigned scale, zero;  // fp16
  float low, inverse;
};

__device__ __forceinline__ float clamp_half(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }

__device__ __forceinline__ Coder make_coder(float low, float high, int levels) {
  Coder c;
  c.zero = float_to_half(clamp_half(low));
  c.low = half_to_float(c.zero);
  const float step = __fmul_rn(__fsub_rn(clamp_half(high), c.low), levels == 255 ? (float)(1.0 / 255) : levels == 15 ? (float)(1.0 / 15) : (float)(1.0 / 3));
  c.scale = float_to_half(fmaxf(step, 0.0f));
  const float s = half_to_float(c.scale);
  c.inverse = s > 0 ? __fdiv_rn(1.0f, s) : 0.0f;
  return c;
}

__device__ __forceinline__ unsigned code_of(float x, const Coder& c, int levels) {
  return (unsigned)fminf(fmaxf(rintf(__fmul_rn(__fsub_rn(x, c.low), c.inverse)), 0.0f), (float)levels);
}

// The exponent of the smallest power of two that keeps `top` within 448 = 0.875 * 2^9.
__device__ __forceinline__ int fp8_exponent(float top) {
  const unsigned u = __float_as_uint(top);
  const int exponent = top == 0 ? 0 : (int)(u >> 23) - 126;  // top = fraction * 2^exponent, fraction in [0.5, 1); subnormal: below -24 anyway
  const int raised = (u & 0x7fffffu) > 0x600000u ? 1 : 0;
  return min(max(exponent - 9 + raised, -24), 15);
}

// A NaN counts as 0; what is beyond the largest exponent saturates.
__device__ __forceinline__ float fp4_input(float x) {
  const float limit = 2688.0f * 0x1p63f;
  return x != x ? 0.0f : fminf(fmaxf(x, -limit), limit);
}

// The exponent of the smallest power of two that keeps `top` within 448 * 6 = 0.65625 * 2^12.
__device__ __forceinline__ int fp4_exponent(float top) {
  const unsigned u = __float_as_uint(top);
  const int exponent = top == 0 ? 0 : (int)(u >> 23) - 126, raised = (u & 0x7fffffu) > 0x280000u ? 1 : 0;
  return min(max(exponent - 12 + raised, -64), 63);
}

// 1 / s of an e4m3 number s > 0, as a division would round it: a reciprocal of its 4 bits and a power of two. A division is a call here, and
// a second one in the kernel would spill registers.
__device__ __forceinline__ float fp8_inverse(float s) {
  const unsigned u = __float_as_uint(s), m = u >> 20 & 7u;
  const float r = m == 0 ? 1.0f : m == 1 ? 8.0f / 9.0f : m == 2 ? 0.8f : m == 3 ? 8.0f / 11.0f : m == 4 ? 2.0f / 3.0f : m == 5 ? 8.0f / 13.0f : m == 6 ? 4.0f / 7.0f : 8.0f / 15.0f;
  return r * power_of_two(254 - (u >> 23));
}

// One row of D elements by one warp.
__device__ __forceinline__ void store_fp4(const void* x, int type, long long from, int D, unsigned char* row, unsigned char* scales, unsigned char* biased) {
  const int lane = threadIdx.x % 32;
  float top = 0;
  for (int d = lane; d < D; d += 32) top = fmaxf(top, fabsf(fp4_input(load_float(x, type, from + d))));
  const int exponent = fp4_exponent(lane_max<1, 16>(top));
  const float down = power_of_two(127 - exponent);
  if (lane == 0) *biased = (unsigned char)(exponent + 127);
  for (int first = 0; first < D; first += 32) {
    const int d = first + lane;
    const float value = d < D ? fp4_input(load_float(x, type, from + d)) : 0.0f;
    const float most = lane_max<1, 8>(fabsf(value));  // of the 16 columns of a block
    const unsigned scale = float_to_fp8(fminf(most * down * (float)(1.0 / 6), 448.0f));
    const float s = fp8_to_float(scale), inverse = s > 0 ? fp8_inverse(s) * down : 0.0f;
    const unsigned code = float_to_fp4(value * inverse), right = __shfl_xor_sync(kAll, code, 1);
    if (d < D && d % kFp4Block == 0) scales[d / kFp4Block] = (unsigned char)scale;
    if (d < D && d % 2 == 0) row[d / 2] = (unsigned char)(code | right << 4);
  }
}

// Row t of a block whose rows are encoded each by itself, of D elements, by one warp. `scales` and `zeros` are the blocks, where there are any.
__device__ __forceinline__ void store_token(int format, const void* x, int type, long long from, int D, unsigned char* row, unsigned char* scales, unsigned char* zeros, int t) {
  const int lane = threadIdx.x % 32;
  if (format <= kFp16) {
    for (int d = lane; d < D; d += 32) store_float(row, format, d, load_float(x, type, from + d));
    return;
  }
  if (format == kFp4) return store_fp4(x, type, from, D, row, scales + t * fp4_blocks(D), zeros + t);
  unsigned short *scale = reinterpret_cast<unsigned short*>(scales) + t, *zero = reinterpret_cast<unsigned short*>(zeros) + t;
  float low = -minus_infinity(), high = minus_infinity();
  for (int d = lane; d < D; d += 32) {
    const float value = load_float(x, type, from + d);
    low = fminf(low, value), high = fmaxf(high, value);
  }
  low = -lane_max<1, 16>(-low), high = lane_max<1, 16>(high);
  if (format == kFp8) {
    const int exponent = fp8_exponent(fmaxf(fabsf(low), fabsf(high)));
    const float inverse = __uint_as_float((unsigned)(127 - exponent) << 23);
    if (lane == 0) *scale = (unsigned short)float_to_half(__uint_as_float((unsigned)(127 + exponent) << 23));
    for (int d = lane; d < D; d += 32) row[d] = (unsigned char)float_to_fp8(fminf(fmaxf(load_float(x, type, from + d) * inverse, -448.0f), 448.0f));
    return;
  }
  const int levels = format_levels(format), bits = format_bits(format), columns = 8 / bits;
  const Coder c = make_coder(low, high, levels);
  if (lane == 0) *scale = (unsigned short)c.scale, *zero = (unsigned short)c.zero;
  for (int byte = lane; byte < D * bits / 8; byte += 32) {
    unsigned codes = 0;
    for (int i = 0; i < columns; ++i) codes |= code_of(load_float(x, type, from + byte * columns + i), c, levels) << bits * i;
    row[byte] = (unsigned char)codes;
  }
}

// Grid: x = warp per (token, head), y = keys, values.
__global__ void __launch_bounds__(kBlock) append_rows_kernel(const Append a) {
  const long long i = (long long)blockIdx.x * kWarps + threadIdx.x / 32;
  const int H = a.f.num_kv_heads, token = (int)(i / H), h = (int)(i % H);
  if (token >= a.T) return;
  const int slot = at(a.slots, token);
  if (slot < 0) return;
  const int t = slot % a.f.page_size;
  unsigned char* record = a.pages + slot / a.f.page_size * a.f.record_bytes;
  unsigned char* head = record + h * a.f.head_bytes;
  if (h == 0 && blockIdx.y == 0 && threadIdx.x % 32 == 0) reinterpret_cast<int*>(record + a.f.positions)[t] = at(a.positions, token);
  const PageFormat& f = a.f;
  const int part = blockIdx.y;
  if (!(part ? f.latent : format_grouped(f.format)))
    store_token(part ? f.v_format : f.format, part ? a.v : a.k, a.type, i * (part ? f.v_dim : f.k_dim), part ? f.v_dim : f.k_coded,
                head + (part ? f.v + (long long)t * f.v_row_bytes : f.k + (long long)t * f.k_row_bytes), head + (part ? f.v_scale : f.k_scale),
                head + (part ? f.v_zero : f.k_zero), t);
  if (f.rope >= 0 && part == 0)
    for (int d = f.k_coded + threadIdx.x % 32; d < f.k_dim; d += 32)
      store_float(head + f.rope, kFp16, (long long)t * (f.k_dim - f.k_coded) + d - f.k_coded, saturate_half(load_float(a.k, a.type, i * f.k_dim + d)));
}

// A key as the tail holds it.
__device__ __forceinline__ float as_tail(const Append& a, long long i) {
  const float x = load_float(a.k, a.type, i);
  return a.tail_type == kFp32 ? x : a.tail_type == kBf16 ? bf16_to_float(float_to_bf16(x)) : half_to_float(float_to_half(saturate_half(x)));
}

// Grid: x = token, y = head. The token that completes a group encodes it; every other block ends at once.
__global__ void __launch_bounds__(kBlock) append_groups_kernel(const Append a) {
  PK_SHARED(shared);
  int* token_of = reinterpret_cast<int*>(shared);  // [group] the token of this call that has the slot, else -1: it is in the tail
  const int token = blockIdx.x, h = blockIdx.y, H = a.f.num_kv_heads, group = a.f.group, slot = at(a.slots, token);
  if (slot < 0 || slot % group != group - 1) return;
  const int first_slot = slot - group + 1, levels = format_levels(a.f.format);
  for (int j = threadIdx.x; j < group; j += kBlock) token_of[j] = -1;
  __syncthreads();
  for (int j = threadIdx.x; j < a.T; j += kBlock) {
    const int other = at(a.slots, j);
    if (other >= first_slot && other <= slot) token_of[other - first_slot] = j;
  }
  __syncthreads();
  const long long tail = ((long long)at(a.tail_rows, token) * H + h) * group;
  const int t0 = first_slot % a.f.page_size;
  unsigned char* head = a.pages + first_slot / a.f.page_size * a.f.record_bytes + h * a.f.head_bytes;
  unsigned short* scales = reinterpret_cast<unsigned short*>(head + a.f.k_scale) + (long long)(t0 / group) * a.f.k_coded;
  unsigned short* zeros = reinterpret_cast<unsigned short*>(head + a.f.k_zero) + (long long)(t0 / group) * a.f.k_coded;
  const auto key = [&](int j, int d) {
    if (token_of[j] >= 0) return as_tail(a, ((long long)token_of[j] * H + h) * a.f.k_dim + d);
    return load_float(a.tail, a.tail_type, (tail + j) * a.f.k_dim + d);
  };
  const int bits = format_bits(a.f.format), columns = 8 / bits;  // of a byte: a thread writes whole bytes
  for (int byte = threadIdx.x; byte < a.f.k_row_bytes; byte += kBlock) {
    Coder coder[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= columns) continue;
      const int d = byte * columns + i;
      float low = -minus_infinity(), high = minus_infinity();
      for (int j = 0; j < group; ++j) {
        const float x = key(j, d);
        low = fminf(low, x), high = fmaxf(high, x);
      }
      coder[i] = make_coder(low, high, levels);
      scales[d] = (unsigned short)coder[i].scale, zeros[d] = (unsigned short)coder[i].zero;
    }
    for (int j = 0; j < group; ++j) {
      unsigned codes = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < columns) codes |= code_of(key(j, byte * columns + i), coder[i], levels) << bits * i;
      head[a.f.k + (long long)(t0 + j) * a.f.k_row_bytes + byte] = (unsigned char)codes;
    }
  }
}

// A block per token. Of the tokens with the same place in the tail the last one stays.
__global__ void __launch_bounds__(kBlock) append_tail_kernel(const Append a) {
  const int token = blockIdx.x, H = a.f.num_kv_heads, group = a.f.group, slot = at(a.slots, token), row = at(a.tail_rows, token);
  if (slot < 0) return;
  for (int first = token + 1; first < a.T; first += kBlock) {
    const int j = first + threadIdx.x, other = j < a.T ? at(a.slots, j) : -1;
    if (__syncthreads_or(other >= 0 && other % group == slot % group && at(a.tail_rows, j) == row)) return;
  }
  for (int i = threadIdx.x; i < H * a.f.k_dim; i += kBlock) {
    const int h = i / a.f.k_dim, d = i % a.f.k_dim;
    const float x = load_float(a.k, a.type, ((long long)token * H + h) * a.f.k_dim + d);
    store_float(a.tail, a.tail_type, (((long long)row * H + h) * group + slot % group) * a.f.k_dim + d, a.tail_type == kFp16 ? saturate_half(x) : x);
  }
}

}  // namespace pikv
