// The fields of pack and unpack, read and refused alike on CPU and CUDA.
#pragma once
#include "checks.h"

namespace pikv {

// -1 in the dtype of a field: what padding rows hold.
inline uint64_t minus_one(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return 0xbf800000bf800000u;
    case ScalarType::BFloat16: return 0xbf80bf80bf80bf80u;
    case ScalarType::Half: return 0xbc00bc00bc00bc00u;
    case ScalarType::Double: return 0xbff0000000000000u;
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::Short:
    case ScalarType::Char:
    case ScalarType::Byte: return ~0ull;
    default: PK_CHECK(false, "pack: a field must be float64, float32, bfloat16, float16 or an integer, got ", dtype_name(x));
  }
  return 0;
}

struct Field {
  uint8_t* data;
  int64_t rows, row_bytes, offset, stride, num_packed;
  uint64_t padding;
};

inline int64_t row_bytes(const Tensor& x) {
  int64_t bytes = (int64_t)x.element_size();
  for (int64_t i = 1; i < x.dim(); ++i) bytes *= x.size(i);
  return bytes;
}

// `num_packed`: rows of each field in the buffer.
inline std::vector<Field> read_fields(const char* op, const Tensor& buffer, const std::vector<Tensor>& fields, const std::vector<int64_t>& offsets,
                               const std::vector<int64_t>& strides, const std::vector<int64_t>& num_packed) {
  PK_CHECK(buffer.scalar_type() == ScalarType::Byte && buffer.is_contiguous(), op, ": buffer must be contiguous uint8, got ",
           dtype_name(buffer));
  const size_t n = fields.size();
  PK_CHECK(offsets.size() == n && strides.size() == n && num_packed.size() == n, op, ": ", n,
           " fields need as many offsets, strides and rows, got ", offsets.size(), ", ", strides.size(), " and ", num_packed.size());
  std::vector<Field> read;
  for (size_t i = 0; i < n; ++i) {
    const Tensor& x = fields[i];
    PK_CHECK(x.dim() >= 1 && x.is_contiguous(), op, ": field ", i, " must be contiguous [rows, ...], got ", shape(x));
    Field f = {const_cast<uint8_t*>(static_cast<const uint8_t*>(x.const_data_ptr())), x.size(0), row_bytes(x), offsets[i], strides[i],
               num_packed[i], minus_one(x)};
    const int64_t end = f.num_packed ? f.offset + (f.num_packed - 1) * f.stride + f.row_bytes : 0;
    PK_CHECK(f.offset >= 0 && f.num_packed >= 0 && f.stride >= f.row_bytes && end <= buffer.numel(), op, ": field ", i, ", ", f.num_packed,
             " rows of ", f.row_bytes, " bytes from ", f.offset, ", ", f.stride, " apart, does not fit a buffer of ", buffer.numel(),
             " bytes");
    read.push_back(f);
  }
  return read;
}

}  // namespace pikv
