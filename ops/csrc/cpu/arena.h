// Scratch memory of a thread: grown and kept, on 64-byte boundaries.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace pikv {

class Arena {
 public:
  void start(size_t bytes) {
    if (bytes > size_) {
      memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      size_ = bytes;
    }
    used_ = 0;
  }
  template <class T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  size_t size_ = 0, used_ = 0;
};

}  // namespace pikv
