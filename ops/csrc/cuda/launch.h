// How a kernel starts: on a CUDA stream, or under the host emulation (-DPK_HOST_EMU), where the same files make the "emu" library.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(PK_HOST_EMU)
#include "../emu/simt_host.h"
#else
#include <cuda_runtime.h>
#endif

#include "../include/page_format.h"

namespace pikv {

#if defined(PK_HOST_EMU)
using Stream = void*;

// Whether the code of this kernel that runs here is that with bulk copies: kernels/bulk.cuh.
template <class Params>
bool has_bulk_copies(void (*)(Params)) {
#if defined(PK_EMU_BULK)
  return PK_EMU_BULK;
#else
  return true;
#endif
}

// Null, or what went wrong.
template <class Params>
const char* launch(void (*kernel)(Params), dim3 grid, int block, size_t shared_bytes, Stream, const Params& params) {
  return simt::launch(grid, block, shared_bytes, [=] { kernel(params); });
}
#else
using Stream = cudaStream_t;

template <class Params>
bool has_bulk_copies(void (*kernel)(const Params)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.binaryVersion >= 90;
}

template <class Params>
const char* launch(void (*kernel)(const Params), dim3 grid, int block, size_t shared_bytes, Stream stream, const Params& params) {
  // What every kernel may have is 48 KiB; more must be asked for, once for a device, which costs less than knowing whether it was.
  if (shared_bytes > 48 << 10) {
    const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    if (refused != cudaSuccess) return cudaGetErrorString(refused);
  }
  kernel<<<grid, block, shared_bytes, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

}  // namespace pikv
