// append, migrate, checksum: checks and launches. Nothing here waits for the device.
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "kernels.h"

namespace pikv {
namespace {

void append(Tensor pages, MaybeTensor tail, Tensor k, Tensor v, Tensor positions, Tensor slot_mapping, MaybeTensor tail_rows, int64_t format,
            int64_t num_kv_heads, int64_t k_dim, int64_t v_dim, int64_t page_size, int64_t group, bool latent) {
  PK_ONE_DEVICE("append", pages, tail, k, v, positions, slot_mapping, tail_rows);
  const PageFormat f = check_pages(pages, format, num_kv_heads, k_dim, v_dim, page_size, group, latent);
  const int64_t T = slot_mapping.numel(), H = f.num_kv_heads;
  Append a = {};
  a.f = f, a.T = (int)T, a.type = float_type("k", k);
  check_aligned("pages", pages);
  PK_CHECK(k.dim() == 3 && k.size(0) == T && k.size(1) == H && k.size(2) == f.k_dim, "k must be [", T, ", ", H, ", ", f.k_dim, "], got ", shape(k));
  if (!latent) {
    const int v_type = float_type("v", v);
    PK_CHECK(v.dim() == 3 && v.size(0) == T && v.size(1) == H && v.size(2) == f.v_dim, "v must be [", T, ", ", H, ", ", f.v_dim, "], got ", shape(v));
    PK_CHECK(a.type == v_type, "k is ", dtype_name(k), ", v is ", dtype_name(v));
    a.v = v.const_data_ptr();
  }
  a.slots = read_index("slot_mapping", slot_mapping), a.positions = read_index("positions", positions);
  a.tail_rows = read_index("tail_rows", tail_rows);
  PK_CHECK(positions.dim() == 1 && positions.numel() == T, "positions must be [", T, "], got ", shape(positions));
  a.tail_type = check_tail(f, tail, tail_rows);
  const bool grouped = format_grouped(f.format);
  PK_CHECK(!grouped || tail_rows->numel() == T, "tail_rows must be [", T, "], got ", shape(*tail_rows));
  if (values_are_checked(pages)) {
    const HostIndices rows("tail_rows", tail_rows), slots("slot_mapping", slot_mapping);
    PK_CHECK(!grouped || rows->top() < tail->size(0), "tail row ", rows->top(), " is beyond the ", tail->size(0), " rows of the tail");
    PK_CHECK(slots->top() < pages.size(0) * page_size, "slot ", slots->top(), " is beyond the ", pages.size(0) * page_size, " slots of the store");
  }
  a.k = k.const_data_ptr();
  a.pages = static_cast<unsigned char*>(pages.mutable_data_ptr());
  if (tail) a.tail = tail->mutable_data_ptr();
  const Device device(pages);
  if (T) check_launch(launch_append(a, device.stream()));
}

void migrate(Tensor target, Tensor source, Tensor target_ids, Tensor source_ids) {
  PK_ONE_DEVICE("migrate", target, source, target_ids, source_ids);
  for (const auto& [name, x] : {std::pair<const char*, const Tensor*>{"target", &target}, {"source", &source}})
    PK_CHECK(x->scalar_type() == ScalarType::Byte && x->dim() == 2 && x->is_contiguous(), name, " must be contiguous uint8 [num_pages, record_bytes]");
  PK_CHECK(target.size(1) == source.size(1), "target has records of ", target.size(1), " bytes, source of ", source.size(1));
  Migrate m = {};
  m.target_ids = read_index("target_ids", target_ids), m.source_ids = read_index("source_ids", source_ids);
  if (values_are_checked(target)) {
    const HostIndices to("target_ids", target_ids), from("source_ids", source_ids);
    PK_CHECK(to->top() < target.size(0), "target_ids has page ", to->top(), ", the store has ", target.size(0));
    PK_CHECK(from->top() < source.size(0), "source_ids has page ", from->top(), ", the store has ", source.size(0));
  }
  const int64_t count = target_ids.numel();
  PK_CHECK(count == source_ids.numel(), "target_ids ", shape(target_ids), " and source_ids ", shape(source_ids), " differ");
  m.target = static_cast<unsigned char*>(target.mutable_data_ptr()), m.source = static_cast<const unsigned char*>(source.const_data_ptr());
  m.record_bytes = target.size(1);
  const Device device(target);
  if (count) check_launch(launch_migrate(m, count, device.stream()));
}

Tensor checksum(Tensor data) {
  const int64_t bytes = data.numel() * (int64_t)data.element_size();
  PK_CHECK(data.is_contiguous() && bytes % 8 == 0, "checksum needs a contiguous tensor of whole 8-byte words, got ", bytes, " bytes");
  const Device device(data);
  Tensor result = torch::stable::new_empty(data, {}, ScalarType::Long);
  torch::stable::zero_(result);
  Checksum c = {};
  c.words = static_cast<const unsigned long long*>(data.const_data_ptr()), c.count = bytes / 8;
  c.result = static_cast<unsigned long long*>(result.mutable_data_ptr());
  const int64_t blocks = std::min<int64_t>((c.count + 1023) / 1024, 16LL * device.num_processors());
  if (blocks) check_launch(launch_checksum(c, (int)blocks, device.stream()));
  return result;
}

}  // namespace
}  // namespace pikv

PK_LIBRARY_IMPL(m) {
  m.impl("append", TORCH_BOX(&pikv::append));
  m.impl("migrate", TORCH_BOX(&pikv::migrate));
  m.impl("checksum", TORCH_BOX(&pikv::checksum));
}
