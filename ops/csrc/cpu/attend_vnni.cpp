// Attention of one unit with AVX512 and VNNI: tiles of 16 tokens, up to 8 rows at a time.
//
// What made it fast, in the order of what it brought (docs/results holds the runs):
//   - the next tiles are prefetched line by line inside the arithmetic, not in a burst: one core then keeps the memory busy;
//   - rows of a kv head are computed together, so a key or value is loaded and widened once for all of them;
//   - integers: (q * scale) is split into two int8 parts, hi + lo / 256, so u8 x s8 dot products keep 16 bits of the query; likewise the
//     weights of values, four tokens of a column to a lane.
// No sum or maximum across lanes is taken between tiles. Value sums stay in f32; those of formats that unpack in pairs are kept as even and
// odd columns and put in order at the end. What the zeros of int8 and int4 values add is taken in page by page: codes are all positive, and
// the rounding of a sum of thousands of them would be large beside the result.
// Latents are keys and values at once. Integer ones have a scale and a zero per column and group: codes are summed by themselves, and
// taken in at the end of each group. Raw rotary columns add to the scores what fp16 keys of their width would.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "arena.h"
#include "avx512.h"
#include "numbers.h"
#include "vnni.h"
#include "vnni_codes.h"

namespace pikv {
namespace {

using namespace vnni;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;
constexpr int kAhead[kNumFormats] = {2, 2, 2, 4, 6, 4, 8, 6};  // tiles between prefetch and use, by format of K

__mmask16 visible_tokens(const Attend& a, const Unit& u, int t, const int32_t* positions, int count) {
  const __mmask16 there = mask_of(count);
  if (!a.window && !a.causal) return there;
  const int asked = a.asked[(int64_t)(u.n / a.S) * a.T + t];
  const __m512i p = _mm512_maskz_loadu_epi32(there, positions);
  __mmask16 seen = there;
  if (a.window) seen &= _mm512_cmpgt_epi32_mask(p, _mm512_set1_epi32((int)std::max<int64_t>((int64_t)asked - a.window, INT32_MIN)));
  if (a.causal) seen &= _mm512_cmple_epi32_mask(p, _mm512_set1_epi32(asked));
  return seen;
}

void prepare(const Attend& a, const Unit& u, Work& w, std::vector<Chunk>& chunks) {
  static thread_local Arena arena;
  const int M = a.rows();
  const bool by_column = a.f.latent && integers(a.f.format);
  const int rope = a.f.k_dim - a.f.k_coded;
  w.Dk = pad64(a.f.k_coded), w.Dv = pad64(a.f.v_dim), w.Dr = (rope + 31) / 32 * 32;
  arena.start((size_t)M * (6 * w.Dk + 8 * w.Dv + 4 * w.Dr + 3 * 64 + 12) + (size_t)(4 + kTile) * w.Dk + 20 * 64);
  w.q = arena.take<float>((size_t)M * w.Dk), w.acc = arena.take<float>((size_t)M * w.Dv);
  w.l = arena.take<float>((size_t)M * 16), w.page_l = arena.take<float>((size_t)M * 16), w.zeros = arena.take<float>((size_t)M * 16);
  w.m = arena.take<float>(M), w.q_scale = arena.take<float>(M), w.q_bias = arena.take<float>(M);
  w.product = arena.take<float>(w.Dk), w.k_bytes = arena.take<uint8_t>((size_t)kTile * w.Dk);
  w.codes = by_column ? arena.take<float>((size_t)M * w.Dv) : nullptr, w.q_rope = arena.take<float>((size_t)M * w.Dr);
  w.q_hi = arena.take<int8_t>((size_t)M * w.Dk), w.q_lo = arena.take<int8_t>((size_t)M * w.Dk);
  const bool pairs = query_in_pairs(a.f.format);
  for (int row = 0; row < M; ++row) {
    const int64_t at = a.q_row(u.n, u.h, row) * a.f.k_dim;
    for (int d = 0; d < w.Dk; ++d) {
      const float x = d < a.f.k_coded ? load_float(a.q, a.q_type, at + d) : 0.0f;
      w.q[(size_t)row * w.Dk + (pairs ? column_of(d) : d)] = x * (a.scale * kLog2e);
    }
    for (int d = 0; d < w.Dr; ++d)
      w.q_rope[(size_t)row * w.Dr + d] = d < rope ? load_float(a.q, a.q_type, at + a.f.k_coded + d) * (a.scale * kLog2e) : 0.0f;
    w.m[row] = -kInf;
  }
  for (float* sums : {w.l, w.page_l, w.zeros}) std::memset(sums, 0, (size_t)M * 16 * sizeof(float));
  std::memset(w.acc, 0, (size_t)M * w.Dv * sizeof(float));
  if (w.codes) std::memset(w.codes, 0, (size_t)M * w.Dv * sizeof(float));
  chunks.clear();
  for (int t = 0; t < a.T; ++t)
    for (int g = 0; g < a.G;) {
      const int left = a.G - g, count = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      chunks.push_back({t * a.G + g, count, t});
      g += count;
    }
}

inline void take_in_zeros(Work& w, int M) {
  for (int row = 0; row < M; ++row) {
    const __m512 zeros = _mm512_set1_ps(lanes(w.zeros, row));
    float* acc = w.acc + (size_t)row * w.Dv;
    for (int d = 0; d < w.Dv; d += 16) _mm512_store_ps(acc + d, _mm512_add_ps(_mm512_load_ps(acc + d), zeros));
  }
  std::memset(w.zeros, 0, (size_t)M * 16 * sizeof(float));
}

void finish(const Attend& a, const Unit& u, const Work& w) {
  for (int row = 0; row < a.rows(); ++row) {
    const float l = lanes(w.l, row), inverse = l > 0 ? 1 / l : 0.0f;
    const float* acc = w.acc + (size_t)row * w.Dv;
    float* out = u.out + (int64_t)row * a.f.v_dim;
    for (int d = 0; d < a.f.v_dim; ++d) {
      const int in_codes = in_pairs(a.f.v_format) ? column_of(d) : d;  // the order of take_in_codes
      out[d] = acc[w.codes ? in_codes : sum_of(a.f.v_format, a.f.v_dim, d)] * inverse;
    }
    u.lse[row] = l > 0 ? (w.m[row] + std::log2(l)) * kLn2 : -kInf;
  }
}

KeyKernel keys_of(const PageFormat& f) {
  switch (f.format) {
    case kFp32: return key_kernel<kFp32>(f.k_coded);
    case kBf16: return key_kernel<kBf16>(f.k_coded);
    case kFp16: return key_kernel<kFp16>(f.k_coded);
    case kInt8: return key_kernel<kInt8>(f.k_coded);
    case kInt4: return key_kernel<kInt4>(f.k_coded);
    case kInt2: return key_kernel<kInt2>(f.k_coded);
    case kFp4: return key_kernel<kFp4>(f.k_coded);
    default: return key_kernel<kFp8>(f.k_coded);
  }
}

ValueKernel values_of(const PageFormat& f) {
  switch (f.v_format) {
    case kFp32: return value_kernel<kFp32>(f.v_dim);
    case kBf16: return value_kernel<kBf16>(f.v_dim);
    case kFp16: return value_kernel<kFp16>(f.v_dim);
    case kInt8: return value_kernel<kInt8>(f.v_dim);
    case kInt4: return value_kernel<kInt4>(f.v_dim);
    case kInt2: return value_kernel<kInt2>(f.v_dim);
    case kFp4: return value_kernel<kFp4>(f.v_dim);
    default: return value_kernel<kFp8>(f.v_dim);
  }
}

// The scales and zeros of rows encoded each by itself, at token t0. Blocks that are not there are not read.
void point_at_scales(const PageFormat& f, const uint8_t* head, int t0, Tile& tile) {
  const auto at = [&](long long block, int bytes) { return block < 0 ? head : head + block + (int64_t)t0 * bytes; };
  tile.k_blocks = fp4_blocks(f.k_coded), tile.v_blocks = f.latent ? tile.k_blocks : fp4_blocks(f.v_dim);
  tile.k_scale = at(f.k_scale, f.format == kFp4 ? tile.k_blocks : 2), tile.k_zero = at(f.k_zero, 1);  // integer keys have theirs by group
  tile.v_scale = at(f.v_scale, f.v_format == kFp4 ? tile.v_blocks : 2), tile.v_zero = at(f.v_zero, f.v_format == kFp4 ? 1 : 2);
  if (f.latent) tile.v_scale = tile.k_scale, tile.v_zero = tile.k_zero;
}

}  // namespace

void attend_vnni(const Attend& a, const Unit& u) {
  static thread_local Work w;
  static thread_local std::vector<Chunk> chunks;
  prepare(a, u, w, chunks);
  const PageFormat& f = a.f;
  const KeyKernel keys = keys_of(f);
  const ValueKernel values = values_of(f);
  const bool zeros = format_grouped(f.v_format) && !w.codes;
  const int64_t rope_stride = 2LL * (f.k_dim - f.k_coded);
  alignas(64) float p[8 * kTile];
  const int32_t* table = a.table_of(u.n, u.h);
  const int32_t* list = a.list_of(u.n, u.h);
  const int limit = a.paged(u.n, u.h), tiles = (a.block + kTile - 1) / kTile, M = a.rows();
  const auto section_of = [&](const Piece& piece) -> const uint8_t* {
    return piece.count > 0 ? a.section(a.pages + (int64_t)table[piece.column] * f.record_bytes, u.h) : nullptr;
  };
  const uint8_t* started = nullptr;  // the section of the group that the query has met last, and its number behind that
  for (int c = u.c0; c < u.c1; ++c) {
    const Piece piece = a.piece(list, c, limit);
    if (piece.count > 0) {
      const uint8_t* record = a.pages + (int64_t)table[piece.column] * f.record_bytes;
      const uint8_t* head = a.section(record, u.h);
      const int32_t* positions = reinterpret_cast<const int32_t*>(record + f.positions);
      const uint8_t* next_page = c + 1 < u.c1 ? section_of(a.piece(list, c + 1, limit)) : nullptr;
      const int64_t first_scale = f.k_scale >= 0 ? f.k_scale : f.v_scale;
      if (first_scale >= 0 && next_page)
        for (int64_t i = first_scale & ~63; i < (f.rope < 0 ? f.head_bytes : f.rope); i += 64) prefetch(next_page + i);
      for (int i = 0; i * kTile < piece.count; ++i) {
        const int t0 = piece.first + i * kTile;
        Tile tile;
        tile.count = std::min(kTile, piece.count - i * kTile);
        if (const uint8_t* group = head + t0 / f.group; keys.start_group && group != started) {
          keys.start_group(a, head, t0 / f.group, M, w);
          started = group;
        }
        point_at_scales(f, head, t0, tile);
        const uint8_t* rows = head + f.k + (int64_t)t0 * f.k_row_bytes;
        keys.point_at(f, rows, tile, w);
        tile.v = f.latent ? rows : head + f.v + (int64_t)t0 * f.v_row_bytes, tile.v_stride = f.latent ? f.k_row_bytes : f.v_row_bytes;
        const int ahead = i + kAhead[f.format], later = c + ahead / tiles;
        const Piece then = ahead < tiles ? piece : later < u.c1 ? a.piece(list, later, limit) : Piece{};
        const uint8_t* next = then.count > 0 ? section_of(then) : head;
        const int64_t row = ahead % tiles * kTile + (then.count > 0 ? then.first : 0);
        tile.rope_stride = rope_stride;
        if (w.Dr) {
          tile.rope = head + f.rope + t0 * rope_stride;
          tile.next_rope = next + f.rope + row * rope_stride;
        }
        tile.next_k = next + f.k + row * f.k_row_bytes;
        tile.next_v = f.latent ? tile.next_k : next + f.v + row * f.v_row_bytes;
        for (size_t j = 0; j < chunks.size(); ++j) {
          const __mmask16 visible = visible_tokens(a, u, chunks[j].t, positions + t0, tile.count);
          if (!visible) continue;
          keys.scores(a, w, tile, chunks[j], visible, j + 1 == chunks.size(), p);
          values(a, w, tile, chunks[j], visible, j + 1 == chunks.size(), p);
        }
        if (w.codes && ((t0 + kTile) % f.group == 0 || i * kTile + kTile >= piece.count)) take_in_codes(f, head, t0 / f.group, w, M);
      }
      if (zeros) take_in_zeros(w, M);
    }
    if (!a.page_lse || piece.count <= 0) continue;  // its lse is -inf already
    for (int row = 0; row < M; ++row) {
      const float l = lanes(w.page_l, row);
      a.page_lse_row(u.n, u.h, row)[c] = l > 0 ? (w.m[row] + std::log2(l)) * kLn2 : -kInf;
    }
    std::fill(w.page_l, w.page_l + M * 16, 0.0f);
  }
  finish(a, u, w);
}

}  // namespace pikv
