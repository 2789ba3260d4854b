// Kernels by name, with grid and arguments from the caller: how tests run one kernel, also with a bug planted in its text, and check what
// ops/nvrtc/ops.py hands over. Compiled by the tests for one -DPK_FORMAT, with the attention kernels of -DPK_EMU_TIERS: 1 = fp32, 2 = tensor
// cores, 4 = latents on tensor cores, or a sum of them.
#include "simt_host.h"

#include <cstdio>

#include "page_format.h"
#include "params.cuh"
#include "common.cuh"
#include "numbers.cuh"
#include "work.cuh"
#include "tile.cuh"
#include "span.cuh"
#include "part.cuh"
#include "attend.cuh"
#include "tensor.cuh"
#include "operands.cuh"
#include "tensor_tile.cuh"
#include "tensor_queries.cuh"
#include "tensor_span.cuh"
#include "tensor_tail.cuh"
#include "attend_tensor.cuh"
#include "bulk.cuh"
#include "latent_tile.cuh"
#include "latent_products.cuh"
#include "attend_latent.cuh"
#include "append.cuh"
#include "bounds.cuh"
#include "merge.cuh"
#include "pack.cuh"
#include "route.cuh"
#include "pages.cuh"
#include "slots.cuh"
#include "../cuda/work.h"

#if !defined(PK_TENSOR_WIDTHS)
#define PK_TENSOR_WIDTHS X(64) X(128)
#endif

namespace {

using namespace pikv;

struct Launch {
  const char* kernel;
  dim3 grid;
  size_t shared_bytes;
  const void* params;

  // True when `name` is the kernel, which has then run.
  template <class Params>
  bool is(const char* name, void (*body)(Params), const char** fault) const {
    if (std::strcmp(kernel, name)) return false;
    const Params p = *static_cast<const Params*>(params);
    *fault = simt::launch(grid, kBlock, shared_bytes, [=] { body(p); });
    return true;
  }

  template <int WIDTH, int ROWS, bool PLAIN>
  bool attends(const char** fault) const {
    char name[64];
    std::snprintf(name, sizeof name, "attend_kernel<%d, %d, %d, %s>", PK_FORMAT, WIDTH, ROWS, PLAIN ? "true" : "false");
    if (shared_bytes != Tile<PK_FORMAT, WIDTH, ROWS, PLAIN>::shared * sizeof(float) && !std::strcmp(kernel, name)) {
      *fault = "wrong size of shared memory";
      return true;
    }
    return is(name, attend_kernel<PK_FORMAT, WIDTH, ROWS, PLAIN>, fault);
  }

  template <int DIM, int ROWS>
  bool attends_on_tensor_cores(const char** fault) const {
    if constexpr (!TensorTile<PK_FORMAT, DIM, ROWS>::served) return false;
    char name[64];
    std::snprintf(name, sizeof name, "attend_tensor_kernel<%d, %d, %d>", PK_FORMAT, DIM, ROWS);
    if (shared_bytes != TensorTile<PK_FORMAT, DIM, ROWS>::shared * sizeof(float) && !std::strcmp(kernel, name)) {
      *fault = "wrong size of shared memory";
      return true;
    }
    return is(name, attend_tensor_kernel<PK_FORMAT, DIM, ROWS>, fault);
  }

  bool attends_latents(const char** fault) const {
    char name[64];
    std::snprintf(name, sizeof name, "attend_latent_kernel<%d>", PK_FORMAT);
    if (shared_bytes != LatentTile<PK_FORMAT, kBulkCopies>::shared_for(static_cast<const Attend*>(params)->q_type) * sizeof(float) && !std::strcmp(kernel, name)) {
      *fault = "wrong size of shared memory";
      return true;
    }
    return is(name, attend_latent_kernel<PK_FORMAT>, fault);
  }
};

}  // namespace

// Null, or what went wrong.
extern "C" const char* pikv_emu_launch(const char* kernel, unsigned grid_x, unsigned grid_y, size_t shared_bytes, const void* params, int reverse) {
  simt::set_reverse(reverse);
  const Launch l = {kernel, dim3(grid_x, grid_y), shared_bytes, params};
  const char* fault = nullptr;
#if PK_EMU_TIERS & 1
  const bool attends = l.attends<64, 4, false>(&fault) || l.attends<128, 4, true>(&fault) || l.attends<128, 1, true>(&fault) ||
                       l.attends<576, 2, false>(&fault);
#else
  const bool attends = false;
#endif
#if PK_EMU_TIERS & 2
  bool on_tensor_cores = false;
#define X(D) on_tensor_cores = on_tensor_cores || l.attends_on_tensor_cores<D, 8>(&fault) || l.attends_on_tensor_cores<D, 16>(&fault);
  PK_TENSOR_WIDTHS
#undef X
#else
  const bool on_tensor_cores = false;
#endif
#if PK_EMU_TIERS & 4
  const bool latents = l.attends_latents(&fault);
#else
  const bool latents = false;
#endif
  const bool found = attends || on_tensor_cores || latents || l.is("finish_kernel", finish_kernel, &fault) || l.is("append_rows_kernel", append_rows_kernel, &fault) ||
                     l.is("append_groups_kernel", append_groups_kernel, &fault) || l.is("append_tail_kernel", append_tail_kernel, &fault) ||
                     l.is("page_bounds_kernel", page_bounds_kernel, &fault) || l.is("page_score_kernel", page_score_kernel, &fault) ||
                     l.is("pack_kernel", pack_kernel, &fault) || l.is("unpack_kernel", unpack_kernel, &fault) ||
                     l.is("route_pack_kernel", route_pack_kernel, &fault) || l.is("route_unpack_kernel", route_unpack_kernel, &fault) ||
                     l.is("route_merge_kernel", route_merge_kernel, &fault) ||
                     l.is("assign_slots_kernel", assign_slots_kernel, &fault) ||
                     l.is("merge_kernel", merge_kernel, &fault) || l.is("migrate_kernel", migrate_kernel, &fault) ||
                     l.is("checksum_kernel", checksum_kernel, &fault);
  return found ? fault : "no kernel of that name";
}

// The fields that share_work fills, as it leaves them; returns the number of parts.
extern "C" long long pikv_share_work(Attend* a, int rows, long long slots, long long num_splits) { return share_work(*a, rows, slots, num_splits); }

extern "C" size_t pikv_sizeof(const char* name) {
  if (!std::strcmp(name, "PageRecord")) return sizeof(PageFormat);
  if (!std::strcmp(name, "Attend")) return sizeof(Attend);
  if (!std::strcmp(name, "Merge")) return sizeof(Merge);
  if (!std::strcmp(name, "Append")) return sizeof(Append);
  if (!std::strcmp(name, "Migrate")) return sizeof(Migrate);
  if (!std::strcmp(name, "PageBounds")) return sizeof(PageBounds);
  if (!std::strcmp(name, "PageScore")) return sizeof(PageScore);
  if (!std::strcmp(name, "Packed")) return sizeof(Packed);
  if (!std::strcmp(name, "Route")) return sizeof(Route);
  if (!std::strcmp(name, "RouteMerge")) return sizeof(RouteMerge);
  if (!std::strcmp(name, "AssignSlots")) return sizeof(AssignSlots);
  return std::strcmp(name, "Checksum") ? 0 : sizeof(Checksum);
}
