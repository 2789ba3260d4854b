// decode and prefill_cached on the CPU: checks, cutting into units, merging their partial results.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "attend.h"
#include "checks.h"
#include "cpu.h"

namespace pikv {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Partials are merged in order, so that the result does not depend on which thread made them. Divided once, at the end: a weight that is
// rounded after its own division would err by the same amount in every column. The row of an empty set (lse -inf) is not read.
void merge_rows(const float* out, const float* lse, int64_t count, int64_t row_stride, int D, float* to, float* to_lse) {
  float top = -kInf, total = 0;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, lse[i * row_stride]);  // passes NaN over: the total has it
  const float base = top == -kInf ? 0.0f : top;
  std::fill(to, to + D, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const float x = lse[i * row_stride];
    if (x == -kInf) continue;
    const float weight = std::exp(x - base);
    const float* row = out + i * row_stride * D;
    total += weight;
    for (int d = 0; d < D; ++d) to[d] += weight * row[d];
  }
  if (total != 1 && total != 0)
    for (int d = 0; d < D; ++d) to[d] /= total;
  *to_lse = top + std::log(total);
}

void add_tail_to_page_lse(const Attend& a, int n, int h, const float* tail_lse) {
  const int len = a.seqlen(n, h);
  if (len % a.f.group == 0) return;
  const int column = len / a.f.page_size;
  const int32_t* list = a.list_of(n, h);
  for (int c = list ? 0 : column; c < (list ? a.num_columns : column + 1); ++c) {
    if (list && list[c] != column) continue;
    for (int m = 0; m < a.rows(); ++m) {
      float* x = a.page_lse_row(n, h, m) + c;
      const float top = std::max(*x, tail_lse[m]);
      if (top > -kInf) *x = top + std::log(std::exp(*x - top) + std::exp(tail_lse[m] - top));
    }
  }
}

bool tail_is_read(const Attend& a, int n, int h) {
  const int len = a.seqlen(n, h);
  if (!a.tail || len % a.f.group == 0) return false;
  const int32_t* list = a.list_of(n, h);
  return !list || a.blocks > 1 || std::find(list, list + a.num_columns, len / a.f.page_size) != list + a.num_columns;
}

// Columns of a piece of a table that is read by one thread: by the page and the rows of the query alone, so that a result depends neither on
// the number of threads nor on the other tables of the call, bit for bit. A piece has costs of its own, about those of 100 tokens.
int piece_columns(const Attend& a) {
  const int64_t tokens = 4096ll * std::max(1, a.rows() / 16);
  return (int)std::max<int64_t>(1, tokens / a.block);
}

int pieces_of(const Attend& a, int columns) { return std::max(1, (columns + piece_columns(a) - 1) / piece_columns(a)); }

void run(Attend& a, int64_t num_splits, float* out, float* lse) {
  const int N = a.R * a.S, M = a.rows(), D = a.f.v_dim;
  const int splits = num_splits > 0 ? (int)std::clamp<int64_t>(num_splits, 1, std::max(1, a.num_columns)) : pieces_of(a, a.num_columns);
  const int parts = splits + (a.tail ? 1 : 0);
  std::vector<float> partial((size_t)N * a.H * parts * M * D), partial_lse((size_t)N * a.H * parts * M);
  const AttendUnit generic = generic_attend(), hand = hand_written_attend(a), paged = hand ? hand : generic;
  torch::stable::parallel_for(0, (int64_t)N * a.H * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int part = (int)(i % parts), h = (int)(i / parts % a.H), n = (int)(i / parts / a.H);
      Unit u = {n, h, 0, 0, part == splits, &partial[(size_t)i * M * D], &partial_lse[(size_t)i * M]};
      if (u.tail ? !tail_is_read(a, n, h) : false) {
        std::fill(u.lse, u.lse + M, -kInf);
        continue;
      }
      const int used = a.list ? a.num_columns : (a.paged(n, h) + a.block - 1) / a.block;
      const int per = num_splits > 0 ? (used + splits - 1) / splits : piece_columns(a);
      u.c0 = std::min(used, part * per), u.c1 = std::min(used, u.c0 + per);
      if (!u.tail && u.c0 == u.c1) {
        std::fill(u.lse, u.lse + M, -kInf);
        continue;
      }
      (u.tail ? generic : paged)(a, u);
    }
  });
  if (a.page_lse && a.tail && a.blocks == 1)
    for (int64_t i = 0; i < (int64_t)N * a.H; ++i)
      if (tail_is_read(a, (int)(i / a.H), (int)(i % a.H)))
        add_tail_to_page_lse(a, (int)(i / a.H), (int)(i % a.H), &partial_lse[((size_t)i * parts + splits) * M]);
  // [N, H, parts, M] -> [R, T, H * G]: the partials of one row lie M apart, those of the next shard H * parts * M.
  std::vector<float> shard((size_t)a.S * D), shard_lse(a.S);
  for (int r = 0; r < a.R; ++r)
    for (int h = 0; h < a.H; ++h)
      for (int m = 0; m < M; ++m) {
        const int64_t row = a.q_row(r * a.S, h, m);
        for (int s = 0; s < a.S; ++s) {
          const size_t at = (((size_t)(r * a.S + s) * a.H + h) * parts) * M + m;
          const bool last = a.S == 1;
          merge_rows(&partial[at * D], &partial_lse[at], parts, M, D, last ? out + row * D : &shard[(size_t)s * D],
                     last ? lse + row : &shard_lse[s]);
        }
        if (a.S > 1) merge_rows(shard.data(), shard_lse.data(), a.S, 1, D, out + row * D, lse + row);
      }
}

