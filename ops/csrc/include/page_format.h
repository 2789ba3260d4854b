// The page record of ops/format/formats.py for compiled code: no includes, plain data, so that g++, nvcc, NVRTC and host emulation share it.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define PK_HD __host__ __device__
#else
#define PK_HD
#endif

namespace pikv {

enum Format { kFp32 = 0, kBf16 = 1, kFp16 = 2, kInt8 = 3, kInt4 = 4, kFp8 = 5, kInt2 = 6, kFp4 = 7 };
constexpr int kNumFormats = 8;

// Byte offsets inside the section of one head; -1 = the format has no such block. Head h starts at h * head_bytes.
struct PageFormat {
  int format, v_format, num_kv_heads, k_dim, v_dim, page_size, group, latent;
  int k_coded;  // columns of a key in `format`; the others, of a latent key, are fp16 at `rope`
  int k_row_bytes, v_row_bytes;
  long long k, v, k_scale, k_zero, v_scale, v_zero, rope, head_bytes, positions, record_bytes;
};

PK_HD constexpr int format_bits(int format) {
  return format == kFp32 ? 32 : format <= kFp16 ? 16 : format == kInt4 || format == kFp4 ? 4 : format == kInt2 ? 2 : 8;
}

// The largest code of an integer format, else 0. K of such a format is encoded in groups of tokens.
PK_HD constexpr int format_levels(int format) { return format == kInt8 ? 255 : format == kInt4 ? 15 : format == kInt2 ? 3 : 0; }
PK_HD constexpr bool format_grouped(int format) { return format_levels(format) > 0; }

// The `format` of a layout: K in the low bits, V plus one in bits 4 to 7 where it is another.
PK_HD constexpr int pack_formats(int k, int v) { return k == v ? k : k | (v + 1) << 4; }
PK_HD constexpr int key_format(int packed) { return packed & 15; }
PK_HD constexpr int value_format(int packed) { return packed >> 4 & 15 ? (packed >> 4 & 15) - 1 : packed & 15; }

// Bit 8: the last k_dim - v_dim columns of a latent key are fp16.
constexpr int kRopeRaw = 1 << 8;
PK_HD constexpr bool rope_raw(int packed) { return packed & kRopeRaw; }
// Bit 9: queries and weights that meet integers may be of one byte. Says nothing of the record.
constexpr int kFast = 1 << 9;

// fp4: columns that share a scale, and scales of a row.
constexpr int kFp4Block = 16;
PK_HD constexpr int fp4_blocks(int dim) { return (dim + kFp4Block - 1) / kFp4Block; }

// Bytes after a row of int8 page bounds: its scale, bf16.
constexpr int kBoundScale = 2;
PK_HD constexpr int bound_columns(int type, int dim) { return type == kInt8 ? dim + kBoundScale : dim; }

PK_HD inline long long place_block(long long* at, long long size) {
  const long long start = size ? *at : -1;
  *at = (*at + size + 15) / 16 * 16;
  return start;
}

// Bytes of the scales and of the zeros of rows that are encoded each by itself.
PK_HD inline long long row_scale_bytes(int format, int dim, int rows) {
  return format <= kFp16 ? 0 : format == kFp4 ? (long long)rows * fp4_blocks(dim) : 2LL * rows;
}
PK_HD inline long long row_zero_bytes(int format, int rows) { return format == kFp4 ? rows : format_grouped(format) ? 2LL * rows : 0; }

// Must agree with ops/format/formats.py byte for byte: tests/ops compares every offset. `packed`: the `format` of a layout, see ops/library.py.
PK_HD inline PageFormat make_page_format(int packed, int num_kv_heads, int k_dim, int v_dim, int page_size, int group, int latent) {
  PageFormat f = {};
  const bool raw = rope_raw(packed);
  f.format = key_format(packed), f.v_format = value_format(packed);
  f.num_kv_heads = num_kv_heads, f.k_dim = k_dim, f.v_dim = v_dim;
  f.page_size = page_size, f.group = group, f.latent = latent, f.k_coded = raw ? v_dim : k_dim;
  const bool grouped = format_grouped(f.format);
  f.k_row_bytes = f.k_coded * format_bits(f.format) / 8;
  f.v_row_bytes = latent ? 0 : v_dim * format_bits(f.v_format) / 8;
  const long long grid = 2LL * (page_size / group) * f.k_coded;
  long long at = 0;
  f.k = place_block(&at, (long long)page_size * f.k_row_bytes);
  f.v = place_block(&at, (long long)page_size * f.v_row_bytes);
  f.k_scale = place_block(&at, grouped ? grid : row_scale_bytes(f.format, f.k_coded, page_size));
  f.k_zero = place_block(&at, grouped ? grid : row_zero_bytes(f.format, page_size));
  f.v_scale = place_block(&at, latent ? 0 : row_scale_bytes(f.v_format, v_dim, page_size));
  f.v_zero = place_block(&at, latent ? 0 : row_zero_bytes(f.v_format, page_size));
  f.rope = place_block(&at, raw ? 2LL * page_size * (k_dim - v_dim) : 0);
  f.head_bytes = at;
  f.positions = num_kv_heads * at;
  f.record_bytes = (f.positions + 4 * page_size + 63) / 64 * 64;
  return f;
}

// The `format` of the layout again.
PK_HD inline int packed_of(const PageFormat& f) { return pack_formats(f.format, f.v_format) | (f.rope >= 0 ? kRopeRaw : 0); }

}  // namespace pikv
