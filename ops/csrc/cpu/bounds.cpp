// page_bounds and page_score on the CPU. Bounds are rounded away from the keys, so that a 16-bit bound still is one.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <unordered_map>

#include "bound_checks.h"
#include "cpu.h"
#include "rows.h"
#include "score.h"

namespace pikv {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The next 16-bit float towards -inf; both types count up with their magnitude.
inline uint16_t next_below(uint16_t h) { return (h & 0x7fff) == 0 ? 0x8001 : h & 0x8000 ? h + 1 : h - 1; }

// The largest 16-bit float that is not above x.
inline uint16_t not_above(float x, int type) {
  const uint16_t h = type == kBf16 ? float_to_bf16(x) : float_to_half(x);
  return (type == kBf16 ? bf16_to_float(h) : half_to_float(h)) > x ? next_below(h) : h;
}

inline void store_edge(void* bounds, int type, int64_t at, float x, bool upper) {
  if (type == kFp32) static_cast<float*>(bounds)[at] = x;
  else static_cast<uint16_t*>(bounds)[at] = upper ? not_above(-x, type) ^ 0x8000 : not_above(x, type);
}

// x [count, D] into the bounds [2, D] at `at`.
void widen(void* bounds, int type, int64_t at, const float* x, int count, int D) {
  for (int d = 0; d < D; ++d) {
    float low = x[d], high = x[d];
    for (int t = 1; t < count; ++t) low = std::min(low, x[(int64_t)t * D + d]), high = std::max(high, x[(int64_t)t * D + d]);
    if (low < load_float(bounds, type, at + d)) store_edge(bounds, type, at + d, low, false);
    if (high > load_float(bounds, type, at + D + d)) store_edge(bounds, type, at + D + d, high, true);
  }
}

// x [D], minima or maxima, as a row of int8 bounds [D + 2]: codes and a scale that is rounded up.
void store_coded(int8_t* row, const float* x, int D, bool upper) {
  constexpr float most = std::numeric_limits<float>::max();
  const float sign = upper ? -1.0f : 1.0f;  // rounding a maximum up is rounding its negative down
  float top = 0;
  for (int d = 0; d < D; ++d) top = std::max(top, std::min(std::abs(x[d]), most));
  uint16_t scale = not_above(-(top / 127.0f), kBf16) ^ 0x8000;
  if (bf16_to_float(scale) * 127.0f < top) ++scale;  // top / 127 may itself have been rounded down
  const float s = bf16_to_float(scale);
  for (int d = 0; d < D; ++d) {
    const float value = std::min(std::max(x[d], -most), most) * sign;
    float code = std::floor(value / s);
    if (code * s > value) code -= 1.0f;  // the quotient was rounded up to a whole number
    row[d] = s > 0 ? (int8_t)(int)(code * sign) : 0;
  }
  std::memcpy(row + D, &scale, sizeof scale);
}

// The box of keys x [count, D] into the at-th bounds [2, D], int8 [2, D + 2]; `box` is room for 2 D numbers.
void store_box(void* bounds, int type, int64_t at, const float* x, int count, int D, float* box) {
  std::fill(box, box + D, kInf), std::fill(box + D, box + 2 * D, -kInf);
  for (int t = 0; t < count; ++t, x += D)
    for (int d = 0; d < D; ++d) box[d] = x[d] < box[d] ? x[d] : box[d], box[D + d] = x[d] > box[D + d] ? x[d] : box[D + d];
  if (type == kInt8) {
    int8_t* codes = static_cast<int8_t*>(bounds) + at * 2 * (D + kBoundScale);
    store_coded(codes, box, D, false), store_coded(codes + D + kBoundScale, box + D, D, true);
    return;
  }
  for (int i = 0; i < 2 * D; ++i) store_edge(bounds, type, at * 2 * D + i, box[i], i >= D);
}

// Span of so many slots -> the token in the highest of them.
std::unordered_map<int64_t, int64_t> last_tokens(const Indices& slots, int64_t span) {
  std::unordered_map<int64_t, int64_t> last;
  for (int64_t i = 0; i < slots.count(); ++i) {
    if (slots[i] < 0) continue;
    const auto entry = last.try_emplace(slots[i] / span, i).first;
    if (slots[i] > slots[entry->second]) entry->second = i;
  }
  return last;
}

// The slot of the newest token of each tail row: what is in its group is in the tail, unless the group is full.
std::vector<int32_t> newest_slots(const Indices& slots, const Indices& rows, int64_t num_rows) {
  std::vector<int32_t> newest(num_rows, -1);
  for (int64_t i = 0; i < slots.count(); ++i)
    if (slots[i] >= 0) newest[rows[i]] = slots[i];
  return newest;
}

void page_bounds(Tensor bounds, Tensor pages, Tensor slot_mapping, MaybeTensor tail, MaybeTensor tail_rows, int64_t format,
                 int64_t num_kv_heads, int64_t k_dim, int64_t v_dim, int64_t page_size, int64_t group, bool latent, int64_t block_size) {
  PK_ONE_DEVICE("page_bounds", bounds, pages, slot_mapping, tail, tail_rows);
  const PageFormat f = check_pages(pages, format, num_kv_heads, k_dim, v_dim, page_size, group, latent);
  const int64_t block = check_block(block_size, f);
  const int type = check_bounds(bounds, pages, f, page_size / block), H = f.num_kv_heads, D = f.k_dim;
  const Indices slots("slot_mapping", slot_mapping), rows("tail_rows", tail_rows);
  const int64_t T = slots.count(), num_slots = pages.size(0) * page_size;
  const int tail_type = check_tail(f, tail, tail_rows);
  const bool grouped = format_grouped(f.format);
  PK_CHECK(!grouped || rows.count() == T, "tail_rows must be [", T, "], got ", shape(*tail_rows));
  PK_CHECK(!grouped || rows.top() < tail->size(0), "tail row ", rows.top(), " is beyond the ", tail->size(0), " rows of the tail");
  PK_CHECK(slots.top() < num_slots, "slot ", slots.top(), " is beyond the ", num_slots, " slots of the store");
  const std::vector<int32_t> newest = grouped ? newest_slots(slots, rows, tail->size(0)) : std::vector<int32_t>();
  const uint8_t* store = static_cast<const uint8_t*>(pages.const_data_ptr());
  const void* kept = tail ? tail->const_data_ptr() : nullptr;
  void* edges = bounds.mutable_data_ptr();
  if (type == kInt8 || block < page_size) {  // made from all keys: widening a coded box would round it again and again
    // A group of keys that is full changes the boxes of all blocks in it.
    const int64_t span = block == page_size ? page_size : grouped ? f.group : block;
    const auto last = last_tokens(slots, span);
    torch::stable::parallel_for(0, H, T * D > 16384 ? 1 : H, [&](int64_t begin, int64_t end) {
      std::vector<float> x((size_t)page_size * D), box(2 * D), scale(D), zero(D);
      for (int64_t h = begin; h < end; ++h)
        for (const auto& [at, i] : last) {
          const int64_t first = at * span, page = first / page_size;
          const int count = (int)(slots[i] - first) + 1;
          const int newest_slot = grouped ? newest[rows[i]] : 0;
          const bool open = grouped && newest_slot / f.group == slots[i] / f.group && newest_slot % f.group != f.group - 1;
          const int coded = open ? count - 1 - (count - 1) % f.group : count;  // the others are raw in the tail
          keys_to_float(f, store + page * f.record_bytes + h * f.head_bytes, (int)(first % page_size), coded, x.data(), scale.data(),
                        zero.data());
          if (open) {
            const int64_t from = ((int64_t)rows[i] * H + h) * f.group * D;
            for (int64_t at = 0; at < (int64_t)(count - coded) * D; ++at) x[coded * D + at] = load_float(kept, tail_type, from + at);
          }
          for (int64_t b = 0; b < count; b += block)
            store_box(edges, type, (first + b) / block * H + h, x.data() + b * D, (int)std::min<int64_t>(block, count - b), D, box.data());
        }
    });
    return;
  }
  torch::stable::parallel_for(0, H, T * D > 16384 ? 1 : H, [&](int64_t begin, int64_t end) {
    std::vector<float> x((size_t)(grouped ? f.group : 1) * D), scale(D), zero(D);
    for (int64_t h = begin; h < end; ++h) {
      for (int64_t i = 0; i < T; ++i) {  // a token in the first slot of a page starts the page anew
        if (slots[i] < 0 || slots[i] % page_size) continue;
        const int64_t at = (slots[i] / page_size * H + h) * 2 * D;
        for (int d = 0; d < D; ++d) store_edge(edges, type, at + d, kInf, false), store_edge(edges, type, at + D + d, -kInf, true);
      }
      for (int64_t i = 0; i < T; ++i) {
        if (slots[i] < 0) continue;
        const int64_t page = slots[i] / page_size, at = (page * H + h) * 2 * D;
        const uint8_t* head = store + page * f.record_bytes + h * f.head_bytes;
        const int t = (int)(slots[i] % page_size), last = t % f.group == f.group - 1;
        if (!grouped || last) {  // the last token of a group brings the codes of the whole group
          const int count = grouped ? f.group : 1;
          keys_to_float(f, head, t - count + 1, count, x.data(), scale.data(), zero.data());
          widen(edges, type, at, x.data(), count, D);
        } else if (slots[i] / f.group == newest[rows[i]] / f.group && newest[rows[i]] % f.group != f.group - 1) {
          const int64_t from = (((int64_t)rows[i] * H + h) * f.group + t % f.group) * D;
          for (int d = 0; d < D; ++d) x[d] = load_float(kept, tail_type, from + d);
          widen(edges, type, at, x.data(), 1, D);
        }
      }
    }
  });
}

Tensor page_score(Tensor q, Tensor bounds, Tensor block_table, Tensor seqlens, MaybeTensor width, int64_t page_size, double scale) {
  PK_ONE_DEVICE("page_score", q, bounds, block_table, seqlens, width);
  const ScoreSizes sizes = check_score(q, bounds, block_table, seqlens, width);
  const int64_t N = block_table.size(0);
  Score s = {};
  s.q_type = float_type("q", q), s.bounds_type = bound_type(bounds);
  s.S = sizes.S, s.H = sizes.H, s.G = sizes.G, s.D = sizes.D, s.page_size = (int)page_size, s.scale = (float)scale;
  s.max_pages = sizes.max_pages, s.bound_heads = sizes.bound_heads, s.table_heads = sizes.table_heads, s.seqlen_heads = sizes.seqlen_heads;
  const Indices table("block_table", block_table), lens("seqlens", seqlens);
  check_table(table, lens, (int)N, s.table_heads, s.seqlen_heads, s.max_pages, bounds.size(0), s.page_size);
  Tensor scores = new_floats({N, s.H, s.max_pages});
  s.width = width ? width->const_data_ptr() : nullptr;
  s.q = q.const_data_ptr(), s.bounds = bounds.const_data_ptr(), s.table = table.data(), s.seqlens = lens.data();
  s.scores = static_cast<float*>(scores.mutable_data_ptr());
  const ScoreTable one = score_kernel(s.bounds_type);
  torch::stable::parallel_for(0, N * s.H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) one(s, (int)(i / s.H), (int)(i % s.H));
  });
  return scores;
}

}  // namespace
}  // namespace pikv

STABLE_TORCH_LIBRARY_IMPL(pikv, CPU, m) {
  m.impl("page_bounds", TORCH_BOX(&pikv::page_bounds));
  m.impl("page_score", TORCH_BOX(&pikv::page_score));
}