// Fills what both ops share and returns by reference the index copies that must outlive the call.
struct Held {
  Indices table, seqlens, asked, list, tail_rows;
};

Attend read_arguments(const Tensor& q, const Tensor& pages, const Tensor& block_table, const Tensor& seqlens,
                      const MaybeTensor& q_positions, const MaybeTensor& page_list, const MaybeTensor& tail, const MaybeTensor& tail_rows,
                      const PageFormat& f, int64_t block_size, Held& held) {
  Attend a = {};
  a.f = f;
  a.block = (int)check_block(block_size, f), a.blocks = f.page_size / a.block;
  a.q_type = float_type("q", q);
  a.pages = static_cast<const uint8_t*>(pages.const_data_ptr());
  a.num_pages = pages.size(0);
  PK_CHECK(block_table.dim() == 3, "block_table must be [N, 1 or num_kv_heads, max_pages], got ", shape(block_table));
  const int64_t N = block_table.size(0), dims = q.dim();
  a.R = (int)q.size(0), a.T = dims == 4 ? (int)q.size(1) : 1;
  a.table_heads = (int)block_table.size(1), a.max_pages = (int)block_table.size(2);
  a.H = std::max(a.table_heads, f.num_kv_heads);
  const int64_t num_q_heads = q.size(dims - 2);
  PK_CHECK((a.table_heads == 1 || a.table_heads == a.H) && (f.num_kv_heads == 1 || f.num_kv_heads == a.H), "block_table has ",
           a.table_heads, " heads, the pages have ", f.num_kv_heads);
  PK_CHECK(q.size(dims - 1) == f.k_dim, "q has head_dim ", q.size(dims - 1), ", the pages have ", f.k_dim);
  PK_CHECK(num_q_heads % a.H == 0, num_q_heads, " query heads are not a multiple of ", a.H, " kv heads");
  PK_CHECK(a.R > 0 && N % a.R == 0, "block_table has ", N, " rows, which is not a multiple of the ", a.R, " requests of q");
  a.S = (int)(N / a.R), a.G = (int)num_q_heads / a.H;
  PK_CHECK(seqlens.dim() == 2 && seqlens.size(0) == N && (seqlens.size(1) == 1 || seqlens.size(1) == a.H), "seqlens must be [", N,
           ", 1 or ", a.H, "], got ", shape(seqlens));
  a.seqlen_heads = (int)seqlens.size(1);
  a.num_columns = a.max_pages * a.blocks;
  held.table = Indices("block_table", block_table), held.seqlens = Indices("seqlens", seqlens);
  held.asked = Indices("q_positions", q_positions), held.list = Indices("page_list", page_list);
  held.tail_rows = Indices("tail_rows", tail_rows);
  if (page_list) {
    PK_CHECK(page_list->dim() == 3 && page_list->size(0) == N && (page_list->size(1) == 1 || page_list->size(1) == a.H),
             "page_list must be [", N, ", 1 or ", a.H, ", num_listed], got ", shape(*page_list));
    a.list_heads = (int)page_list->size(1), a.num_columns = (int)page_list->size(2);
    PK_CHECK(held.list.top() < a.max_pages * a.blocks, "page_list names column ", held.list.top() / a.blocks, " of a block table with ",
             a.max_pages);
  }
  a.table = held.table.data(), a.seqlens = held.seqlens.data(), a.asked = held.asked.data(), a.list = held.list.data();
  a.tail_type = check_tail(f, tail, tail_rows);
  if (tail) {
    a.tail = tail->const_data_ptr();
    a.tail_rows = held.tail_rows.data();
    a.tail_heads = tail_rows->dim() == 2 ? (int)tail_rows->size(1) : 1;
    PK_CHECK(tail_rows->size(0) == N && (a.tail_heads == 1 || a.tail_heads == a.H), "tail_rows must be [", N, "] or [", N, ", 1 or ", a.H,
             "], got ", shape(*tail_rows));
    PK_CHECK(held.tail_rows.top() < tail->size(0), "tail row ", held.tail_rows.top(), " is beyond the ", tail->size(0),
             " rows of the tail");
  }
  a.q = q.const_data_ptr();
  check_table(held.table, held.seqlens, (int)N, a.table_heads, a.seqlen_heads, a.max_pages, a.num_pages, f.page_size);
  return a;
}

