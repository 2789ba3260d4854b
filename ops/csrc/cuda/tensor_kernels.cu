// The tensor-core kernels of one of PK_TENSOR_FORMATS, -DPK_FORMAT: compiled once for each, so that compilers can work on them side by side.
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
#include "../kernels/tensor_queries.cuh"
#include "../kernels/tensor_span.cuh"
#include "../kernels/tensor_tail.cuh"
#include "../kernels/attend_tensor.cuh"
#include "kernels.h"
#include "work.h"

namespace pikv {
namespace {

template <int DIM, int ROWS>
const char* launch_tensor_kernel(const Attend& a, Stream stream) {
  using T = TensorTile<PK_FORMAT, DIM, ROWS>;
  if constexpr (!T::served) {
    return "no tensor-core kernel of this width";
  } else {
    const int64_t tails = T::grouped ? (int64_t)a.R * a.S * a.H : 0;
    return launch(attend_tensor_kernel<PK_FORMAT, DIM, ROWS>, dim3((unsigned)(count_blocks(a, ROWS) + tails)), kBlock, T::shared * sizeof(float), stream, a);
  }
}

}  // namespace

template <>
const char* launch_tensor<PK_FORMAT>(const Attend& a, Stream stream) {
  const bool few = rows_of_tensor_block(a) == 8;
  switch (a.f.k_dim) {
#define X(D) \
  case D: return few ? launch_tensor_kernel<D, 8>(a, stream) : launch_tensor_kernel<D, 16>(a, stream);
    PK_TENSOR_WIDTHS
#undef X
  }
  return "no tensor-core kernel of this width";
}

}  // namespace pikv
