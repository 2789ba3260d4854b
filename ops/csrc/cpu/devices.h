// All tensors of a call on one device. The words are those of ops/devices.py.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has it under its first name only
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

#define PK_CHECK(condition, ...) STD_TORCH_CHECK(condition, "pikv: ", __VA_ARGS__)

// PK_ONE_DEVICE("merge", out, lse): the arguments of an op, by their names. First in every op: nothing may be read before.
#define PK_ONE_DEVICE(op, ...) one_device(op, #__VA_ARGS__, __VA_ARGS__)

namespace pikv {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

struct Place {
  int32_t type, index;
  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
  std::string name() const {
    if (type == aoti_torch_device_type_cpu()) return "cpu";
    if (type == aoti_torch_device_type_meta()) return "meta";
    return (type == aoti_torch_device_type_cuda() ? "cuda:" : "another device:") + std::to_string(index);
  }
};

inline Place place_of(const Tensor& x) {
  Place p;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &p.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &p.index));
  return p;
}

// Compares each argument with the first. `names`: "out, lse".
class OneDevice {
 public:
  OneDevice(const char* op, const char* names) : op_(op), names_(names) {}
  void look(const Tensor& x) {
    const Place own = place_of(x);
    if (!count_) first_ = own;
    PK_CHECK(own == first_, op_, ": ", name(count_), " is on ", own.name(), ", ", name(0), " on ", first_.name(),
             "; all tensors of a call must be on one device");
    ++count_;
  }
  void look(const MaybeTensor& x) {
    if (x) look(*x);
    else ++count_;  // the first of an op is never left out
  }
  void look(const std::vector<Tensor>& list) {
    for (const Tensor& x : list) look(x), --count_;
    ++count_;
  }

 private:
  std::string name(int n) const {
    const std::string names(names_);
    size_t at = 0;
    while (n--) at = names.find(", ", at) + 2;
    return names.substr(at, names.find(", ", at) - at);
  }
  const char *op_, *names_;
  int count_ = 0;
  Place first_ = {};
};

template <class... Arguments>
void one_device(const char* op, const char* names, const Arguments&... arguments) {
  OneDevice all(op, names);
  (all.look(arguments), ...);
}

}  // namespace pikv
