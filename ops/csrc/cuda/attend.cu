// decode, prefill_cached and merge: checks, how the work is shared, launches. Nothing here waits for the device.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "arguments.h"
#include "kernels.h"
#include "work.h"

namespace pikv {
namespace {

constexpr bool has_kernels(int formats) {
#define PK_CASE(F) \
  if (formats == F) return true;
  PK_FORMATS(PK_CASE)
#undef PK_CASE
  return false;
}

// The kernels that serve this layout; 0 = none does.
int kernel_width(const PageFormat& f) {
  if (!has_kernels(packed_of(f))) return 0;
  if (f.latent) return f.k_dim <= 576 && f.v_dim <= 512 ? 576 : 0;
  const int widest = std::max(f.k_dim, f.v_dim);
  return widest <= 32 ? 32 : widest <= 64 ? 64 : widest <= 128 ? 128 : 0;
}

// Every id that will be read lies in the store; every length fits its table.
void check_values(const Attend& a, int64_t num_pages, int64_t tail_size, const Tensor& block_table, const Tensor& seqlens, const MaybeTensor& page_list,
                  const MaybeTensor& tail_rows) {
  const HostIndices table("block_table", block_table), lens("seqlens", seqlens), list("page_list", page_list), rows("tail_rows", tail_rows);
  PK_CHECK(list->top() < a.max_pages * a.blocks, "page_list names column ", list->top() / a.blocks, " of a block table with ", a.max_pages);
  PK_CHECK(!a.tail || rows->top() < tail_size, "tail row ", rows->top(), " is beyond the ", tail_size, " rows of the tail");
  check_table(*table, *lens, a.R * a.S, a.table_heads, a.seqlen_heads, a.max_pages, num_pages, a.f.page_size);
}

// q is [R, Hq, Dk] or [R, T, Hq, Dk].
Attend read_arguments(const Tensor& q, const Tensor& pages, const Tensor& block_table, const Tensor& seqlens, const MaybeTensor& q_positions,
                      const MaybeTensor& page_list, const MaybeTensor& tail, const MaybeTensor& tail_rows, const PageFormat& f, int64_t block_size) {
  Attend a = {};
  a.f = f;
  a.block = (int)check_block(block_size, f), a.blocks = f.page_size / a.block;
  a.q_type = float_type("q", q);
  a.q = q.const_data_ptr(), a.pages = static_cast<const unsigned char*>(pages.const_data_ptr());
  check_aligned("pages", pages);
  PK_CHECK(block_table.dim() == 3, "block_table must be [N, 1 or num_kv_heads, max_pages], got ", shape(block_table));
  const int64_t N = block_table.size(0), dims = q.dim(), num_q_heads = q.size(dims - 2);
  a.R = (int)q.size(0), a.T = dims == 4 ? (int)q.size(1) : 1;
  a.table_heads = (int)block_table.size(1), a.max_pages = (int)block_table.size(2);
  a.H = std::max(a.table_heads, f.num_kv_heads);
  PK_CHECK((a.table_heads == 1 || a.table_heads == a.H) && (f.num_kv_heads == 1 || f.num_kv_heads == a.H), "block_table has ", a.table_heads,
           " heads, the pages have ", f.num_kv_heads);
  PK_CHECK(q.size(dims - 1) == f.k_dim, "q has head_dim ", q.size(dims - 1), ", the pages have ", f.k_dim);
  PK_CHECK(num_q_heads % a.H == 0, num_q_heads, " query heads are not a multiple of ", a.H, " kv heads");
  PK_CHECK(a.R > 0 && N % a.R == 0, "block_table has ", N, " rows, which is not a multiple of the ", a.R, " requests of q");
  a.S = (int)(N / a.R), a.G = (int)num_q_heads / a.H;
  PK_CHECK(seqlens.dim() == 2 && seqlens.size(0) == N && (seqlens.size(1) == 1 || seqlens.size(1) == a.H), "seqlens must be [", N, ", 1 or ", a.H,
           "], got ", shape(seqlens));
  a.seqlen_heads = (int)seqlens.size(1), a.num_columns = a.max_pages * a.blocks, a.list_heads = 1;
  a.table = read_index("block_table", block_table), a.seqlens = read_index("seqlens", seqlens);
  a.asked = read_index("q_positions", q_positions), a.list = read_index("page_list", page_list), a.tail_rows = read_index("tail_rows", tail_rows);
  if (page_list) {
    PK_CHECK(page_list->dim() == 3 && page_list->size(0) == N && (page_list->size(1) == 1 || page_list->size(1) == a.H), "page_list must be [", N,
             ", 1 or ", a.H, ", num_listed], got ", shape(*page_list));
    a.list_heads = (int)page_list->size(1), a.num_columns = (int)page_list->size(2);
  }
  a.tail_type = check_tail(f, tail, tail_rows);
  if (tail) {
    a.tail = tail->const_data_ptr();
    check_aligned("tail", *tail);
    a.tail_heads = tail_rows->dim() == 2 ? (int)tail_rows->size(1) : 1;
    PK_CHECK(tail_rows->size(0) == N && (a.tail_heads == 1 || a.tail_heads == a.H), "tail_rows must be [", N, "] or [", N, ", 1 or ", a.H, "], got ",
             shape(*tail_rows));
  }
  if (values_are_checked(pages)) check_values(a, pages.size(0), tail ? tail->size(0) : 0, block_table, seqlens, page_list, tail_rows);
  return a;
}

const char* launch_format(const Attend& a, int width, Stream stream) {
  switch (packed_of(a.f)) {
#define PK_CASE(F) \
  case F: return launch_attend<F>(a, width, stream);
    PK_FORMATS(PK_CASE)
#undef PK_CASE
  }
  return "no kernels for these formats";
}

const char* launch_tensor_format(const Attend& a, Stream stream) {
  if (a.f.latent) switch (packed_of(a.f)) {
#define PK_CASE(F) \
  case F: return launch_latent<F>(a, stream);
    PK_LATENT_FORMATS(PK_CASE)
#undef PK_CASE
  }
  else switch (packed_of(a.f)) {
#define PK_CASE(F) \
  case F: return launch_tensor<F>(a, stream);
    PK_TENSOR_FORMATS(PK_CASE)
#undef PK_CASE
  }
  return "no tensor-core kernels for these formats";
}

// PIKV_TENSOR_CORES=0 leaves everything to the kernels of the fp32 tier. Read at every call: tests compare the two.
bool tensor_cores_are_allowed() {
  const char* given = std::getenv("PIKV_TENSOR_CORES");
  return !given || std::strcmp(given, "0");
}

// Two tokens are read at a time, so a block must begin at an even one.
bool on_tensor_cores(const PageFormat& f, const Tensor& q, int64_t block_size) {
  return tensor_cores_are_allowed() && block_size % 2 == 0 && has_tensor_kernel(f, float_type("q", q), q.const_data_ptr());
}

void merge_into(const Tensor& out, const Tensor& lse, Tensor& merged, Tensor& merged_lse, Stream stream) {
  Merge m = {};
  m.S = (int)lse.size(0), m.D = (int)out.size(out.dim() - 1), m.rows = merged_lse.numel();
  m.out = static_cast<const float*>(out.const_data_ptr()), m.lse = static_cast<const float*>(lse.const_data_ptr());
  m.merged = static_cast<float*>(merged.mutable_data_ptr()), m.merged_lse = static_cast<float*>(merged_lse.mutable_data_ptr());
  if (m.rows) check_launch(launch_merge(m, stream));
}

// width: of the kernels of the fp32 tier, 0 = on tensor cores.
void run(Attend& a, int width, int64_t num_splits, const Tensor& q, const Device& device, Tensor& out, Tensor& lse) {
  if (!lse.numel()) return;
  a.out = static_cast<float*>(out.mutable_data_ptr()), a.lse = static_cast<float*>(lse.mutable_data_ptr());
  const bool tensor = width == 0, tails = tensor && format_grouped(a.f.format);
  const int64_t M = (int64_t)a.T * a.G, slots = (tensor ? 2LL : 3LL) * device.num_processors();
  int64_t parts = share_work(a, tensor ? rows_of_tensor_block(a) : rows_of_block(a, width), slots, num_splits);
  const auto attend = [&] { check_launch(tensor ? launch_tensor_format(a, device.stream()) : launch_format(a, width, device.stream())); };
  if (!a.workers && a.S * a.splits == 1 && !tails) return attend();
  if (tails) a.tail_parts = (int)parts, parts += (int64_t)a.R * a.S * a.H;
  Tensor part_out = torch::stable::new_empty(q, {parts, M, a.f.v_dim}, ScalarType::Float);
  Tensor part_lse = torch::stable::new_empty(q, {parts, M}, ScalarType::Float);
  a.part_out = static_cast<float*>(part_out.mutable_data_ptr()), a.part_lse = static_cast<float*>(part_lse.mutable_data_ptr());
  attend();
  check_launch(launch_finish(a, device.stream()));
}

// The torch reference, which says once that it runs.
template <size_t N>
void call_reference(const char* name, std::array<StableIValue, N>& stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
}

using torch::stable::detail::from;

std::tuple<Tensor, Tensor, Tensor> decode(Tensor q, Tensor pages, Tensor block_table, Tensor seqlens, MaybeTensor q_positions, MaybeTensor page_list,
                                          MaybeTensor tail, MaybeTensor tail_rows, int64_t format, int64_t num_kv_heads, int64_t k_dim, int64_t v_dim,
                                          int64_t page_size, int64_t group, bool latent, double scale, int64_t window, bool with_page_lse,
                                          int64_t num_splits, int64_t block_size) {
  PK_ONE_DEVICE("decode", q, pages, block_table, seqlens, q_positions, page_list, tail, tail_rows);
  const PageFormat f = check_pages(pages, format, num_kv_heads, k_dim, v_dim, page_size, group, latent);
  const bool tensor = on_tensor_cores(f, q, block_size);
  const int width = tensor ? 0 : kernel_width(f);
  if (!tensor && !width) {
    std::array<StableIValue, 20> stack = {from(q), from(pages), from(block_table), from(seqlens), from(q_positions), from(page_list), from(tail),
                                          from(tail_rows), from(format), from(num_kv_heads), from(k_dim), from(v_dim), from(page_size), from(group),
                                          from(latent), from(scale), from(window), from(with_page_lse), from(num_splits), from(block_size)};
    call_reference("pikv::decode_reference", stack);
    return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]), torch::stable::detail::to<Tensor>(stack[2])};
  }
  PK_CHECK(q.dim() == 3, "q must be [R, num_q_heads, head_dim], got ", shape(q));
  const Device device(q);
  Attend a = read_arguments(q, pages, block_table, seqlens, q_positions, page_list, tail, tail_rows, f, block_size);
  PK_CHECK(!window || q_positions, "a window needs q_positions");
  a.scale = (float)scale, a.window = (int)window;
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), v_dim}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  std::vector<int64_t> sizes = {0};
  if (with_page_lse) sizes = {block_table.size(0), q.size(1), a.num_columns};
  Tensor page_lse = torch::stable::new_empty(q, sizes, ScalarType::Float);
  if (with_page_lse) a.page_lse = static_cast<float*>(page_lse.mutable_data_ptr());
  run(a, width, num_splits, q, device, out, lse);
  return {out, lse, page_lse};
}

