// The arguments of page_bounds and page_score, refused alike on CPU and CUDA.
#pragma once
#include "checks.h"

namespace pikv {

inline void check_bounds(const Tensor& bounds, const Tensor& pages, const PageFormat& f) {
  float_type("bounds", bounds);
  PK_CHECK(bounds.dim() == 4 && bounds.size(0) == pages.size(0) && bounds.size(1) == f.num_kv_heads && bounds.size(2) == 2 &&
               bounds.size(3) == f.k_dim,
           "bounds must be [", pages.size(0), ", ", f.num_kv_heads, ", 2, ", f.k_dim, "], got ", shape(bounds));
}

// N block tables = R requests x S shards; H kv heads; G query heads of a kv head.
struct ScoreSizes {
  int S, H, G, D, max_pages, bound_heads, table_heads, seqlen_heads;
};

inline ScoreSizes check_score(const Tensor& q, const Tensor& bounds, const Tensor& block_table, const Tensor& seqlens, const MaybeTensor& width) {
  float_type("q", q), float_type("bounds", bounds);
  if (width) {
    PK_CHECK(float_type("width", *width) == float_type("q", q), "width must have the dtype of q");
    PK_CHECK(shape(*width) == shape(q), "width must have the shape of q, ", shape(q), ", got ", shape(*width));
  }
  PK_CHECK(q.dim() == 3, "q must be [R, num_q_heads, head_dim], got ", shape(q));
  PK_CHECK(bounds.dim() == 4 && bounds.size(2) == 2, "bounds must be [num_pages, num_kv_heads, 2, head_dim], got ", shape(bounds));
  PK_CHECK(q.size(2) == bounds.size(3), "q has head_dim ", q.size(2), ", the bounds have ", bounds.size(3));
  PK_CHECK(block_table.dim() == 3, "block_table must be [N, 1 or num_kv_heads, max_pages], got ", shape(block_table));
  const int64_t N = block_table.size(0), R = q.size(0);
  ScoreSizes s = {};
  s.table_heads = (int)block_table.size(1), s.max_pages = (int)block_table.size(2), s.bound_heads = (int)bounds.size(1);
  s.H = std::max(s.table_heads, s.bound_heads), s.D = (int)q.size(2);
  PK_CHECK((s.table_heads == 1 || s.table_heads == s.H) && (s.bound_heads == 1 || s.bound_heads == s.H), "block_table has ", s.table_heads,
           " heads, the bounds have ", s.bound_heads);
  PK_CHECK(q.size(1) % s.H == 0, q.size(1), " query heads are not a multiple of ", s.H, " kv heads");
  PK_CHECK(R > 0 && N % R == 0, "block_table has ", N, " rows, which is not a multiple of the ", R, " requests of q");
  PK_CHECK(seqlens.dim() == 2 && seqlens.size(0) == N && (seqlens.size(1) == 1 || seqlens.size(1) == s.H), "seqlens must be [", N,
           ", 1 or ", s.H, "], got ", shape(seqlens));
  s.S = (int)(N / R), s.G = (int)q.size(1) / s.H, s.seqlen_heads = (int)seqlens.size(1);
  return s;
}

}  // namespace pikv
