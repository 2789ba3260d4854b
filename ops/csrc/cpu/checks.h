// Reading torch arguments, and refusing bad ones. The words are those of ops/checks.py.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../include/page_format.h"
#include "devices.h"

namespace pikv {

using torch::headeronly::ScalarType;

inline std::string shape(const Tensor& x) {
  std::string s = "[";
  for (int64_t i = 0; i < x.dim(); ++i) s += (i ? ", " : "") + std::to_string(x.size(i));
  return s + "]";
}

// As PageFormat.label of ops/format/formats.py.
inline std::string format_name(const PageFormat& f) {
  static const char* const names[] = {"fp32", "bf16", "fp16", "int8", "int4", "fp8_e4m3", "int2", "fp4_e2m1"};
  const std::string keys = names[f.format];
  return f.v_format != f.format ? keys + "/" + names[f.v_format] : f.rope >= 0 ? keys + "+rope" : keys;
}

inline const char* dtype_name(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    default: return "another dtype";
  }
}

// Uninitialised and contiguous on the CPU. By the shim's own function: new_empty goes through the dispatcher, 1 us each.
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[8], step = 1;
  for (size_t i = sizes.size(); i-- > 0;) strides[i] = step, step *= std::max<int64_t>(sizes.begin()[i], 1);
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}
inline Tensor new_floats(std::initializer_list<int64_t> sizes) { return new_tensor(sizes, aoti_torch_dtype_float32()); }

// kFp32, kBf16 or kFp16 of a contiguous tensor.
inline int float_type(const char* name, const Tensor& x) {
  const ScalarType t = x.scalar_type();
  PK_CHECK(t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half, name,
           " must be float32, bfloat16 or float16, got ", dtype_name(x));
  PK_CHECK(x.is_contiguous(), name, " must be contiguous");
  return t == ScalarType::Float ? kFp32 : t == ScalarType::BFloat16 ? kBf16 : kFp16;
}

// int32 or int64 indices; int64 ones are copied, since kernels read int32.
class Indices {
 public:
  Indices() = default;
  Indices(const char* name, const Tensor& x) {
    const ScalarType t = x.scalar_type();
    PK_CHECK(t == ScalarType::Int || t == ScalarType::Long, name, " must be int32 or int64, got ", dtype_name(x));
    PK_CHECK(x.is_contiguous(), name, " must be contiguous");
    count_ = x.numel();
    if (t == ScalarType::Int) {
      data_ = static_cast<const int32_t*>(x.const_data_ptr());
    } else {
      const int64_t* wide = static_cast<const int64_t*>(x.const_data_ptr());
      narrow_.resize(count_);
      for (int64_t i = 0; i < count_; ++i) narrow_[i] = (int32_t)std::clamp<int64_t>(wide[i], -1, INT32_MAX);
    }
  }
  Indices(const char* name, const MaybeTensor& x) {
    if (x) *this = Indices(name, *x);
  }
  const int32_t* data() const { return data_ ? data_ : narrow_.empty() ? nullptr : narrow_.data(); }
  int64_t count() const { return count_; }
  int32_t operator[](int64_t i) const { return data()[i]; }
  int32_t top() const { return count_ ? *std::max_element(data(), data() + count_) : -1; }

 private:
  const int32_t* data_ = nullptr;
  std::vector<int32_t> narrow_;
  int64_t count_ = 0;
};

inline PageFormat check_pages(const Tensor& pages, int64_t format, int64_t num_kv_heads, int64_t k_dim, int64_t v_dim, int64_t page_size,
                              int64_t group, bool latent) {
  PK_CHECK(format >= 0 && (format & 15) < kNumFormats && (format >> 4 & 15) <= kNumFormats && format < 1024, "no page format has the code ",
           format);
  const PageFormat f = make_page_format((int)format, (int)num_kv_heads, (int)k_dim, (int)v_dim, (int)page_size, (int)group, latent);
  PK_CHECK(pages.scalar_type() == ScalarType::Byte && pages.dim() == 2 && pages.size(1) == f.record_bytes,
           "pages must be uint8 [num_pages, ", f.record_bytes, "] for ", format_name(f), ", got ", dtype_name(pages), " ",
           shape(pages));
  PK_CHECK(pages.is_contiguous(), "pages must be contiguous");
  PK_CHECK(pages.size(0) <= INT32_MAX / page_size, "pages has ", pages.size(0), " pages of ", page_size,
           " slots; slots are int32, so a store holds fewer than 2**31");
  return f;
}

// Tokens that are listed, or have bounds, as one: a block of a page; 0 = the page.
inline int64_t check_block(int64_t block_size, const PageFormat& f) {
  if (!block_size) return f.page_size;
  const bool grouped = format_grouped(f.format);
  PK_CHECK(block_size > 0 && f.page_size % block_size == 0 && (!grouped || block_size == f.page_size || f.group % block_size == 0),
           "block_size must divide the page_size ", f.page_size, grouped ? " and the group " + std::to_string(f.group) : std::string(), ", got ",
           block_size);
  return block_size;
}

// Every page that will be read is in the store, every length fits its table. Both are [N, heads, ...] with heads of 1 or H.
inline void check_table(const Indices& table, const Indices& seqlens, int N, int table_heads, int seqlen_heads, int max_pages,
                        int64_t num_pages, int page_size) {
  const int heads = std::max(table_heads, seqlen_heads);
  for (int n = 0; n < N; ++n)
    for (int h = 0; h < heads; ++h) {
      const int len = seqlens[n * seqlen_heads + (seqlen_heads == 1 ? 0 : h)], used = (len + page_size - 1) / page_size;
      PK_CHECK(used <= max_pages, "seqlens has ", len, ", the block table has room for ", (int64_t)max_pages * page_size, " entries");
      const int32_t* ids = table.data() + (int64_t)(n * table_heads + (table_heads == 1 ? 0 : h)) * max_pages;
      for (int c = 0; c < used; ++c)
        PK_CHECK(ids[c] >= 0 && ids[c] < num_pages, "block_table names page ", ids[c], ", the store has ", num_pages);
    }
}

// The type of the tail; kFp32 where the format has none.
inline int check_tail(const PageFormat& f, const MaybeTensor& tail, const MaybeTensor& tail_rows) {
  const std::string name = format_name(f);
  if (!format_grouped(f.format)) {
    PK_CHECK(!tail, name, " pages have no tail");
    return kFp32;
  }
  PK_CHECK(tail && tail_rows, name, " pages need tail and tail_rows");
  const int type = float_type("tail", *tail);
  PK_CHECK(tail->dim() == 4 && tail->size(1) == f.num_kv_heads && tail->size(2) == f.group && tail->size(3) == f.k_dim,
           "tail must be [rows, ", f.num_kv_heads, ", ", f.group, ", ", f.k_dim, "], got ", shape(*tail));
  return type;
}

}  // namespace pikv
