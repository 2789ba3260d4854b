// The attention kernels of one of PK_FORMATS, -DPK_FORMAT: compiled once for each, so that compilers can work on them side by side.
#include "launch.h"

#include "../kernels/params.cuh"
#include "../kernels/common.cuh"
#include "../kernels/numbers.cuh"
#include "../kernels/attend.cuh"
#include "kernels.h"

namespace pikv {
namespace {

template <int WIDTH>
const char* launch_width(const Attend& a, Stream stream) {
  using T = Tile<PK_FORMAT, WIDTH>;
  const int64_t passes = ((int64_t)a.T * a.G + T::rows - 1) / T::rows;
  return launch(attend_kernel<PK_FORMAT, WIDTH>, dim3((unsigned)((int64_t)a.R * a.S * a.H * passes), (unsigned)a.splits), kBlock,
                T::shared * sizeof(float), stream, a);
}

}  // namespace

template <>
const char* launch_attend<PK_FORMAT>(const Attend& a, int width, Stream stream) {
  if constexpr (!rope_raw(PK_FORMAT)) switch (width) {
    case 32: return launch_width<32>(a, stream);
    case 64: return launch_width<64>(a, stream);
    case 128: return launch_width<128>(a, stream);
  }
  if constexpr (key_format(PK_FORMAT) == value_format(PK_FORMAT)) return launch_width<576>(a, stream);
  else return "latent pages have one format";
}

}  // namespace pikv
