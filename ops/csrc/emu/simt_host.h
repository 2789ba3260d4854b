// Runs CUDA kernel text on the host, for tests: one fiber per thread of a block, blocks one after another.
//
// Include this before the kernels, compile with g++ and -DPK_HOST_EMU, and launch with simt::launch. It knows what the kernels here use:
// 3-D grids, dynamic shared memory, __syncthreads and its vote, __syncwarp, __shfl_*_sync, votes of a warp, atomics, __trap, products on
// tensor cores and ldmatrix (warp_matrix.h), asynchronous copies (async_copy.h). What it reports instead of computing:
//   - a __syncthreads that some threads do not reach, or that threads reach at different lines;
//   - a shuffle or matrix product that some lanes of the warp do not reach, a mask that is not the whole warp, a source lane outside the warp.
// Shared memory starts as NaN in every block, and fibers and blocks run in order or in reverse, so a missing barrier, and blocks that rely on
// their order, give a wrong result in at least one of the two. It does not see races inside one warp step, and its speed means nothing.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace simt {

enum class Wait : uint8_t { none, block, warp, copy, done };

struct Site {
  const char* file;
  int line;
  bool operator!=(const Site& other) const { return line != other.line || std::strcmp(file, other.file) != 0; }
};

struct Fiber {
  uint3 index;
  int linear;
  Wait wait;
  unsigned exchanges;  // parity of this lane: it may be one exchange ahead of its neighbours, never two
  Site site;
};

extern Fiber* current;
extern int vote;  // of __syncthreads_or
extern uint3 block_index;
extern dim3 block_dim, grid_dim;

// Runs the grid. Returns null, or what went wrong (valid until the next launch).
const char* run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument);
void* shared();                // dynamic shared memory of the running block
void set_reverse(bool reverse);  // order of the fibers in a block, and of the blocks
long long switches();          // since the library was loaded

void wait_block(Site site);
// Gives `bytes` (at most kSlot) of this lane; once every lane of the warp has arrived, the values of all 32, kSlot bytes apart. They stay until
// the lane's next exchange but one.
constexpr int kSlot = 48;
const unsigned char* collect(const void* value, size_t bytes, Site site);
// Gives `bytes` of this lane and takes those of `source` (0..31), once every lane of the warp has arrived.
void exchange(unsigned mask, void* value, size_t bytes, int source, Site site);
[[noreturn]] void fail(const char* what, Site site);

template <class F>
const char* launch(dim3 grid, dim3 block, size_t shared_bytes, F body) {
  return run(grid, block, shared_bytes, [](void* f) { (*static_cast<F*>(f))(); }, &body);
}

}  // namespace simt

#define threadIdx (simt::current->index)
#define blockIdx (simt::block_index)
#define blockDim (simt::block_dim)
#define gridDim (simt::grid_dim)

// The default arguments are evaluated where the kernel calls: they are the line of the barrier or shuffle.
#define PK_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(PK_SITE) { simt::wait_block({file, line}); }
// Three barriers: all have voted, all have read, the next vote starts from zero.
inline int __syncthreads_or(int predicate, PK_SITE) {
  simt::vote |= predicate != 0;
  simt::wait_block({file, line});
  const int any = simt::vote;
  simt::wait_block({file, line});
  simt::vote = 0;
  simt::wait_block({file, line});
  return any;
}
[[noreturn]] inline void __trap(PK_SITE) { simt::fail("__trap", {file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, PK_SITE) {
  int nothing = 0;
  simt::exchange(mask, &nothing, sizeof nothing, simt::current->linear % 32, {file, line});
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, PK_SITE) {
  if (width != 32) simt::fail("a shuffle of part of a warp is not emulated", {file, line});
  simt::exchange(mask, &value, sizeof value, source, {file, line});
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, PK_SITE) {
  return __shfl_sync(mask, value, simt::current->linear % 32 ^ other, width, file, line);
}
// As on the device, a lane whose source is beyond the warp keeps its own value.
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, PK_SITE) {
  const int lane = simt::current->linear % 32, source = lane + (int)delta;
  return __shfl_sync(mask, value, source < 32 ? source : lane, width, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, PK_SITE) {
  if (mask != 0xffffffffu) simt::fail("the mask of a vote must be the whole warp", {file, line});
  const unsigned char* all = simt::collect(&predicate, sizeof predicate, {file, line});
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    int vote;
    std::memcpy(&vote, all + lane * simt::kSlot, sizeof vote);
    votes |= (unsigned)(vote != 0) << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, PK_SITE) { return __ballot_sync(mask, predicate, file, line) != 0; }

#include "warp_matrix.h"
#include "async_copy.h"

template <class T>
T __ldg(const T* p) { return *p; }
inline float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
// One rounding each: compile kernels with -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

template <class T> T atomicAdd(T* p, T x) { const T old = *p; *p = old + x; return old; }
template <class T> T atomicMax(T* p, T x) { const T old = *p; if (x > old) *p = x; return old; }
template <class T> T atomicXor(T* p, T x) { const T old = *p; *p = old ^ x; return old; }