std::tuple<Tensor, Tensor, Tensor> decode(Tensor q, Tensor pages, Tensor block_table, Tensor seqlens, MaybeTensor q_positions,
                                          MaybeTensor page_list, MaybeTensor tail, MaybeTensor tail_rows, int64_t format,
                                          int64_t num_kv_heads, int64_t k_dim, int64_t v_dim,
                                          int64_t page_size, int64_t group, bool latent, double scale, int64_t window, bool with_page_lse,
                                          int64_t num_splits, int64_t block_size) {
  PK_ONE_DEVICE("decode", q, pages, block_table, seqlens, q_positions, page_list, tail, tail_rows);
  const PageFormat f = check_pages(pages, format, num_kv_heads, k_dim, v_dim, page_size, group, latent);
  PK_CHECK(q.dim() == 3, "q must be [R, num_q_heads, head_dim], got ", shape(q));
  Held held;
  Attend a = read_arguments(q, pages, block_table, seqlens, q_positions, page_list, tail, tail_rows, f, block_size, held);
  PK_CHECK(!window || a.asked, "a window needs q_positions");
  a.scale = (float)scale, a.window = (int)window, a.fast = format & kFast;
  Tensor out = new_floats({q.size(0), q.size(1), v_dim}), lse = new_floats({q.size(0), q.size(1)});
  Tensor page_lse = with_page_lse ? new_floats({block_table.size(0), q.size(1), (int64_t)a.num_columns}) : new_floats({0});
  if (with_page_lse) {
    a.page_lse = static_cast<float*>(page_lse.mutable_data_ptr());
    std::fill(a.page_lse, a.page_lse + page_lse.numel(), -kInf);
  }
  run(a, num_splits, static_cast<float*>(out.mutable_data_ptr()), static_cast<float*>(lse.mutable_data_ptr()));
  return {out, lse, page_lse};
}

std::tuple<Tensor, Tensor> prefill_cached(Tensor q, Tensor pages, Tensor block_table, Tensor seqlens, Tensor q_positions, MaybeTensor tail,
                                          MaybeTensor tail_rows, int64_t format, int64_t num_kv_heads, int64_t k_dim, int64_t v_dim,
                                          int64_t page_size, int64_t group, bool latent, double scale, int64_t window, bool causal,
                                          int64_t num_splits) {
  PK_ONE_DEVICE("prefill_cached", q, pages, block_table, seqlens, q_positions, tail, tail_rows);
  const PageFormat f = check_pages(pages, format, num_kv_heads, k_dim, v_dim, page_size, group, latent);
  PK_CHECK(q.dim() == 4, "q must be [R, T, num_q_heads, head_dim], got ", shape(q));
  Held held;
  Attend a = read_arguments(q, pages, block_table, seqlens, q_positions, std::nullopt, tail, tail_rows, f, 0, held);
  PK_CHECK(held.asked.count() == q.size(0) * q.size(1), "q_positions must be [", q.size(0), ", ", q.size(1), "], got ", shape(q_positions));
  a.scale = (float)scale, a.window = (int)window, a.causal = causal, a.fast = format & kFast;
  Tensor out = new_floats({q.size(0), q.size(1), q.size(2), v_dim}), lse = new_floats({q.size(0), q.size(1), q.size(2)});
  run(a, num_splits, static_cast<float*>(out.mutable_data_ptr()), static_cast<float*>(lse.mutable_data_ptr()));
  return {out, lse};
}

Tensor out_like(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 1; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

std::tuple<Tensor, Tensor> merge(Tensor out, Tensor lse) {
  PK_ONE_DEVICE("merge", out, lse);
  PK_CHECK(out.scalar_type() == ScalarType::Float && lse.scalar_type() == ScalarType::Float, "merge needs float32 partials, got ",
           dtype_name(out), " and ", dtype_name(lse));
  bool same = out.dim() == lse.dim() + 1;
  for (int64_t i = 0; same && i < lse.dim(); ++i) same = out.size(i) == lse.size(i);
  PK_CHECK(same, "out ", shape(out), " and lse ", shape(lse), " differ in a leading dimension");
  PK_CHECK(out.is_contiguous() && lse.is_contiguous(), "out and lse must be contiguous");
  Tensor merged = out_like(out), merged_lse = out_like(lse);
  const int64_t S = lse.size(0), rows = merged_lse.numel(), D = out.size(out.dim() - 1);
  const float* from = static_cast<const float*>(out.const_data_ptr());
  const float* from_lse = static_cast<const float*>(lse.const_data_ptr());
  float* to = static_cast<float*>(merged.mutable_data_ptr());
  float* to_lse = static_cast<float*>(merged_lse.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) merge_rows(from + i * D, from_lse + i, S, rows, (int)D, to + i * D, to_lse + i);
  });
  return {merged, merged_lse};
}

}  // namespace
}  // namespace pikv

STABLE_TORCH_LIBRARY_IMPL(pikv, CPU, m) {
  m.impl("decode", TORCH_BOX(&pikv::decode));
  m.impl("prefill_cached", TORCH_BOX(&pikv::prefill_cached));
  m.impl("merge", TORCH_BOX(&pikv::merge));
}
