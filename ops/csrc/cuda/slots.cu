// assign_slots: checks and launch. Nothing here waits for the device.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/slot_checks.h"
#include "arguments.h"
#include "kernels.h"

namespace pikv {
namespace {

std::tuple<Tensor, Tensor> assign_slots(Tensor counts, Tensor block_table, Tensor free_stack, Tensor free_top, Tensor refcount, Tensor rows,
                                        MaybeTensor shard, MaybeTensor here, int64_t page_size, bool, bool may_open) {
  const SlotArguments read = read_slots(counts, block_table, free_stack, free_top, refcount, rows, shard, here);
  AssignSlots a = {};
  a.counts = read.counts, a.table = read.table, a.refcount = read.refcount, a.free_stack = read.free_stack;
  a.free_top = reinterpret_cast<long long*>(read.free_top);
  a.rows = reinterpret_cast<const long long*>(read.rows), a.shard = reinterpret_cast<const long long*>(read.shard);
  a.here = reinterpret_cast<const unsigned char*>(read.here);
  a.N = (int)read.N, a.R = (int)read.R, a.S = (int)read.S, a.max_pages = (int)read.width, a.page_size = (int)page_size, a.may_open = may_open;
  const Device device(counts);
  Tensor slot_mapping = torch::stable::new_empty(counts, {read.N}, ScalarType::Int);
  Tensor tables = torch::stable::new_empty(counts, {read.N}, ScalarType::Int);
  a.slots = static_cast<int*>(slot_mapping.mutable_data_ptr()), a.tables = static_cast<int*>(tables.mutable_data_ptr());
  if (a.N) check_launch(launch_assign_slots(a, device.stream()));
  return {slot_mapping, tables};
}

}  // namespace
}  // namespace pikv

PK_LIBRARY_IMPL(m) { m.impl("assign_slots", TORCH_BOX(&pikv::assign_slots)); }
