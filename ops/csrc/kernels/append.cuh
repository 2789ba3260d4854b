// New entries into their slots, in three launches: rows that need no other token; K groups that become full, from the tail and from this
// call; then the tail. Encoding gives the bits of ops/ref_formats.py: one f32 rounding per step, hence no fused multiply-add.

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
  const float step = __fmul_rn(__fsub_rn(clamp_half(high), c.low), levels == 15 ? (float)(1.0 / 15) : (float)(1.0 / 255));
  c.scale = float_to_half(fmaxf(step, 0.0f));
  const float s = half_to_float(c.scale);
  c.inverse = s > 0 ? __fdiv_rn(1.0f, s) : 0.0f;
  return c;
}

__device__ __forceinline__ unsigned code_of(float x, const Coder& c, int levels) {
  return (unsigned)fminf(fmaxf(rintf(__fmul_rn(__fsub_rn(x, c.low), c.inverse)), 0.0f), (float)levels);
}

// Columns d and d + 1 of a row; d is even.
__device__ __forceinline__ void store_codes(unsigned char* row, int d, unsigned low, unsigned high, bool nibbles) {
  if (nibbles) row[d / 2] = (unsigned char)(low | high << 4);
  else row[d] = (unsigned char)low, row[d + 1] = (unsigned char)high;
}

// The exponent of the smallest power of two that keeps `top` within 448 = 0.875 * 2^9.
__device__ __forceinline__ int fp8_exponent(float top) {
  const unsigned u = __float_as_uint(top);
  const int exponent = top == 0 ? 0 : (int)(u >> 23) - 126;  // top = fraction * 2^exponent, fraction in [0.5, 1); subnormal: below -24 anyway
  const int raised = (u & 0x7fffffu) > 0x600000u ? 1 : 0;
  return min(max(exponent - 9 + raised, -24), 15);
}

// One row of D elements by one warp.
__device__ __forceinline__ void store_row(int format, const void* x, int type, long long from, int D, unsigned char* row, unsigned short* scale, unsigned short* zero) {
  const int lane = threadIdx.x % 32;
  if (format <= kFp16) {
    for (int d = lane; d < D; d += 32) store_float(row, format, d, load_float(x, type, from + d));
    return;
  }
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
  const int levels = format == kInt4 ? 15 : 255;
  const Coder c = make_coder(low, high, levels);
  if (lane == 0) *scale = (unsigned short)c.scale, *zero = (unsigned short)c.zero;
  for (int d = 2 * lane; d < D; d += 64)
    store_codes(row, d, code_of(load_float(x, type, from + d), c, levels), code_of(load_float(x, type, from + d + 1), c, levels), format == kInt4);
}

// A warp per (token, head).
__global__ void __launch_bounds__(kBlock) append_rows_kernel(const Append a) {
  const long long i = (long long)blockIdx.x * kWarps + threadIdx.x / 32;
  const int H = a.f.num_kv_heads, token = (int)(i / H), h = (int)(i % H);
  if (token >= a.T) return;
  const int slot = at(a.slots, token);
  if (slot < 0) return;
  const int t = slot % a.f.page_size;
  unsigned char* record = a.pages + slot / a.f.page_size * a.f.record_bytes;
  unsigned char* head = record + h * a.f.head_bytes;
  if (h == 0 && threadIdx.x % 32 == 0) reinterpret_cast<int*>(record + a.f.positions)[t] = at(a.positions, token);
  if (!format_grouped(a.f.format))
    store_row(a.f.format, a.k, a.type, i * a.f.k_dim, a.f.k_dim, head + a.f.k + (long long)t * a.f.k_row_bytes,
              reinterpret_cast<unsigned short*>(head + a.f.k_scale) + t, nullptr);
  if (!a.f.latent)
    store_row(a.f.format, a.v, a.type, i * a.f.v_dim, a.f.v_dim, head + a.f.v + (long long)t * a.f.v_row_bytes,
              reinterpret_cast<unsigned short*>(head + a.f.v_scale) + t, reinterpret_cast<unsigned short*>(head + a.f.v_zero) + t);
}

// A key as the tail holds it.
__device__ __forceinline__ float as_tail(const Append& a, long long i) {
  const float x = load_float(a.k, a.type, i);
  return a.tail_type == kFp32 ? x : a.tail_type == kBf16 ? bf16_to_float(float_to_bf16(x)) : half_to_float(float_to_half(x));
}

// Grid: x = token, y = head. The token that completes a group encodes it; every other block ends at once.
__global__ void __launch_bounds__(kBlock) append_groups_kernel(const Append a) {
  PK_SHARED(shared);
  int* token_of = reinterpret_cast<int*>(shared);  // [group] the token of this call that has the slot, else -1: it is in the tail
  const int token = blockIdx.x, h = blockIdx.y, H = a.f.num_kv_heads, group = a.f.group, slot = at(a.slots, token);
  if (slot < 0 || slot % group != group - 1) return;
  const int first_slot = slot - group + 1, levels = a.f.format == kInt4 ? 15 : 255;
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
  unsigned short* scales = reinterpret_cast<unsigned short*>(head + a.f.k_scale) + (long long)(t0 / group) * a.f.k_dim;
  unsigned short* zeros = reinterpret_cast<unsigned short*>(head + a.f.k_zero) + (long long)(t0 / group) * a.f.k_dim;
  const auto key = [&](int j, int d) {
    if (token_of[j] >= 0) return as_tail(a, ((long long)token_of[j] * H + h) * a.f.k_dim + d);
    return load_float(a.tail, a.tail_type, (tail + j) * a.f.k_dim + d);
  };
  for (int d = 2 * threadIdx.x; d < a.f.k_dim; d += 2 * kBlock) {
    Coder coder[2];
    for (int side = 0; side < 2; ++side) {
      float low = -minus_infinity(), high = minus_infinity();
      for (int j = 0; j < group; ++j) {
        const float x = key(j, d + side);
        low = fminf(low, x), high = fmaxf(high, x);
      }
      coder[side] = make_coder(low, high, levels);
      scales[d + side] = (unsigned short)coder[side].scale, zeros[d + side] = (unsigned short)coder[side].zero;
    }
    for (int j = 0; j < group; ++j)
      store_codes(head + a.f.k + (long long)(t0 + j) * a.f.k_row_bytes, d, code_of(key(j, d), coder[0], levels), code_of(key(j, d + 1), coder[1], levels),
                  levels == 15);
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
    store_float(a.tail, a.tail_type, (((long long)row * H + h) * group + slot % group) * a.f.k_dim + d, x);
  }
}

}  // namespace pikv
