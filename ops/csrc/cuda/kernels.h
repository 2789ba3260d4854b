// What the files with kernels offer to the files with torch. Each returns null, or what went wrong.
#pragma once

namespace pikv {

// Formats with attention kernels, as a layout has them: K and V alike; then int8/int4, int8/int2, int4/int2, fp8/int4, bf16/int4; then int8,
// int4 and fp8 of latents whose rotary columns are fp16. ops/format/kernels.py has the same list.
#define PK_FORMATS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(83) X(115) X(116) X(85) X(81) X(259) X(260) X(261)

// Those with tensor-core kernels.
#define PK_TENSOR_FORMATS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(83) X(115) X(116) X(85) X(81)

// width: 32, 64, 128 or 576, see kernels/attend.cuh.
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

// Whether tensor cores serve this: 16-bit queries, which raw keys must be of the type of; keys and values of 64 or 128 columns, with four bytes
// for each of the 8 lanes of a value. ops/format/kernels.py has the same.
inline bool has_tensor_kernel(const Attend& a) {
  const PageFormat& f = a.f;
  bool listed = false;
#define PK_CASE(F) listed = listed || packed_of(f) == F;
  PK_TENSOR_FORMATS(PK_CASE)
#undef PK_CASE
  return listed && a.q_type != kFp32 && !f.latent && (f.k_dim == 64 || f.k_dim == 128) && f.v_dim == f.k_dim && f.v_row_bytes % 32 == 0 &&
         (f.format > kFp16 || f.format == a.q_type) && (!format_grouped(f.format) || f.group % 16 == 0) &&
         reinterpret_cast<uintptr_t>(a.q) % 4 == 0;
}

// Query rows of a block of the tensor-core kernels: TensorTile::served.
inline int rows_of_tensor_block(const Attend& a) { return a.T * a.G <= 8 || (a.f.format > kFp16 && a.f.k_dim >= 128) ? 8 : 16; }

template <int FORMAT>
const char* launch_tensor(const Attend& a, Stream stream);

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
