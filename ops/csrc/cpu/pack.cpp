// pack and unpack on the CPU: rows of several tensors into one buffer and back. Bytes only; values keep their bits.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "checks.h"

namespace pikv {
namespace {

// -1 in the dtype of a field: what padding rows hold.
uint64_t minus_one(const Tensor& x) {
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

int64_t row_bytes(const Tensor& x) {
  int64_t bytes = (int64_t)x.element_size();
  for (int64_t i = 1; i < x.dim(); ++i) bytes *= x.size(i);
  return bytes;
}

// `num_packed`: rows of each field in the buffer.
std::vector<Field> read_fields(const char* op, const Tensor& buffer, const std::vector<Tensor>& fields, const std::vector<int64_t>& offsets,
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

void pack(Tensor buffer, std::vector<Tensor> fields, MaybeTensor index, std::vector<int64_t> offsets, std::vector<int64_t> strides,
          std::vector<int64_t> rows) {
  const std::vector<Field> read = read_fields("pack", buffer, fields, offsets, strides, rows);
  const Indices from("index", index);
  uint8_t* out = static_cast<uint8_t*>(buffer.mutable_data_ptr());
  for (size_t i = 0; i < read.size(); ++i) {
    const Field& f = read[i];
    PK_CHECK(!index || from.count() == f.num_packed, "pack: field ", i, " has ", f.num_packed, " rows in the buffer, index has ",
             from.count());
    PK_CHECK(!index || from.top() < f.rows, "pack: index names row ", from.top(), " of field ", i, ", which has ", f.rows);
    int64_t r = 0;
    if (!index && f.stride == f.row_bytes) {  // one piece
      r = std::min(f.rows, f.num_packed);
      std::memcpy(out + f.offset, f.data, r * f.row_bytes);
    }
    for (; r < f.num_packed; ++r) {
      const int64_t source = index ? from[r] : r < f.rows ? r : -1;
      uint8_t* to = out + f.offset + r * f.stride;
      if (source >= 0) std::memcpy(to, f.data + source * f.row_bytes, f.row_bytes);
      else
        for (int64_t at = 0; at < f.row_bytes; at += 8) std::memcpy(to + at, &f.padding, std::min<int64_t>(8, f.row_bytes - at));
    }
  }
}

void unpack(Tensor buffer, std::vector<Tensor> fields, MaybeTensor index, std::vector<int64_t> offsets, std::vector<int64_t> strides) {
  const Indices to("index", index);
  std::vector<int64_t> rows;
  for (const Tensor& x : fields) rows.push_back(index ? to.count() : x.dim() ? x.size(0) : 0);
  const std::vector<Field> read = read_fields("unpack", buffer, fields, offsets, strides, rows);
  const uint8_t* in = static_cast<const uint8_t*>(buffer.const_data_ptr());
  for (size_t i = 0; i < read.size(); ++i) {
    const Field& f = read[i];
    PK_CHECK(!index || to.top() < f.rows, "unpack: index names row ", to.top(), " of field ", i, ", which has ", f.rows);
    if (!index && f.stride == f.row_bytes) {
      std::memcpy(f.data, in + f.offset, f.rows * f.row_bytes);
      continue;
    }
    for (int64_t r = 0; r < f.num_packed; ++r) {
      const int64_t target = index ? to[r] : r;
      if (target >= 0) std::memcpy(f.data + target * f.row_bytes, in + f.offset + r * f.stride, f.row_bytes);
    }
  }
}

}  // namespace
}  // namespace pikv

STABLE_TORCH_LIBRARY_IMPL(pikv, CPU, m) {
  m.impl("pack", TORCH_BOX(&pikv::pack));
  m.impl("unpack", TORCH_BOX(&pikv::unpack));
}
