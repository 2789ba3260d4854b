// One stored row as floats, plain C++: shared by the generic attention and by the page bounds.
#pragma once
#include "../include/page_format.h"
#include "numbers.h"

namespace pikv {
namespace {

// Codes of one row as numbers; scale and zero are not applied.
inline void row_to_float(int format, const uint8_t* row, int D, float* x) {
  switch (format) {
    case kFp32: {
      std::memcpy(x, row, 4 * D);
      break;
    }
    case kBf16: {
      const uint16_t* h = reinterpret_cast<const uint16_t*>(row);
      for (int d = 0; d < D; ++d) x[d] = bf16_to_float(h[d]);
      break;
    }
    case kFp16: {
      const uint16_t* h = reinterpret_cast<const uint16_t*>(row);
      for (int d = 0; d < D; ++d) x[d] = half_to_float(h[d]);
      break;
    }
    case kInt8:
      for (int d = 0; d < D; ++d) x[d] = row[d];
      break;
    case kInt4:
      for (int d = 0; d < D / 2; ++d) x[2 * d] = row[d] & 15, x[2 * d + 1] = row[d] >> 4;
      break;
    case kFp8:
      for (int d = 0; d < D; ++d) x[d] = fp8_to_float(row[d]);
      break;
  }
}

// Keys of slots [t0, t0 + count), dequantised, into x [count, k_dim]. `scale` and `zero` are room for k_dim numbers each.
inline void keys_to_float(const PageFormat& f, const uint8_t* head, int t0, int count, float* x, float* scale, float* zero) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(head + f.k_scale);
  const uint16_t* zeros = reinterpret_cast<const uint16_t*>(head + f.k_zero);
  for (int t = t0; t < t0 + count; ++t, x += f.k_dim) {
    row_to_float(f.format, head + f.k + (int64_t)t * f.k_row_bytes, f.k_dim, x);
    if (f.format == kFp8) {
      const float s = half_to_float(scales[t]);
      for (int d = 0; d < f.k_dim; ++d) x[d] *= s;
    } else if (format_grouped(f.format)) {
      if (t == t0 || t % f.group == 0) {
        const int64_t g = (int64_t)(t / f.group) * f.k_dim;
        for (int d = 0; d < f.k_dim; ++d) scale[d] = half_to_float(scales[g + d]), zero[d] = half_to_float(zeros[g + d]);
      }
      for (int d = 0; d < f.k_dim; ++d) x[d] = x[d] * scale[d] + zero[d];
    }
  }
}

}  // namespace
}  // namespace pikv
