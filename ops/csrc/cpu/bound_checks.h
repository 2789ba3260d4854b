// The arguments of page_bounds and page_score, refused alike on CPU and CUDA.
#pragma once
#include "checks.h"

namespace pikv {

// kFp32, kBf16, kFp16 or kInt8 of contiguous bounds.
inline int bound_type(const Tensor& bounds) {
  const ScalarType t = bounds.scalar_type();
  PK_CHECK(t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half || t == ScalarType::Char,
           "bounds must be float32, bfloat16, float16 or int8, got ", dtype_name(bounds));
  PK_CHECK(bounds.is_contiguous(), "bounds must be contiguous");
  return t == ScalarType::Char ? kInt8 : float_type("bounds", bounds);
}

// blocks: of a page, each with bounds of its own.
inline int check_bounds(const Tensor& bounds, const Tensor& pages, const PageFormat& f, int64_t blocks = 1) {
  const int type = bound_type(bounds), columns = bound_columns(type, f.k_dim);
  PK_CHECK(bounds.dim() == 4 && bounds.size(0) == blocks * pages.size(0) && bounds.size(1) == f.num_kv_heads && bounds.size(2) == 2 &&
               bounds.size(3) == columns,
           "bounds must be [", blocks * pages.size(0), ", ", f.num_kv_heads, ", 2, ", columns, "], got ", shape(bounds));
  return type;
}

// N block tables = R requests x S shards; H kv heads; G query heads of a kv head.
struct ScoreSizes {
  int S, H, G, D, max_pages, bound_heads, table_heads, seqlen_heads;
};

inline ScoreSizes check_score(const Tensor& q, const Tensor& bounds, const Tensor& block_table, const Tensor& seqlens, const MaybeTensor& width) {
  float_type("q", q);
  if (width) {
    PK_CHECK(float_type("width", *width) == float_type("q", q), "width must have the dtype of q");
    PK_CHECK(shape(*width) == shape(q), "width must have the shape of q, ", shape(q), ", got ", shape(*width));
  }
  const int type = bound_type(bounds);
  PK_CHECK(q.dim() == 3, "q must be [R, num_q_heads, head_dim], got ", shape(q));
  PK_CHECK(bounds.dim() == 4 && bounds.size(2) == 2, "bounds must be [num_pages, num_kv_heads, 2, head_dim], got ", shape(bounds));
  const int64_t bound_dim = bounds.size(3) - bound_columns(type, 0);
  PK_CHECK(q.size(2) == bound_dim, "q has head_dim ", q.size(2), ", the bounds have ", bound_dim);
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
