// A block-wide sum, right and with one bug planted at a time: what tests/ops/test_simt_host.py expects the emulation to notice.
#include "simt_host.h"

namespace {

enum Bug { kNone, kMissingBarrier, kShortShuffle, kLaneOutside, kDivergentBarrier, kDivergentShuffle, kTwoBarriers, kTrap };

template <int BUG>
void block_sum(const float* in, float* out) {
  float* partial = static_cast<float*>(simt::shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float x = in[blockIdx.x * blockDim.x + threadIdx.x];
  if (BUG == kTrap && threadIdx.x == 5) __trap();
  if (BUG == kDivergentShuffle && lane == 3) return;
  for (int offset = BUG == kShortShuffle ? 8 : 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (BUG == kLaneOutside) x = __shfl_sync(0xffffffffu, x, 32);
  if (lane == 0) partial[warp] = x;
  if (BUG == kDivergentBarrier) {
    if (warp == 0) __syncthreads();
  } else if (BUG == kTwoBarriers) {
    if (warp == 0) __syncthreads();
    else __syncthreads();
  } else if (BUG != kMissingBarrier) {
    __syncthreads();
  }
  float sum = 0;
  for (int i = 0; i < (int)blockDim.x / 32; ++i) sum += partial[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <int BUG>
const char* launch(const float* in, float* out, int blocks, int threads) {
  return simt::launch(blocks, threads, threads / 32 * sizeof(float), [=] { block_sum<BUG>(in, out); });
}

}  // namespace

extern "C" const char* planted_block_sum(int bug, int reverse, const float* in, float* out, int blocks, int threads) {
  simt::set_reverse(reverse);
  constexpr decltype(&launch<kNone>) table[] = {launch<kNone>,         launch<kMissingBarrier>,   launch<kShortShuffle>, launch<kLaneOutside>,
                                                launch<kDivergentBarrier>, launch<kDivergentShuffle>, launch<kTwoBarriers>,  launch<kTrap>};
  return table[bug](in, out, blocks, threads);
}
