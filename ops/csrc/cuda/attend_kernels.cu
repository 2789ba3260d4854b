// The attention kernels of one of PK_FORMATS, -DPK_FORMAT: compiled once for each, so that compilers can work on them side by side.
#include "launch.h"

#include "../kernels/params.cuh"
#include "../kernels/common.cuh"
#include "../kernels/numbers.cuh"
#include "../kernels/work.cuh"
#include "../kernels/tile.cuh"
#include "../kernels/span.cuh"
#include "../kernels/part.cuh"
#include "../kernels/attend.cuh"
#include "kernels.h"
#include "work.h"

namespace pikv {
namespace {

template <int WIDTH, int ROWS, bool PLAIN>
const char* launch_kernel(const Attend& a, Stream stream) {
  using T = Tile<PK_FORMAT, WIDTH, ROWS, PLAIN>;
  return launch(attend_kernel<PK_FORMAT, WIDTH, ROWS, PLAIN>, dim3((unsigned)count_blocks(a, ROWS)), kBlock, T::shared * sizeof(float), stream, a);
}

}  // namespace

template <>
const char* launch_attend<PK_FORMAT>(const Attend& a, int width, Stream stream) {
  const bool plain = is_plain(a, width);
  if constexpr (!rope_raw(PK_FORMAT)) switch (width) {
    case 32: return launch_kernel<32, 4, false>(a, stream);
    case 64: return launch_kernel<64, 4, false>(a, stream);
    case 128:
      if (rows_of_block(a, width) == 1) return launch_kernel<128, 1, true>(a, stream);
      return plain ? launch_kernel<128, 4, true>(a, stream) : launch_kernel<128, 4, false>(a, stream);
  }
  if constexpr (key_format(PK_FORMAT) != value_format(PK_FORMAT)) return "latent pages have one format";
  else if constexpr (!format_grouped(key_format(PK_FORMAT)))
    return plain ? launch_kernel<576, 2, true>(a, stream) : launch_kernel<576, 2, false>(a, stream);
  else return launch_kernel<576, 2, false>(a, stream);
}

}  // namespace pikv
