// A product of two matrices through tensor cores and asynchronous copies, right and with one bug planted at a time: what
// tests/ops/test_simt_matrix.py expects the emulation to notice. One warp: C[16 x 8] = A[16 x 64] B[64 x 8] in bf16, in 4 steps of 16 columns,
// each copied to shared memory while the one before is multiplied.
#include "simt_host.h"

namespace {

enum Bug { kNone, kWrongFragment, kDivergentProduct, kMissingWait, kLateWait, kWrongBytes, kNoBarrier, kOddAddress };

// A row by row, B column by column, so that both are rows of 16-bit numbers.
struct Matrices {
  const unsigned short *a, *b;  // [16, 64], [8, 64]
  float* c;                     // [16, 8]
};

struct Tile {
  unsigned short a[16][16], b[8][16];
};

template <int BUG>
void multiply(const Tile& tile, float* c, int lane) {
  unsigned a[4], b[2];
  simt::ldmatrix_x4(a, &tile.a[lane % 16][8 * (lane / 16)]);
  const int r = lane / 4, column = lane % 4 * 2;
  std::memcpy(&b[0], &tile.b[r][column], 4), std::memcpy(&b[1], &tile.b[r][column + 8], 4);
  if (BUG == kWrongFragment) std::swap(a[1], a[2]);
  if (BUG == kDivergentProduct && lane == 7) return;
  simt::mma_16816(true, c, a[0], a[1], a[2], a[3], b[0], b[1]);
}

void store(const Matrices& m, const float* c, int lane) {
  for (int i = 0; i < 4; ++i) m.c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

// cp.async, two tiles.
template <int BUG>
void by_groups(const Matrices& m) {
  Tile* tiles = static_cast<Tile*>(simt::shared());
  const int lane = threadIdx.x;
  float c[4] = {0, 0, 0, 0};
  const auto fetch = [&](int step) {
    Tile& tile = tiles[step % 2];
    pk_copy_async(&tile.a[lane / 2][lane % 2 * 8], m.a + lane / 2 * 64 + 16 * step + lane % 2 * 8 + (BUG == kOddAddress), 16);
    if (lane < 16) pk_copy_async(&tile.b[lane / 2][lane % 2 * 8], m.b + lane / 2 * 64 + 16 * step + lane % 2 * 8, 16);
    simt::commit_copies();
  };
  fetch(0);
  for (int step = 0; step < 4; ++step) {
    if (step < 3) fetch(step + 1);
    if (BUG != kMissingWait) simt::wait_copies(BUG == kLateWait ? 2 : step < 3 ? 1 : 0);
    __syncwarp();
    multiply<BUG>(tiles[step % 2], c, lane);
    __syncwarp();
  }
  store(m, c, lane);
}

// Bulk copies that an mbarrier counts, two tiles; lane 0 asks for them.
template <int BUG>
void by_barriers(const Matrices& m) {
  Tile* tiles = static_cast<Tile*>(simt::shared());
  uint64_t* full = reinterpret_cast<uint64_t*>(tiles + 2);
  const int lane = threadIdx.x;
  float c[4] = {0, 0, 0, 0};
  if (lane == 0 && BUG != kNoBarrier) pk_barrier_init(full, 1), pk_barrier_init(full + 1, 1);
  __syncwarp();
  const auto fetch = [&](int step) {
    if (lane) return;
    Tile& tile = tiles[step % 2];
    pk_barrier_arrive(full + step % 2, sizeof(Tile) + (BUG == kWrongBytes ? 32 : 0));
    for (int row = 0; row < 16; ++row) pk_bulk_copy(tile.a[row], m.a + row * 64 + 16 * step, 32, full + step % 2);
    for (int row = 0; row < 8; ++row) pk_bulk_copy(tile.b[row], m.b + row * 64 + 16 * step, 32, full + step % 2);
  };
  fetch(0);
  for (int step = 0; step < 4; ++step) {
    if (step < 3) fetch(step + 1);
    if (BUG != kMissingWait) pk_barrier_wait(full + step % 2, (BUG == kLateWait ? step / 2 + 1 : step / 2) & 1);
    multiply<BUG>(tiles[step % 2], c, lane);
    __syncwarp();
  }
  store(m, c, lane);
}

template <int BUG>
const char* launch(const Matrices& m, int barriers) {
  if (barriers) return simt::launch(1, 32, 2 * sizeof(Tile) + 16, [=] { by_barriers<BUG>(m); });
  return simt::launch(1, 32, 2 * sizeof(Tile) + 16, [=] { by_groups<BUG>(m); });
}

}  // namespace

extern "C" const char* planted_product(int bug, int reverse, int barriers, const unsigned short* a, const unsigned short* b, float* c) {
  simt::set_reverse(reverse);
  constexpr decltype(&launch<kNone>) table[] = {launch<kNone>,     launch<kWrongFragment>, launch<kDivergentProduct>, launch<kMissingWait>,
                                                launch<kLateWait>, launch<kWrongBytes>,    launch<kNoBarrier>,        launch<kOddAddress>};
  return table[bug]({a, b, c}, barriers);
}

// The sum of n terms as a tensor core has it.
extern "C" float planted_sum(const double* terms, int n) { return simt::truncated_sum(terms, n); }
