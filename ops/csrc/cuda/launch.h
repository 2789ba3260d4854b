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

// Null, or what went wrong.
template <class Params>
const char* launch(void (*kernel)(Params), dim3 grid, int block, size_t shared_bytes, Stream, const Params& params) {
  return simt::launch(grid, block, shared_bytes, [=] { kernel(params); });
}
#else
using Stream = cudaStream_t;

template <class Params>
const char* launch(void (*kernel)(const Params), dim3 grid, int block, size_t shared_bytes, Stream stream, const Params& params) {
  kernel<<<grid, block, shared_bytes, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

}  // namespace pikv
