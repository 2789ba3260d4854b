// What the files with kernels offer to the files with torch. Each returns null, or what went wrong.
#pragma once

namespace pikv {

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