std::tuple<Tensor, Tensor> prefill_cached(Tensor q, Tensor pages, Tensor block_table, Tensor seqlens, Tensor q_positions, MaybeTensor tail,
                                          MaybeTensor tail_rows, int64_t format, int64_t num_kv_heads, int64_t k_dim, int64_t v_dim,
                                          int64_t page_size, int64_t group, bool latent, double scale, int64_t window, bool causal,
                                          int64_t num_splits) {
  PK_ONE_DEVICE("prefill_cached", q, pages, block_table, seqlens, q_positions, tail, tail_rows);
  const PageFormat f = check_pages(pages, format, num_kv_heads, k_dim, v_dim, page_size, group, latent);
  const bool tensor = on_tensor_cores(f, q, 0);
  const int width = tensor ? 0 : kernel_width(f);
  if (!tensor && !width) {
    std::array<StableIValue, 18> stack = {from(q), from(pages), from(block_table), from(seqlens), from(q_positions), from(tail), from(tail_rows),
                                          from(format), from(num_kv_heads), from(k_dim), from(v_dim), from(page_size), from(group), from(latent),
                                          from(scale), from(window), from(causal), from(num_splits)};
    call_reference("pikv::prefill_cached_reference", stack);
    return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
  }
  PK_CHECK(q.dim() == 4, "q must be [R, T, num_q_heads, head_dim], got ", shape(q));
  const Device device(q);
  Attend a = read_arguments(q, pages, block_table, seqlens, q_positions, std::nullopt, tail, tail_rows, f, 0);
  PK_CHECK(q_positions.numel() == q.size(0) * q.size(1), "q_positions must be [", q.size(0), ", ", q.size(1), "], got ", shape(q_positions));
  a.scale = (float)scale, a.window = (int)window, a.causal = causal;
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), v_dim}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  run(a, width, num_splits, q, device, out, lse);
  return {out, lse};
}

