// The tensor-core kernel for latent pages of one of PK_LATENT_FORMATS, -DPK_FORMAT.
#include "launch.h"

#include "../kernels/params.cuh"
#include "../kernels/common.cuh"
#include "../kernels/numbers.cuh"
#include "../kernels/work.cuh"
#include "../kernels/tile.cuh"
#include "../kernels/span.cuh"
#include "../kernels/part.cuh"
#include "../kernels/tensor.cuh"
#include "../kernels/operands.cuh"
#include "../kernels/tensor_tile.cuh"
#include "../kernels/tensor_tail.cuh"
#include "../kernels/bulk.cuh"
#include "../kernels/latent_tile.cuh"
#include "../kernels/latent_products.cuh"
#include "../kernels/attend_latent.cuh"
#include "kernels.h"
#include "work.h"

namespace pikv {

template <>
const char* launch_latent<PK_FORMAT>(const Attend& a, Stream stream) {
  using T = LatentTile<PK_FORMAT, true>;
  const int64_t tails = T::grouped ? (int64_t)a.R * a.S * a.H : 0;
  const bool bulk = T::bulk && has_bulk_copies(attend_latent_kernel<PK_FORMAT>);
  const size_t words = bulk ? T::shared_for(a.q_type) : LatentTile<PK_FORMAT, false>::shared_for(a.q_type);
  return launch(attend_latent_kernel<PK_FORMAT>, dim3((unsigned)(count_blocks(a, T::rows) + tails)), kBlock, words * sizeof(float), stream, a);
}

}  // namespace pikv
