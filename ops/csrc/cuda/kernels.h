// What the files with kernels offer to the files with torch. Each returns null, or what went wrong.
#pragma once

namespace pikv {

// Formats with attention kernels, as a layout has them: K and V alike; then int8/int4, int8/int2, int4/int2, fp8/int4, bf16/int4; then int8,
// int4 and fp8 of latents whose rotary columns are fp16. ops/format/kernels.py has the same list.
#define PK_FORMATS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(83) X(115) X(116) X(85) X(81) X(259) X(260) X(261)

// width: 32, 64, 128 or 576, see kernels/attend.cuh.
template <int FORMAT>
const char* launch_attend(const Attend& a, int width, Stream stream);

const char* launch_merge(const Merge& m, Stream stream);
const char* launch_append(const Append& a, Stream stream);
const char* launch_migrate(const Migrate& m, long long count, Stream stream);
const char* launch_page_bounds(const PageBounds& b, Stream stream);
const char* launch_page_score(const PageScore& s, int num_tables, Stream stream);
// num_blocks: of each field.
const char* launch_pack(const Packed& p, int num_fields, int num_blocks, bool unpack, Stream stream);
const char* launch_assign_slots(const AssignSlots& a, Stream stream);
const char* launch_checksum(const Checksum& c, int num_blocks, Stream stream);

}  // namespace pikv
