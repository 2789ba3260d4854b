// Stored rows as floats, plain C++: shared by the generic attention and by the page bounds.
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
    case kInt2:
      for (int d = 0; d < D; ++d) x[d] = row[d / 4] >> 2 * (d % 4) & 3;
      break;
    case kFp4:
      for (int d = 0; d < D / 2; ++d) x[2 * d] = fp4_to_float(row[d] & 15), x[2 * d + 1] = fp4_to_float(row[d] >> 4);
      break;
    case kFp8:
      for (int d = 0; d < D; ++d) x[d] = fp8_to_float(row[d]);
      break;
  }
}

// Row t of a block whose rows are encoded each by itself, dequantised. `scales` and `zeros` are the blocks, where there are any.
inline void token_to_float(int format, const uint8_t* row, const uint8_t* scales, const uint8_t* zeros, int t, int D, float* x) {
  row_to_float(format, row, D, x);
  if (format <= kFp16) return;
  if (format == kFp4) {
    const float power = power_of_two(zeros[t]);
    for (int d = 0; d < D; ++d) x[d] *= fp8_to_float(scales[t * fp4_blocks(D) + d / kFp4Block]) * power;
    return;
  }
  const float s = half_to_float(reinterpret_cast<const uint16_t*>(scales)[t]);
  if (format == kFp8) {
    for (int d = 0; d < D; ++d) x[d] *= s;
    return;
  }
  const float z = half_to_float(reinterpret_cast<const uint16_t*>(zeros)[t]);
  for (int d = 0; d < D; ++d) x[d] = x[d] * s + z;
}

// Keys of slots [t0, t0 + count), dequantised, into x [count, k_dim]. `scale` and `zero` are room for k_dim numbers each.
inline void keys_to_float(const PageFormat& f, const uint8_t* head, int t0, int count, float* x, float* scale, float* zero) {
  const int D = f.k_coded;
  for (int t = t0; t < t0 + count; ++t, x += f.k_dim) {
    const uint8_t* row = head + f.k + (int64_t)t * f.k_row_bytes;
    if (!format_grouped(f.format)) {
      token_to_float(f.format, row, head + f.k_scale, head + f.k_zero, t, D, x);
    } else {
      row_to_float(f.format, row, D, x);
      if (t == t0 || t % f.group == 0) {
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(head + f.k_scale) + (int64_t)(t / f.group) * D;
        const uint16_t* zeros = reinterpret_cast<const uint16_t*>(head + f.k_zero) + (int64_t)(t / f.group) * D;
        for (int d = 0; d < D; ++d) scale[d] = half_to_float(scales[d]), zero[d] = half_to_float(zeros[d]);
      }
      for (int d = 0; d < D; ++d) x[d] = x[d] * scale[d] + zero[d];
    }
    if (f.rope >= 0) row_to_float(kFp16, head + f.rope + (int64_t)2 * t * (f.k_dim - D), f.k_dim - D, x + D);
  }
}

}  // namespace
}  // namespace pikv
