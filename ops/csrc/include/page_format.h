// The page record of ops/formats.py for compiled code: no includes, plain data, so that g++, nvcc, NVRTC and host emulation share it.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define PK_HD __host__ __device__
#else
#define PK_HD
#endif

namespace pikv {

enum Format { kFp32 = 0, kBf16 = 1, kFp16 = 2, kInt8 = 3, kInt4 = 4, kFp8 = 5 };

// Byte offsets inside the section of one head; -1 = the format has no such block. Head h starts at h * head_bytes.
struct PageFormat {
  int format, num_kv_heads, k_dim, v_dim, page_size, group, latent;
  int k_row_bytes, v_row_bytes;
  long long k, v, k_scale, k_zero, v_scale, v_zero, head_bytes, positions, record_bytes;
};

PK_HD inline int format_bits(int format) {
  return format == kFp32 ? 32 : format == kBf16 || format == kFp16 ? 16 : format == kInt4 ? 4 : 8;
}

PK_HD inline bool format_grouped(int format) { return format == kInt8 || format == kInt4; }

PK_HD inline long long place_block(long long* at, long long size) {
  const long long start = size ? *at : -1;
  *at = (*at + size + 15) / 16 * 16;
  return start;
}

// Must agree with ops/formats.py byte for byte: tests/ops compares every offset.
PK_HD inline PageFormat make_page_format(int format, int num_kv_heads, int k_dim, int v_dim, int page_size, int group, int latent) {
  PageFormat f = {};
  f.format = format, f.num_kv_heads = num_kv_heads, f.k_dim = k_dim, f.v_dim = v_dim;
  f.page_size = page_size, f.group = group, f.latent = latent;
  const int bits = format_bits(format);
  const bool grouped = format_grouped(format);
  f.k_row_bytes = k_dim * bits / 8;
  f.v_row_bytes = latent ? 0 : v_dim * bits / 8;
  const long long k_scales = grouped ? (long long)(page_size / group) * k_dim : format == kFp8 ? page_size : 0;
  const long long v_scales = (!grouped && format != kFp8) || latent ? 0 : page_size;
  long long at = 0;
  f.k = place_block(&at, (long long)page_size * f.k_row_bytes);
  f.v = place_block(&at, (long long)page_size * f.v_row_bytes);
  f.k_scale = place_block(&at, 2 * k_scales);
  f.k_zero = place_block(&at, grouped ? 2 * k_scales : 0);
  f.v_scale = place_block(&at, 2 * v_scales);
  f.v_zero = place_block(&at, grouped ? 2 * v_scales : 0);
  f.head_bytes = at;
  f.positions = num_kv_heads * at;
  f.record_bytes = (f.positions + 4 * page_size + 63) / 64 * 64;
  return f;
}

}  // namespace pikv
