// append and migrate on the CPU. Encoding gives the bits of ops/reference/formats.py: one f32 rounding per step, no fused multiply-add.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "checks.h"
#include "numbers.h"

namespace pikv {
namespace {

constexpr float kFp8Max = 448.0f;

struct Grid {
  uint16_t scale, zero;
  float inverse, low;
};

Grid make_grid(float low, float high, int levels) {
  Grid g;
  g.zero = float_to_half(std::clamp(low, -kHalfMax, kHalfMax));
  g.low = half_to_float(g.zero);
  const float step = (std::clamp(high, -kHalfMax, kHalfMax) - g.low) * (float)(1.0 / levels);
  g.scale = float_to_half(std::max(step, 0.0f));
  const float s = half_to_float(g.scale);
  g.inverse = s > 0 ? 1.0f / s : 0.0f;
  return g;
}

inline uint8_t encode(float x, const Grid& g, int levels) {
  return (uint8_t)std::clamp(std::nearbyint((x - g.low) * g.inverse), 0.0f, (float)levels);
}

void store_code(uint8_t* row, int d, uint8_t code, int bits) {
  const int shift = d * bits % 8;
  uint8_t& byte = row[d * bits / 8];
  byte = (uint8_t)((byte & ~(((1 << bits) - 1) << shift)) | code << shift);
}

void store_raw(int format, uint8_t* row, const float* x, int D) {
  if (format == kFp32) std::memcpy(row, x, 4 * D);
  else
    for (int d = 0; d < D; ++d) reinterpret_cast<uint16_t*>(row)[d] = format == kBf16 ? float_to_bf16(x[d]) : float_to_half(x[d]);
}

void store_fp8(uint8_t* row, uint16_t* scale, const float* x, int D) {
  float top = 0;
  for (int d = 0; d < D; ++d) top = std::max(top, std::fabs(x[d]));
  int exponent = 0;
  const float fraction = std::frexp(top, &exponent);  // in [0.5, 1); 448 = 0.875 * 2^9
  exponent = std::clamp(exponent - 9 + (fraction > 0.875f), -24, 15);
  const float s = std::ldexp(1.0f, exponent), inverse = std::ldexp(1.0f, -exponent);
  *scale = float_to_half(s);
  for (int d = 0; d < D; ++d) row[d] = float_to_fp8(std::clamp(x[d] * inverse, -kFp8Max, kFp8Max));
}

// A NaN counts as 0; what is beyond the largest exponent saturates.
inline float fp4_input(float x) {
  const float limit = 2688.0f * 0x1p63f;
  return x != x ? 0.0f : std::clamp(x, -limit, limit);
}

void store_fp4(uint8_t* row, uint8_t* scales, uint8_t* biased, const float* x, int D) {
  float top = 0;
  for (int d = 0; d < D; ++d) top = std::max(top, std::fabs(fp4_input(x[d])));
  int exponent = 0;
  const float fraction = std::frexp(top, &exponent);  // 2688 = 448 * 6 = 0.65625 * 2^12
  exponent = std::clamp(exponent - 12 + (fraction > 0.65625f), -64, 63);
  *biased = (uint8_t)(exponent + 127);
  const float down = power_of_two(127 - exponent);
  for (int b = 0; b < fp4_blocks(D); ++b) {
    const int begin = b * kFp4Block, end = std::min(D, begin + kFp4Block);
    float most = 0;
    for (int d = begin; d < end; ++d) most = std::max(most, std::fabs(fp4_input(x[d])));
    scales[b] = float_to_fp8(std::min(most * down * (float)(1.0 / 6), kFp8Max));
    const float s = fp8_to_float(scales[b]), inverse = s > 0 ? 1.0f / s * down : 0.0f;
    for (int d = begin; d < end; ++d) store_code(row, d, float_to_fp4(fp4_input(x[d]) * inverse), 4);
  }
}

void store_integers(uint8_t* row, uint16_t* scale, uint16_t* zero, const float* x, int D, int format) {
  const int levels = format_levels(format);
  const auto range = std::minmax_element(x, x + D);
  const Grid g = make_grid(*range.first, *range.second, levels);
  *scale = g.scale, *zero = g.zero;
  for (int d = 0; d < D; ++d) store_code(row, d, encode(x[d], g, levels), format_bits(format));
}

// Row t of a block whose rows are encoded each by itself.
void store_token(int format, uint8_t* row, uint8_t* scales, uint8_t* zeros, int t, const float* x, int D) {
  if (format <= kFp16) return store_raw(format, row, x, D);
  if (format == kFp4) return store_fp4(row, scales + t * fp4_blocks(D), zeros + t, x, D);
  if (format == kFp8) return store_fp8(row, reinterpret_cast<uint16_t*>(scales) + t, x, D);
  store_integers(row, reinterpret_cast<uint16_t*>(scales) + t, reinterpret_cast<uint16_t*>(zeros) + t, x, D, format);
}

// A full group of raw keys [group, k_dim] -> codes, scales and zeros, per channel.
void store_group(const PageFormat& f, uint8_t* head, int first, const void* raw, int type, int64_t base) {
  const int levels = format_levels(f.format), bits = format_bits(f.format), D = f.k_coded;
  uint16_t* scales = reinterpret_cast<uint16_t*>(head + f.k_scale) + (int64_t)(first / f.group) * D;
  uint16_t* zeros = reinterpret_cast<uint16_t*>(head + f.k_zero) + (int64_t)(first / f.group) * D;
  for (int d = 0; d < D; ++d) {
    float low = INFINITY, high = -INFINITY;
    for (int t = 0; t < f.group; ++t) {
      const float x = load_float(raw, type, base + (int64_t)t * f.k_dim + d);
      low = std::min(low, x), high = std::max(high, x);
    }
    const Grid g = make_grid(low, high, levels);
    scales[d] = g.scale, zeros[d] = g.zero;
    for (int t = 0; t < f.group; ++t)
      store_code(head + f.k + (int64_t)(first + t) * f.k_row_bytes, d,
                 encode(load_float(raw, type, base + (int64_t)t * f.k_dim + d), g, levels), bits);
  }
}

void store_tail(void* tail, int type, int64_t at, const float* x, int D) {
  if (type == kFp32) std::memcpy(static_cast<float*>(tail) + at, x, 4 * D);
  else
    for (int d = 0; d < D; ++d) static_cast<uint16_t*>(tail)[at + d] = type == kBf16 ? float_to_bf16(x[d]) : saturated_half(x[d]);
}

void append(Tensor pages, MaybeTensor tail, Tensor k, Tensor v, Tensor positions, Tensor slot_mapping, MaybeTensor tail_rows,
            int64_t format, int64_t num_kv_heads, int64_t k_dim, int64_t v_dim, int64_t page_size, int64_t group, bool latent) {
  PK_ONE_DEVICE("append", pages, tail, k, v, positions, slot_mapping, tail_rows);
  const PageFormat f = check_pages(pages, format, num_kv_heads, k_dim, v_dim, page_size, group, latent);
  const int type = float_type("k", k);
  const int64_t T = slot_mapping.numel(), H = f.num_kv_heads;
  PK_CHECK(k.dim() == 3 && k.size(0) == T && k.size(1) == H && k.size(2) == f.k_dim, "k must be [", T, ", ", H, ", ", f.k_dim, "], got ",
           shape(k));
  if (!latent) {
    const int v_type = float_type("v", v);
    PK_CHECK(v.dim() == 3 && v.size(0) == T && v.size(1) == H && v.size(2) == f.v_dim, "v must be [", T, ", ", H, ", ", f.v_dim, "], got ",
             shape(v));
    PK_CHECK(type == v_type, "k is ", dtype_name(k), ", v is ", dtype_name(v));
  }
  const Indices slots("slot_mapping", slot_mapping), stored("positions", positions), rows("tail_rows", tail_rows);
  PK_CHECK(positions.dim() == 1 && stored.count() == T, "positions must be [", T, "], got ", shape(positions));
  const int tail_type = check_tail(f, tail, tail_rows);
  const bool grouped = format_grouped(f.format);
  PK_CHECK(!grouped || rows.count() == T, "tail_rows must be [", T, "], got ", shape(*tail_rows));
  PK_CHECK(!grouped || rows.top() < tail->size(0), "tail row ", rows.top(), " is beyond the ", tail->size(0), " rows of the tail");
  PK_CHECK(slots.top() < pages.size(0) * page_size, "slot ", slots.top(), " is beyond the ", pages.size(0) * page_size,
           " slots of the store");
  uint8_t* store = static_cast<uint8_t*>(pages.mutable_data_ptr());
  uint8_t* kept = tail ? static_cast<uint8_t*>(tail->mutable_data_ptr()) : nullptr;
  const void *keys = k.const_data_ptr(), *values = latent ? nullptr : v.const_data_ptr();
  // Heads in parallel, tokens in order: a group is encoded when its last token arrives, before the next one overwrites the tail.
  torch::stable::parallel_for(0, H, T * f.k_dim > 16384 ? 1 : H, [&](int64_t begin, int64_t end) {
    std::vector<float> x(std::max(f.k_dim, f.v_dim));
    for (int64_t h = begin; h < end; ++h)
      for (int64_t i = 0; i < T; ++i) {
        if (slots[i] < 0) continue;
        const int64_t page = slots[i] / page_size;
        const int t = (int)(slots[i] % page_size);
        uint8_t* record = store + page * f.record_bytes;
        uint8_t* head = record + h * f.head_bytes;
        if (h == 0) reinterpret_cast<int32_t*>(record + f.positions)[t] = stored[i];
        if (!latent) {
          for (int d = 0; d < f.v_dim; ++d) x[d] = load_float(values, type, (i * H + h) * f.v_dim + d);
          store_token(f.v_format, head + f.v + (int64_t)t * f.v_row_bytes, head + f.v_scale, head + f.v_zero, t, x.data(), f.v_dim);
        }
        for (int d = 0; d < f.k_dim; ++d) x[d] = load_float(keys, type, (i * H + h) * f.k_dim + d);
        if (f.rope >= 0) store_tail(head + f.rope, kFp16, (int64_t)t * (f.k_dim - f.k_coded), x.data() + f.k_coded, f.k_dim - f.k_coded);
        if (!grouped) {
          store_token(f.format, head + f.k + (int64_t)t * f.k_row_bytes, head + f.k_scale, head + f.k_zero, t, x.data(), f.k_coded);
          continue;
        }
        const int64_t base = (rows[i] * H + h) * f.group * f.k_dim;
        store_tail(kept, tail_type, base + (int64_t)(t % f.group) * f.k_dim, x.data(), f.k_dim);
        if (t % f.group == f.group - 1) store_group(f, head, t - f.group + 1, kept, tail_type, base);
      }
  });
}

void migrate(Tensor target, Tensor source, Tensor target_ids, Tensor source_ids) {
  PK_ONE_DEVICE("migrate", target, source, target_ids, source_ids);
  for (const auto& [name, x] : {std::pair<const char*, const Tensor*>{"target", &target}, {"source", &source}})
    PK_CHECK(x->scalar_type() == ScalarType::Byte && x->dim() == 2 && x->is_contiguous(), name,
             " must be contiguous uint8 [num_pages, record_bytes]");
  PK_CHECK(target.size(1) == source.size(1), "target has records of ", target.size(1), " bytes, source of ", source.size(1));
  const Indices to("target_ids", target_ids), from("source_ids", source_ids);
  PK_CHECK(to.top() < target.size(0), "target_ids has page ", to.top(), ", the store has ", target.size(0));
  PK_CHECK(from.top() < source.size(0), "source_ids has page ", from.top(), ", the store has ", source.size(0));
  PK_CHECK(to.count() == from.count(), "target_ids ", shape(target_ids), " and source_ids ", shape(source_ids), " differ");
  const int64_t bytes = target.size(1);
  uint8_t* out = static_cast<uint8_t*>(target.mutable_data_ptr());
  const uint8_t* in = static_cast<const uint8_t*>(source.const_data_ptr());
  for (int64_t i = 0; i < to.count(); ++i)
    if (to[i] >= 0 && from[i] >= 0) std::memmove(out + to[i] * bytes, in + from[i] * bytes, bytes);
}

}  // namespace
}  // namespace pikv

STABLE_TORCH_LIBRARY_IMPL(pikv, CPU, m) {
  m.impl("append", TORCH_BOX(&pikv::append));
  m.impl("migrate", TORCH_BOX(&pikv::migrate));
}
