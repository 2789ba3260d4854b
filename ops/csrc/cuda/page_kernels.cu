// The kernels that are no templates.
#include "launch.h"

#include "../kernels/params.cuh"
#include "../kernels/common.cuh"
#include "../kernels/numbers.cuh"
#include "../kernels/append.cuh"
#include "../kernels/bounds.cuh"
#include "../kernels/work.cuh"
#include "../kernels/merge.cuh"
#include "../kernels/pack.cuh"
#include "../kernels/route.cuh"
#include "../kernels/pages.cuh"
#include "../kernels/slots.cuh"
#include "kernels.h"

namespace pikv {

const char* launch_merge(const Merge& m, Stream stream) {
  return launch(merge_kernel, dim3((unsigned)((m.rows + kWarps - 1) / kWarps)), kBlock, 0, stream, m);
}

const char* launch_finish(const Attend& a, Stream stream) {
  const dim3 grid((unsigned)(a.R * a.H), (unsigned)((a.T * a.G + kWarps - 1) / kWarps));
  return launch(finish_kernel, grid, kBlock, Row::shared * sizeof(int), stream, a);
}

const char* launch_append(const Append& a, Stream stream) {
  const unsigned T = (unsigned)a.T, H = (unsigned)a.f.num_kv_heads;
  const char* fault = launch(append_rows_kernel, dim3((unsigned)(((long long)T * H + kWarps - 1) / kWarps), 2), kBlock, 0, stream, a);
  if (fault || !format_grouped(a.f.format)) return fault;
  fault = launch(append_groups_kernel, dim3(T, H), kBlock, a.f.group * sizeof(int), stream, a);
  return fault ? fault : launch(append_tail_kernel, dim3(T), kBlock, 0, stream, a);
}

const char* launch_migrate(const Migrate& m, long long count, Stream stream) {
  const long long parts = (m.record_bytes / 16 + 4 * kBlock - 1) / (4 * kBlock);
  return launch(migrate_kernel, dim3((unsigned)count, (unsigned)(parts < 1 ? 1 : parts > 64 ? 64 : parts)), kBlock, 0, stream, m);
}

const char* launch_page_bounds(const PageBounds& b, Stream stream) {
  const size_t box = b.type == kInt8 ? 2 * (size_t)b.f.k_dim : 0;
  return launch(page_bounds_kernel, dim3((unsigned)b.T, (unsigned)b.f.num_kv_heads), kBlock, (4 + b.f.page_size + box) * 4, stream, b);
}

const char* launch_page_score(const PageScore& s, int num_tables, Stream stream) {
  const long long steps = (s.max_pages + kWarps - 1) / kWarps;
  return launch(page_score_kernel, dim3((unsigned)(num_tables * (long long)s.H * steps)), kBlock, 0, stream, s);
}

const char* launch_pack(const Packed& p, int num_fields, int num_blocks, bool unpack, Stream stream) {
  return launch(unpack ? unpack_kernel : pack_kernel, dim3((unsigned)num_blocks, (unsigned)num_fields), kBlock, 0, stream, p);
}

const char* launch_route(const Route& r, int num_blocks, bool unpack, Stream stream) {
  const dim3 grid((unsigned)num_blocks, (unsigned)(r.num_fields + r.K));
  return launch(unpack ? route_unpack_kernel : route_pack_kernel, grid, kBlock, 0, stream, r);
}

const char* launch_route_merge(const RouteMerge& m, Stream stream) {
  return launch(route_merge_kernel, dim3((unsigned)(((long long)m.N * m.H + kWarps - 1) / kWarps)), kBlock, 0, stream, m);
}

const char* launch_assign_slots(const AssignSlots& a, Stream stream) {
  return launch(assign_slots_kernel, dim3(1), kBlock, 2 * kBlock * sizeof(int), stream, a);
}

const char* launch_checksum(const Checksum& c, int num_blocks, Stream stream) {
  return launch(checksum_kernel, dim3((unsigned)num_blocks), kBlock, 0, stream, c);
}

}  // namespace pikv
