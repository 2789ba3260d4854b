// page_bounds and page_score: checks and launches. Nothing here waits for the device.
#include <torch/csrc/stable/library.h>

#include "../cpu/bound_checks.h"
#include "arguments.h"
#include "kernels.h"

namespace pikv {
namespace {

void page_bounds(Tensor bounds, Tensor pages, Tensor slot_mapping, MaybeTensor tail, MaybeTensor tail_rows, int64_t format,
                 int64_t num_kv_heads, int64_t k_dim, int64_t v_dim, int64_t page_size, int64_t group, bool latent, int64_t block_size) {
  PK_ONE_DEVICE("page_bounds", bounds, pages, slot_mapping, tail, tail_rows);
  const PageFormat f = check_pages(pages, format, num_kv_heads, k_dim, v_dim, page_size, group, latent);
  const int64_t block = check_block(block_size, f);
  const int type = check_bounds(bounds, pages, f, page_size / block);
  check_aligned("pages", pages);
  const int64_t T = slot_mapping.numel(), num_slots = pages.size(0) * page_size;
  PageBounds b = {};
  b.f = f, b.T = (int)T, b.type = type, b.block = (int)block;
  b.slots = read_index("slot_mapping", slot_mapping), b.tail_rows = read_index("tail_rows", tail_rows);
  b.tail_type = check_tail(f, tail, tail_rows);
  const bool grouped = format_grouped(f.format);
  PK_CHECK(!grouped || tail_rows->numel() == T, "tail_rows must be [", T, "], got ", shape(*tail_rows));
  if (values_are_checked(pages)) {
    const HostIndices rows("tail_rows", tail_rows), slots("slot_mapping", slot_mapping);
    PK_CHECK(!grouped || rows->top() < tail->size(0), "tail row ", rows->top(), " is beyond the ", tail->size(0), " rows of the tail");
    PK_CHECK(slots->top() < num_slots, "slot ", slots->top(), " is beyond the ", num_slots, " slots of the store");
  }
  b.pages = static_cast<const unsigned char*>(pages.const_data_ptr()), b.bounds = bounds.mutable_data_ptr();
  if (tail) b.tail = tail->const_data_ptr();
  const Device device(pages);
  if (T) check_launch(launch_page_bounds(b, device.stream()));
}

Tensor page_score(Tensor q, Tensor bounds, Tensor block_table, Tensor seqlens, MaybeTensor width, int64_t page_size, double scale) {
  PK_ONE_DEVICE("page_score", q, bounds, block_table, seqlens, width);
  const ScoreSizes sizes = check_score(q, bounds, block_table, seqlens, width);
  const int64_t N = block_table.size(0);
  PageScore s = {};
  s.q_type = float_type("q", q), s.bounds_type = bound_type(bounds);
  s.S = sizes.S, s.H = sizes.H, s.G = sizes.G, s.D = sizes.D, s.page_size = (int)page_size, s.scale = (float)scale;
  s.max_pages = sizes.max_pages, s.bound_heads = sizes.bound_heads, s.table_heads = sizes.table_heads, s.seqlen_heads = sizes.seqlen_heads;
  s.table = read_index("block_table", block_table), s.seqlens = read_index("seqlens", seqlens);
  if (values_are_checked(bounds)) {
    const HostIndices table("block_table", block_table), lens("seqlens", seqlens);
    check_table(*table, *lens, (int)N, s.table_heads, s.seqlen_heads, s.max_pages, bounds.size(0), s.page_size);
  }
  const Device device(q);
  Tensor scores = torch::stable::new_empty(q, {N, s.H, s.max_pages}, ScalarType::Float);
  if (width) s.width = width->const_data_ptr();
  s.q = q.const_data_ptr(), s.bounds = bounds.const_data_ptr(), s.scores = static_cast<float*>(scores.mutable_data_ptr());
  if (scores.numel()) check_launch(launch_page_score(s, (int)N, device.stream()));
  return scores;
}

}  // namespace
}  // namespace pikv

PK_LIBRARY_IMPL(m) {
  m.impl("page_bounds", TORCH_BOX(&pikv::page_bounds));
  m.impl("page_score", TORCH_BOX(&pikv::page_score));
}
