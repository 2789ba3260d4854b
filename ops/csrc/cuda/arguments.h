// Reading torch arguments for the CUDA launchers. The words of a refusal are those of ops/checks.py and csrc/cpu/checks.h.
//
// What is on the device is not read back: page ids, slots and lengths are checked only with PIKV_DEBUG=1 (one copy and wait per call) and
// under the host emulation.
#pragma once
#include <cstdlib>
#include <cstring>

#include "../cpu/checks.h"
#include "../kernels/params.cuh"
#include "launch.h"

#if !defined(PK_HOST_EMU)
#include <torch/csrc/stable/accelerator.h>

#include "torch_stream.h"
#endif

namespace pikv {

// The device of the arguments, its stream and size, for the time of one call.
class Device {
 public:
#if defined(PK_HOST_EMU)
  explicit Device(const Tensor&) {}
  Stream stream() const { return nullptr; }
  int num_processors() const { return 2; }
#else
  explicit Device(const Tensor& x) : index_(x.get_device()), guard_(index_) {}
  Stream stream() const { return static_cast<Stream>(current_stream(index_)); }
  int num_processors() const {
    int count = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_);
    PK_CHECK(error == cudaSuccess, "reading the number of multiprocessors of device ", index_, ": ", cudaGetErrorString(error));
    return count;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Whether page ids, slots and lengths are read back, of a call on the device of x.
inline bool values_are_checked([[maybe_unused]] const Tensor& x) {
#if defined(PK_HOST_EMU)
  return true;
#else
  static const bool asked = [] {
    const char* debug = std::getenv("PIKV_DEBUG");
    return debug && !std::strcmp(debug, "1");
  }();
  if (!asked) return false;
  const Device device(x);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(device.stream(), &status);
  PK_CHECK(error == cudaSuccess && status == cudaStreamCaptureStatusNone,
           "PIKV_DEBUG=1 reads page ids, slots and lengths back, which a stream that is being captured into a graph does not allow; unset it to "
           "capture");
  return true;
#endif
}

// Integers where the host can read them.
class HostIndices {
 public:
  HostIndices(const char* name, const MaybeTensor& x) {
    if (!x) return;
    copy_ = torch::stable::to(*x, torch::stable::Device(torch::headeronly::DeviceType::CPU));
    indices_ = Indices(name, *copy_);
  }
  const Indices& operator*() const { return indices_; }
  const Indices* operator->() const { return &indices_; }

 private:
  MaybeTensor copy_;
  Indices indices_;
};

inline Index read_index(const char* name, const Tensor& x) {
  const ScalarType t = x.scalar_type();
  PK_CHECK(t == ScalarType::Int || t == ScalarType::Long, name, " must be int32 or int64, got ", dtype_name(x));
  PK_CHECK(x.is_contiguous(), name, " must be contiguous");
  return {x.const_data_ptr(), t == ScalarType::Long};
}

inline Index read_index(const char* name, const MaybeTensor& x) { return x ? read_index(name, *x) : Index{nullptr, 0}; }

inline void check_aligned(const char* name, const Tensor& x) {
  PK_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, name, " must start on a 16-byte boundary");
}

inline void check_launch(const char* fault) { PK_CHECK(!fault, "a kernel failed: ", fault); }

}  // namespace pikv

#if defined(PK_HOST_EMU)
#define PK_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pikv_emu, CPU, m)
#else
#define PK_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(pikv, CUDA, m)
#endif
