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

// One pass over the tokens, in order. Pages come off the stack in the order of ops/reference/slots.py. `slot` and `cells`: [N] each.
inline void assign_on_host(const SlotArguments& a, int64_t page_size, bool may_open, int32_t* slot, int32_t* cells) {
  const int64_t N = a.N, R = a.R, S = a.S, width = a.width;
  int64_t& top = *a.free_top;
  for (int64_t i = 0; i < N; ++i) {
    slot[i] = -1, cells[i] = 0;
    if (a.here && !a.here[i]) continue;
    const int64_t row = a.rows[i], column = a.shard ? a.shard[i] : 0;
    PK_CHECK(row >= 0 && row < R && column >= 0 && column < S, "token ", i, " goes to row ", row, ", shard ", column, " of ", R, " x ", S);
    const int64_t cell = row * S + column, page_column = a.counts[cell] / page_size, offset = a.counts[cell] % page_size;
    PK_CHECK(page_column < width - 1, "row ", row, ", shard ", column, " is full: the block table has ", width, " columns; reserve before");
    int32_t& page = a.table[cell * width + page_column];
    if (offset == 0) {
      PK_CHECK(may_open && top > 0, "a page is needed for row ", row, ", shard ", column, " and ", top, " are free; reserve before");
      page = a.free_stack[--top];
      ++a.refcount[page];
    }
    ++a.counts[cell];
    slot[i] = (int32_t)(page * page_size + offset), cells[i] = (int32_t)cell;
  }
}

}  // namespace pikv
