// The arguments of assign_slots, read and refused alike on CPU and CUDA.
#pragma once
#include "checks.h"

namespace pikv {

struct SlotArguments {
  int32_t *counts, *table, *free_stack, *refcount;
  int64_t* free_top;
  const int64_t *rows, *shard;  // shard null: S is 1
  const bool* here;             // null: all are
  int64_t N, R, S, width;
};

inline int32_t* mutable_ints(const char* name, const Tensor& x) {
  PK_CHECK(x.scalar_type() == ScalarType::Int, name, " must be torch.int32, got ", dtype_name(x));
  PK_CHECK(x.is_contiguous(), name, " must be contiguous");
  return static_cast<int32_t*>(x.mutable_data_ptr());
}

inline const int64_t* long_indices(const char* name, const Tensor& x, int64_t count) {
  PK_CHECK(x.scalar_type() == ScalarType::Long, name, " must be torch.int64, got ", dtype_name(x));
  PK_CHECK(x.dim() == 1 && x.numel() == count && x.is_contiguous(), name, " must be contiguous [", count, "], got ", shape(x));
  return static_cast<const int64_t*>(x.const_data_ptr());
}

inline SlotArguments read_slots(const Tensor& counts, const Tensor& block_table, const Tensor& free_stack, const Tensor& free_top,
                                const Tensor& refcount, const Tensor& rows, const MaybeTensor& shard, const MaybeTensor& here) {
  PK_CHECK(counts.dim() == 2, "counts must be [R, S], got ", shape(counts));
  SlotArguments a = {};
  a.R = counts.size(0), a.S = counts.size(1), a.N = rows.numel();
  PK_CHECK(block_table.dim() == 3 && block_table.size(0) == a.R && block_table.size(1) == a.S, "block_table must be [", a.R, ", ", a.S,
           ", max_pages], got ", shape(block_table));
  PK_CHECK(free_stack.dim() == 1 && refcount.dim() == 1 && free_stack.numel() == refcount.numel(), "free_stack ", shape(free_stack),
           " and refcount ", shape(refcount), " must both be [num_pages + 1]");
  PK_CHECK(free_top.scalar_type() == ScalarType::Long && free_top.numel() == 1, "free_top must be one torch.int64, got ",
           dtype_name(free_top), " ", shape(free_top));
  PK_CHECK(shard || a.S == 1, "shard is needed with ", a.S, " shards");
  a.counts = mutable_ints("counts", counts), a.table = mutable_ints("block_table", block_table);
  a.free_stack = mutable_ints("free_stack", free_stack), a.refcount = mutable_ints("refcount", refcount);
  a.free_top = static_cast<int64_t*>(free_top.mutable_data_ptr());
  a.rows = long_indices("rows", rows, a.N), a.shard = shard ? long_indices("shard", *shard, a.N) : nullptr;
  if (here) {
    PK_CHECK(here->scalar_type() == ScalarType::Bool && here->numel() == a.N && here->is_contiguous(), "here must be torch.bool [", a.N,
             "], got ", shape(*here));
    a.here = static_cast<const bool*>(here->const_data_ptr());
  }
  a.width = block_table.size(2);
  return a;
}

}  // namespace pikv
