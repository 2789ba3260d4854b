// assign_slots on the CPU.
#include <torch/csrc/stable/library.h>

#include "slot_checks.h"

namespace pikv {
namespace {

std::tuple<Tensor, Tensor> assign_slots(Tensor counts, Tensor block_table, Tensor free_stack, Tensor free_top, Tensor refcount, Tensor rows,
                                        MaybeTensor shard, MaybeTensor here, int64_t page_size, bool one_per_row, bool may_open) {
  PK_ONE_DEVICE("assign_slots", counts, block_table, free_stack, free_top, refcount, rows, shard, here);
  const SlotArguments a = read_slots(counts, block_table, free_stack, free_top, refcount, rows, shard, here);
  Tensor slot_mapping = new_tensor({a.N}, aoti_torch_dtype_int32()), tables = new_tensor({a.N}, aoti_torch_dtype_int32());
  assign_on_host(a, page_size, may_open, static_cast<int32_t*>(slot_mapping.mutable_data_ptr()), static_cast<int32_t*>(tables.mutable_data_ptr()));
  return {slot_mapping, tables};
}

}  // namespace
}  // namespace pikv

STABLE_TORCH_LIBRARY_IMPL(pikv, CPU, m) { m.impl("assign_slots", TORCH_BOX(&pikv::assign_slots)); }
