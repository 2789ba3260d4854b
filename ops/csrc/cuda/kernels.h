// What the files with kernels offer to the files with torch. Each returns null, or what went wrong.
#pragma once

namespace pikv {

// Formats with attention kernels, as a layout has them: K and V alike; then int8/int4, int8/int2, int4/int2, fp8/int4, bf16/int4; then int8,
// int4 and fp8 of latents whose rotary columns are fp16. ops/format/kernels.py has the same list.
#define PK_FORMATS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(83) X(115) X(116) X(85) X(81) X(259) X(260) X(261)

// Those with tensor-core kernels.
#define PK_TENSOR_FORMATS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(83) X(115) X(116) X(85) X(81)

// Those with a tensor-core kernel for latent pages.
#if defined(PK_NO_LATENT)
#define PK_LATENT_FORMATS(X)
#else
#define PK_LATENT_FORMATS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(259) X(260) X(261)
#endif

// width: 32, 64, 128 or 576, see kernels/tile.cuh.
template <int FORMAT>
const char* launch_attend(const Attend& a, int width, Stream stream);

// Nothing to ask in the loop over the tokens, where there is a kernel for that: for the others registers would be spilled, or nobody has them.
inline bool is_plain(const Attend& a, int width) {
  return (width == 128 || (width == 576 && !format_grouped(a.f.format))) && !a.window && !a.causal && !a.page_lse;
}

// Query rows of a block: of the kernel that launch_attend chooses.
inline int rows_of_block(const Attend& a, int width) {
  return width == 576 ? 2 : width == 128 && is_plain(a, width) && a.T * a.G == 1 ? 1 : 4;
}

// Widths of keys and values that tensor-core kernels are compiled for: PIKV_CUDA_WIDTHS, see ops/build/cuda_build.py.
#if !defined(PK_TENSOR_WIDTHS)
#define PK_TENSOR_WIDTHS X(64) X(96) X(128) X(192) X(256)
#endif

constexpr bool is_tensor_width(int dim) {
#define X(D) \
  if (dim == D) return true;
  PK_TENSOR_WIDTHS
#undef X
  return false;
}

inline bool has_latent_kernel(const PageFormat& f) {
  bool listed = false;
#define PK_CASE(F) listed = listed || packed_of(f) == F;
  PK_LATENT_FORMATS(PK_CASE)
#undef PK_CASE
  return listed && f.k_dim == 576 && f.v_dim == 512;
}

// Whether tensor cores serve this: 16-bit queries, which raw keys must be of the type of; latent keys of 512 + 64 columns; else keys and values of
// one of the widths, of which a lane reads whole words and whole bytes. ops/format/kernels.py has the same.
inline bool has_tensor_kernel(const PageFormat& f, int q_type, const void* q) {
  bool listed = false;
#define PK_CASE(F) listed = listed || packed_of(f) == F;
  PK_TENSOR_FORMATS(PK_CASE)
#undef PK_CASE
  if (q_type == kFp32 || (f.format <= kFp16 && f.format != q_type) || reinterpret_cast<uintptr_t>(q) % 4) return false;
  if (f.latent) return has_latent_kernel(f);
  return listed && is_tensor_width(f.k_dim) && f.v_dim == f.k_dim && f.k_row_bytes % 16 == 0 && f.v_row_bytes % 8 == 0 &&
         (!format_grouped(f.format) || f.group % 16 == 0);
}

// Query rows of a block of the tensor-core kernels: TensorTile::served, LatentTile::rows.
inline int rows_of_tensor_block(const Attend& a) {
  if (a.f.latent) return 16;
  return a.T * a.G <= 8 || a.f.k_dim > 128 || (a.f.format > kFp16 && a.f.k_dim == 128) ? 8 : 16;
}

template <int FORMAT>
const char* launch_tensor(const Attend& a, Stream stream);
template <int FORMAT>
const char* launch_latent(const Attend& a, Stream stream);

const char* launch_finish(const Attend& a, Stream stream);
const char* launch_merge(const Merge& m, Stream stream);
const char* launch_append(const Append& a, Stream stream);
const char* launch_migrate(const Migrate& m, long long count, Stream stream);
const char* launch_page_bounds(const PageBounds& b, Stream stream);
const char* launch_page_score(const PageScore& s, int num_tables, Stream stream);
// num_blocks: of each field.
const char* launch_pack(const Packed& p, int num_fields, int num_blocks, bool unpack, Stream stream);
// num_blocks: of each field and of the tokens of each group.
const char* launch_route(const Route& r, int num_blocks, bool unpack, Stream stream);
const char* launch_route_merge(const RouteMerge& m, Stream stream);
const char* launch_assign_slots(const AssignSlots& a, Stream stream);
const char* launch_checksum(const Checksum& c, int num_blocks, Stream stream);

}  // namespace pikv
