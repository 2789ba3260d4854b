// pack and unpack on the CPU: rows of several tensors into one buffer and back. Bytes only; values keep their bits.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "fields.h"

namespace pikv {
namespace {

void pack(Tensor buffer, std::vector<Tensor> fields, MaybeTensor index, std::vector<int64_t> offsets, std::vector<int64_t> strides,
          std::vector<int64_t> rows) {
  PK_ONE_DEVICE("pack", buffer, fields, index);
  const std::vector<Field> read = read_fields("pack", buffer, fields, offsets, strides, rows);
  const Indices from("index", index);
  uint8_t* out = static_cast<uint8_t*>(buffer.mutable_data_ptr());
  for (size_t i = 0; i < read.size(); ++i) {
    const Field& f = read[i];
    PK_CHECK(!index || from.count() == f.num_packed, "pack: field ", i, " has ", f.num_packed, " rows in the buffer, index has ",
             from.count());
    PK_CHECK(!index || from.top() < f.rows, "pack: index names row ", from.top(), " of field ", i, ", which has ", f.rows);
    if (!f.num_packed || !f.row_bytes) continue;
    int64_t r = 0;
    if (!index && f.stride == f.row_bytes && f.rows) {  // one piece
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
  PK_ONE_DEVICE("unpack", buffer, fields, index);
  const Indices to("index", index);
  std::vector<int64_t> rows;
  for (const Tensor& x : fields) rows.push_back(index ? to.count() : x.dim() ? x.size(0) : 0);
  const std::vector<Field> read = read_fields("unpack", buffer, fields, offsets, strides, rows);
  const uint8_t* in = static_cast<const uint8_t*>(buffer.const_data_ptr());
  for (size_t i = 0; i < read.size(); ++i) {
    const Field& f = read[i];
    PK_CHECK(!index || to.top() < f.rows, "unpack: index names row ", to.top(), " of field ", i, ", which has ", f.rows);
    if (!f.num_packed || !f.row_bytes) continue;
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
