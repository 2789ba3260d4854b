// The kernels of route_pack, route_unpack and route_merge.
#include "launch.h"

#include "../kernels/params.cuh"
#include "../kernels/common.cuh"
#include "../kernels/pack.cuh"
#include "../kernels/route.cuh"
#include "kernels.h"

namespace pikv {

const char* launch_route(const Route& r, int num_blocks, bool unpack, Stream stream) {
  const dim3 grid((unsigned)num_blocks, (unsigned)(r.num_fields + r.K));
  return launch(unpack ? route_unpack_kernel : route_pack_kernel, grid, kBlock, 0, stream, r);
}

const char* launch_route_merge(const RouteMerge& m, Stream stream) {
  return launch(route_merge_kernel, dim3((unsigned)(((long long)m.N * m.H + kWarps - 1) / kWarps)), kBlock, 0, stream, m);
}

}  // namespace pikv
