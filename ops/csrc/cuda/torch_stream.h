// torch's current CUDA stream. The function lies in libtorch_cuda, which is not linked: this library also loads beside a CPU torch. It is
// looked up by name in the libtorch_cuda that the process has. A weak reference would not do: Python loads torch's libraries where only
// those that link them see their names, so it would be null beside a CUDA torch too.
#pragma once
#include <dlfcn.h>

#include "../cpu/devices.h"

namespace pikv {

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// Null where no libtorch_cuda is loaded.
inline CurrentStream find_current_stream() {
  const char* const name = "aoti_torch_get_current_cuda_stream";
  if (void* found = dlsym(RTLD_DEFAULT, name)) return reinterpret_cast<CurrentStream>(found);
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);  // held until the process ends, like torch itself
  return library ? reinterpret_cast<CurrentStream>(dlsym(library, name)) : nullptr;
}

inline void* current_stream(int32_t device_index) {
  static const CurrentStream ask = find_current_stream();
  PK_CHECK(ask, "libtorch_cuda is not loaded in this process, so there is no CUDA stream; this torch is built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(ask(device_index, &stream));
  return stream;
}

}  // namespace pikv
