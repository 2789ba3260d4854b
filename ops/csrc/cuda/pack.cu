// pack and unpack: checks and launches. Nothing here waits for the device.
#include <torch/csrc/stable/library.h>

#include "../cpu/fields.h"
#include "arguments.h"
#include "kernels.h"

namespace pikv {
namespace {

void check_rows(const char* op, const std::vector<Field>& fields, const MaybeTensor& index) {
  if (!index || !values_are_checked(*index)) return;
  const HostIndices rows("index", index);
  for (size_t i = 0; i < fields.size(); ++i)
    PK_CHECK(rows->top() < fields[i].rows, op, ": index names row ", rows->top(), " of field ", i, ", which has ", fields[i].rows);
}

// As many fields in one launch as its arguments hold.
void move_rows(const Tensor& buffer, const std::vector<Field>& fields, const MaybeTensor& index, bool unpack) {
  Packed p = {};
  p.buffer = const_cast<unsigned char*>(static_cast<const unsigned char*>(buffer.const_data_ptr()));
  p.index = read_index("index", index);
  constexpr int most = sizeof p.fields / sizeof p.fields[0];
  const Device device(buffer);
  for (size_t first = 0; first < fields.size(); first += most) {
    const int count = (int)std::min<size_t>(most, fields.size() - first);
    int64_t most_rows = 0;
    for (int i = 0; i < count; ++i) {
      const Field& f = fields[first + i];
      p.fields[i] = {f.data, f.rows, f.row_bytes, f.offset, f.stride, f.num_packed, f.padding};
      most_rows = std::max(most_rows, f.num_packed);
    }
    const int64_t blocks = std::min<int64_t>(most_rows, 8LL * device.num_processors());
    if (blocks) check_launch(launch_pack(p, count, (int)blocks, unpack, device.stream()));
  }
}

void pack(Tensor buffer, std::vector<Tensor> fields, MaybeTensor index, std::vector<int64_t> offsets, std::vector<int64_t> strides,
          std::vector<int64_t> rows) {
  PK_ONE_DEVICE("pack", buffer, fields, index);
  const std::vector<Field> read = read_fields("pack", buffer, fields, offsets, strides, rows);
  for (size_t i = 0; index && i < read.size(); ++i)
    PK_CHECK(index->numel() == read[i].num_packed, "pack: field ", i, " has ", read[i].num_packed, " rows in the buffer, index has ", index->numel());
  check_rows("pack", read, index);
  move_rows(buffer, read, index, false);
}

void unpack(Tensor buffer, std::vector<Tensor> fields, MaybeTensor index, std::vector<int64_t> offsets, std::vector<int64_t> strides) {
  PK_ONE_DEVICE("unpack", buffer, fields, index);
  std::vector<int64_t> rows;
  for (const Tensor& x : fields) rows.push_back(index ? index->numel() : x.dim() ? x.size(0) : 0);
  const std::vector<Field> read = read_fields("unpack", buffer, fields, offsets, strides, rows);
  check_rows("unpack", read, index);
  move_rows(buffer, read, index, true);
}

}  // namespace
}  // namespace pikv

PK_LIBRARY_IMPL(m) {
  m.impl("pack", TORCH_BOX(&pikv::pack));
  m.impl("unpack", TORCH_BOX(&pikv::unpack));
}