Tensor without_first(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 1; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

std::tuple<Tensor, Tensor> merge(Tensor out, Tensor lse) {
  PK_ONE_DEVICE("merge", out, lse);
  PK_CHECK(out.scalar_type() == ScalarType::Float && lse.scalar_type() == ScalarType::Float, "merge needs float32 partials, got ", dtype_name(out),
           " and ", dtype_name(lse));
  bool same = out.dim() == lse.dim() + 1;
  for (int64_t i = 0; same && i < lse.dim(); ++i) same = out.size(i) == lse.size(i);
  PK_CHECK(same, "out ", shape(out), " and lse ", shape(lse), " differ in a leading dimension");
  PK_CHECK(out.is_contiguous() && lse.is_contiguous(), "out and lse must be contiguous");
  const Device device(out);
  Tensor merged = without_first(out), merged_lse = without_first(lse);
  merge_into(out, lse, merged, merged_lse, device.stream());
  return {merged, merged_lse};
}

}  // namespace
}  // namespace pikv

PK_LIBRARY_IMPL(m) {
  m.impl("decode", TORCH_BOX(&pikv::decode));
  m.impl("prefill_cached", TORCH_BOX(&pikv::prefill_cached));
  m.impl("merge", TORCH_BOX(&pikv::merge));
}
