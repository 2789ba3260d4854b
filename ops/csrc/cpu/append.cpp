// append and migrate on the CPU. Encoding gives the bits of ops/ref_formats.py: one f32 rounding per step, no fused multiply-add.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "checks.h"
#include "numbers.h"

namespace pikv {
namespace {

constexpr float kHalfMax = 65504.0f, kFp8Max = 448.0f;

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

void store_code(uint8_t* row, int d, uint8_t code, bool nibble) {
  if (!nibble) row[d] = code;
  else row[d / 2] = d % 2 ? (uint8_t)((row[d / 2] & 0x0f) | code << 4) : (uint8_t)((row[d / 2] & 0xf0) | code);
}

void store_raw(const PageFormat& f, uint8_t* row, const float* x, int D) {
  if (f.format == kFp32) std::memcpy(row, x, 4 * D);
  else
    for (int d = 0; d < D; ++d) reinterpret_cast<uint16_t*>(row)[d] = f.format == kBf16 ? float_to_bf16(x[d]) : float_to_half(x[d]);
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

void store_integers(uint8_t* row, uint16_t* scale, uint16_t* zero, const float* x, int D, int levels) {
  const auto range = std::minmax_element(x, x + D);
  const Grid g = make_grid(*range.first, *range.second, levels);
  *scale = g.scale, *zero = g.zero;
  for (int d = 0; d < D; ++d) store_code(row, d, encode(x[d], g, levels), levels == 15);
}

// A full group of raw keys [group, k_dim] -> codes, scales and zeros, per channel.
void store_group(const PageFormat& f, uint8_t* head, int first, const void* raw, int type, int64_t base) {
  const int levels = f.format == kInt4 ? 15 : 255, D = f.k_dim;
  uint16_t* scales = reinterpret_cast<uint16_t*>(head + f.k_scale) + (int64_t)(first / f.group) * D;
  uint16_t* zeros = reinterpret_cast<uint16_t*>(head + f.k_zero) + (int64_t)(first / f.group) * D;
  for (int d = 0; d < D; ++d) {
    float low = INFINITY, high = -INFINITY;
    for (int t = 0; t < f.group; ++t) {
      const float x = load_float(raw, type, base + (int64_t)t * D + d);
      low = std::min(low, x), high = std::max(high, x);
    }
    const Grid g = make_grid(low, high, levels);
    scales[d] = g.scale, zeros[d] = g.zero;
    for (int t = 0; t < f.group; ++t)
      store_code(head + f.k + (int64_t)(first + t) * f.k_row_bytes, d,
                 encode(load_float(raw, type, base + (int64_t)t * D + d), g, levels), levels == 15);
  }
}

void append(Tensor pages, MaybeTensor tail, Tensor k, Tensor v, Tensor positions, Tensor slot_mapping, MaybeTensor tail_rows,
            int64_t format, int64_t num_kv_heads, int64_t k_dim, int64_t v_dim, int64_t page_size, int64_t group, bool latent) {
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
        for (int part = 0; part < (latent ? 1 : 2); ++part) {
          const int D = part ? f.v_dim : f.k_dim;
          const int64_t from = (i * H + h) * D;
          for (int d = 0; d < D; ++d) x[d] = load_float(part ? values : keys, type, from + d);
          uint8_t* row = part ? head + f.v + (int64_t)t * f.v_row_bytes : head + f.k + (int64_t)t * f.k_row_bytes;
          uint16_t* scale = reinterpret_cast<uint16_t*>(head + (part ? f.v_scale : f.k_scale)) + t;
          if (f.format <= kFp16) store_raw(f, row, x.data(), D);
          else if (f.format == kFp8) store_fp8(row, scale, x.data(), D);
          else if (part) store_integers(row, scale, reinterpret_cast<uint16_t*>(head + f.v_zero) + t, x.data(), D,
                                        f.format == kInt4 ? 15 : 255);
          else {
            const int64_t base = (rows[i] * H + h) * f.group * D, at = base + (int64_t)(t % f.group) * D;
            for (int d = 0; d < D; ++d) {
              if (tail_type == kFp32) reinterpret_cast<float*>(kept)[at + d] = x[d];
              else reinterpret_cast<uint16_t*>(kept)[at + d] = tail_type == kBf16 ? float_to_bf16(x[d]) : float_to_half(x[d]);
            }
            if (t % f.group == f.group - 1) store_group(f, head, t - f.group + 1, kept, tail_type, base);
          }
        }
      }
  });
}

void migrate(Tensor target, Tensor source, Tensor target_ids, Tensor source_ids) {
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
