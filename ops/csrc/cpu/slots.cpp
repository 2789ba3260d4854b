// assign_slots on the CPU: one pass over the tokens, in order. Pages come off the stack in the order of ops/ref_slots.py.
#include <torch/csrc/stable/library.h>

#include "checks.h"

namespace pikv {
namespace {

int32_t* mutable_ints(const char* name, const Tensor& x) {
  PK_CHECK(x.scalar_type() == ScalarType::Int, name, " must be torch.int32, got ", dtype_name(x));
  PK_CHECK(x.is_contiguous(), name, " must be contiguous");
  return static_cast<int32_t*>(x.mutable_data_ptr());
}

const int64_t* long_indices(const char* name, const Tensor& x, int64_t count) {
  PK_CHECK(x.scalar_type() == ScalarType::Long, name, " must be torch.int64, got ", dtype_name(x));
  PK_CHECK(x.dim() == 1 && x.numel() == count && x.is_contiguous(), name, " must be contiguous [", count, "], got ", shape(x));
  return static_cast<const int64_t*>(x.const_data_ptr());
}

std::tuple<Tensor, Tensor> assign_slots(Tensor counts, Tensor block_table, Tensor free_stack, Tensor free_top, Tensor refcount, Tensor rows,
                                        MaybeTensor shard, MaybeTensor here, int64_t page_size, bool one_per_row, bool may_open) {
  PK_CHECK(counts.dim() == 2, "counts must be [R, S], got ", shape(counts));
  const int64_t R = counts.size(0), S = counts.size(1), N = rows.numel();
  PK_CHECK(block_table.dim() == 3 && block_table.size(0) == R && block_table.size(1) == S, "block_table must be [", R, ", ", S,
           ", max_pages], got ", shape(block_table));
  PK_CHECK(free_stack.dim() == 1 && refcount.dim() == 1 && free_stack.numel() == refcount.numel(), "free_stack ", shape(free_stack),
           " and refcount ", shape(refcount), " must both be [num_pages + 1]");
  PK_CHECK(free_top.scalar_type() == ScalarType::Long && free_top.numel() == 1, "free_top must be one torch.int64, got ",
           dtype_name(free_top), " ", shape(free_top));
  PK_CHECK(shard || S == 1, "shard is needed with ", S, " shards");
  int32_t *count = mutable_ints("counts", counts), *table = mutable_ints("block_table", block_table);
  int32_t *stack = mutable_ints("free_stack", free_stack), *references = mutable_ints("refcount", refcount);
  int64_t& top = *static_cast<int64_t*>(free_top.mutable_data_ptr());
  const int64_t *row = long_indices("rows", rows, N), *column = shard ? long_indices("shard", *shard, N) : nullptr;
  const bool* stored = nullptr;
  if (here) {
    PK_CHECK(here->scalar_type() == ScalarType::Bool && here->numel() == N && here->is_contiguous(), "here must be torch.bool [", N,
             "], got ", shape(*here));
    stored = static_cast<const bool*>(here->const_data_ptr());
  }
  const int64_t width = block_table.size(2);
  Tensor slot_mapping = new_tensor({N}, aoti_torch_dtype_int32()), tables = new_tensor({N}, aoti_torch_dtype_int32());
  int32_t *slot = static_cast<int32_t*>(slot_mapping.mutable_data_ptr()), *cells = static_cast<int32_t*>(tables.mutable_data_ptr());
  for (int64_t i = 0; i < N; ++i) {
    slot[i] = -1, cells[i] = 0;
    if (stored && !stored[i]) continue;
    const int64_t s = column ? column[i] : 0;
    PK_CHECK(row[i] >= 0 && row[i] < R && s >= 0 && s < S, "token ", i, " goes to row ", row[i], ", shard ", s, " of ", R, " x ", S);
    const int64_t cell = row[i] * S + s, page_column = count[cell] / page_size, offset = count[cell] % page_size;
    PK_CHECK(page_column < width - 1, "row ", row[i], ", shard ", s, " is full: the block table has ", width, " columns; reserve before");
    int32_t& page = table[cell * width + page_column];
    if (offset == 0) {
      PK_CHECK(may_open && top > 0, "a page is needed for row ", row[i], ", shard ", s, " and ", top, " are free; reserve before");
      page = stack[--top];
      ++references[page];
    }
    ++count[cell];
    slot[i] = (int32_t)(page * page_size + offset), cells[i] = (int32_t)cell;
  }
  return {slot_mapping, tables};
}

}  // namespace
}  // namespace pikv

STABLE_TORCH_LIBRARY_IMPL(pikv, CPU, m) { m.impl("assign_slots", TORCH_BOX(&pikv::assign_slots)); }
