// assign_slots on the CPU: one pass over the tokens, in order. Pages come off the stack in the order of ops/reference/slots.py.
#include <torch/csrc/stable/library.h>

#include "slot_checks.h"

namespace pikv {
namespace {

std::tuple<Tensor, Tensor> assign_slots(Tensor counts, Tensor block_table, Tensor free_stack, Tensor free_top, Tensor refcount, Tensor rows,
                                        MaybeTensor shard, MaybeTensor here, int64_t page_size, bool one_per_row, bool may_open) {
  const SlotArguments a = read_slots(counts, block_table, free_stack, free_top, refcount, rows, shard, here);
  const int64_t N = a.N, R = a.R, S = a.S, width = a.width;
  int64_t& top = *a.free_top;
  Tensor slot_mapping = new_tensor({N}, aoti_torch_dtype_int32()), tables = new_tensor({N}, aoti_torch_dtype_int32());
  int32_t *slot = static_cast<int32_t*>(slot_mapping.mutable_data_ptr()), *cells = static_cast<int32_t*>(tables.mutable_data_ptr());
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
  return {slot_mapping, tables};
}

}  // namespace
}  // namespace pikv

STABLE_TORCH_LIBRARY_IMPL(pikv, CPU, m) { m.impl("assign_slots", TORCH_BOX(&pikv::assign_slots)); }
