// assign_slots: checks and launch. Nothing here waits for the device.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/slot_checks.h"
#include "arguments.h"
#include "kernels.h"

namespace pikv {
namespace {

Tensor host_copy(const Tensor& x) {
  return torch::stable::to(torch::stable::clone(x), torch::stable::Device(torch::headeronly::DeviceType::CPU));
}
MaybeTensor host_copy(const MaybeTensor& x) { return x ? MaybeTensor(host_copy(*x)) : std::nullopt; }

// The same assignment on copies, for what it refuses: a kernel can only stop, which says nothing and ends the context.
void check_room(const Tensor& counts, const Tensor& block_table, const Tensor& free_stack, const Tensor& free_top, const Tensor& refcount,
                const Tensor& rows, const MaybeTensor& shard, const MaybeTensor& here, int64_t page_size, bool may_open) {
  const Tensor copies[] = {host_copy(counts), host_copy(block_table), host_copy(free_stack), host_copy(free_top), host_copy(refcount),
                           host_copy(rows)};
  const MaybeTensor shards = host_copy(shard), stored = host_copy(here);
  const SlotArguments a = read_slots(copies[0], copies[1], copies[2], copies[3], copies[4], copies[5], shards, stored);
  std::vector<int32_t> slots(a.N), cells(a.N);
  assign_on_host(a, page_size, may_open, slots.data(), cells.data());
}

std::tuple<Tensor, Tensor> assign_slots(Tensor counts, Tensor block_table, Tensor free_stack, Tensor free_top, Tensor refcount, Tensor rows,
                                        MaybeTensor shard, MaybeTensor here, int64_t page_size, bool, bool may_open) {
  PK_ONE_DEVICE("assign_slots", counts, block_table, free_stack, free_top, refcount, rows, shard, here);
  const SlotArguments read = read_slots(counts, block_table, free_stack, free_top, refcount, rows, shard, here);
  if (values_are_checked(counts))
    check_room(counts, block_table, free_stack, free_top, refcount, rows, shard, here, page_size, may_open);
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
