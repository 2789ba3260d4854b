// CRC-32 as zlib's, and parts of files with theirs. Carry-less products fold 64 bytes at a time where the processor has them.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "checks.h"

#include <unistd.h>

#if defined(__x86_64__) && !defined(PK_PORTABLE)
#define PK_CLMUL 1
#include <immintrin.h>
#endif

namespace pikv {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320u;

using Tables = std::array<std::array<uint32_t, 256>, 8>;

const Tables& tables() {
  static const Tables made = [] {
    Tables t;
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c >> 1 ^ (c & 1 ? kPolynomial : 0);
      t[0][i] = c;
    }
    for (int k = 1; k < 8; ++k)
      for (int i = 0; i < 256; ++i) t[k][i] = t[k - 1][i] >> 8 ^ t[0][t[k - 1][i] & 255];
    return t;
  }();
  return made;
}

// Of the state, which is the checksum with its bits turned over.
uint32_t by_tables(uint32_t c, const uint8_t* p, int64_t n) {
  const Tables& t = tables();
  for (; n >= 8; p += 8, n -= 8) {
    const uint32_t low = c ^ (p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24);
    c = t[7][low & 255] ^ t[6][low >> 8 & 255] ^ t[5][low >> 16 & 255] ^ t[4][low >> 24] ^ t[3][p[4]] ^ t[2][p[5]] ^ t[1][p[6]] ^ t[0][p[7]];
  }
  for (; n > 0; ++p, --n) c = c >> 8 ^ t[0][(c ^ *p) & 255];
  return c;
}

#if PK_CLMUL
// n is a multiple of 16, at least 64. Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ, Intel 2009, with the
// constants of the reflected polynomial: x^(512 +- 32), x^(128 +- 32), x^64 modulo it, and Barrett's.
__attribute__((target("pclmul,sse4.1"))) uint32_t by_products(uint32_t c, const uint8_t* p, int64_t n) {
  const auto load = [](const uint8_t* at) __attribute__((target("pclmul,sse4.1"))) { return _mm_loadu_si128((const __m128i*)at); };
  const auto fold = [](__m128i x, __m128i k, __m128i next) __attribute__((target("pclmul,sse4.1"))) {
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, k, 0x00), _mm_clmulepi64_si128(x, k, 0x11)), next);
  };
  const __m128i by512 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), by128 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  const __m128i by64 = _mm_set_epi64x(0, 0x0163cd6124), barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  const __m128i low = _mm_setr_epi32(~0, 0, ~0, 0);
  __m128i x[4];
  for (int i = 0; i < 4; ++i) x[i] = load(p + 16 * i);
  x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)c));
  for (p += 64, n -= 64; n >= 64; p += 64, n -= 64)
    for (int i = 0; i < 4; ++i) x[i] = fold(x[i], by512, load(p + 16 * i));
  for (int i = 1; i < 4; ++i) x[0] = fold(x[0], by128, x[i]);
  for (; n >= 16; p += 16, n -= 16) x[0] = fold(x[0], by128, load(p));
  __m128i one = _mm_xor_si128(_mm_srli_si128(x[0], 8), _mm_clmulepi64_si128(x[0], by128, 0x10));
  one = _mm_xor_si128(_mm_clmulepi64_si128(_mm_and_si128(one, low), by64, 0x00), _mm_srli_si128(one, 4));
  __m128i two = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(one, low), barrett, 0x10), low);
  one = _mm_xor_si128(one, _mm_clmulepi64_si128(two, barrett, 0x00));
  return (uint32_t)_mm_extract_epi32(one, 1);
}
#endif

uint32_t crc_of(uint32_t seed, const uint8_t* p, int64_t n) {
  uint32_t c = ~seed;
#if PK_CLMUL
  static const bool products = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (products && n >= 64) {
    const int64_t whole = n / 16 * 16;
    c = by_products(c, p, whole), p += whole, n -= whole;
  }
#endif
  return ~by_tables(c, p, n);
}

const int64_t* offsets(const char* name, const Tensor& x, int64_t count, int64_t size, int64_t end) {
  PK_CHECK(x.scalar_type() == ScalarType::Long && x.dim() == 1 && x.size(0) == count && x.is_contiguous(), name, " must be contiguous int64 [",
           count, "], got ", dtype_name(x), " ", shape(x));
  const int64_t* at = static_cast<const int64_t*>(x.const_data_ptr());
  for (int64_t i = 0; i < count; ++i)
    PK_CHECK(at[i] >= 0 && at[i] <= end - size, name, " has byte ", at[i], ": ", size, " bytes from there are not in the ", end, " of memory");
  return at;
}

int64_t bytes_of(const Tensor& memory) {
  PK_CHECK(memory.scalar_type() == ScalarType::Byte && memory.is_contiguous(), "memory must be contiguous uint8, got ", dtype_name(memory), " ",
           shape(memory));
  return memory.numel();
}

Tensor crc32(Tensor memory, Tensor at, MaybeTensor seeds, int64_t size) {
  PK_ONE_DEVICE("crc32", memory, at, seeds);
  const int64_t n = at.numel();
  PK_CHECK(size >= 0, "size must be 0 or more, got ", size);
  const int64_t* from = offsets("at", at, n, size, bytes_of(memory));
  PK_CHECK(!seeds || (seeds->scalar_type() == ScalarType::Long && seeds->numel() == n && seeds->is_contiguous()), "seeds must be contiguous int64 [",
           n, "], got ", seeds ? shape(*seeds) : std::string());
  const int64_t* seed = seeds ? static_cast<const int64_t*>(seeds->const_data_ptr()) : nullptr;
  Tensor found = new_tensor({n}, aoti_torch_dtype_int64());
  int64_t* out = static_cast<int64_t*>(found.mutable_data_ptr());
  const uint8_t* p = static_cast<const uint8_t*>(memory.const_data_ptr());
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(size, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = crc_of(seed ? (uint32_t)seed[i] : 0, p + from[i], size);
  });
  return found;
}

Tensor read_file(Tensor memory, Tensor to, Tensor at, int64_t file, int64_t size) {
  PK_ONE_DEVICE("read_file", memory, to, at);
  const int64_t n = to.numel();
  PK_CHECK(size >= 0, "size must be 0 or more, got ", size);
  const int64_t* target = offsets("to", to, n, size, bytes_of(memory));
  const int64_t* from = offsets("at", at, n, 0, INT64_MAX);
  Tensor found = new_tensor({n}, aoti_torch_dtype_int64());
  int64_t* out = static_cast<int64_t*>(found.mutable_data_ptr());
  uint8_t* p = static_cast<uint8_t*>(memory.mutable_data_ptr());
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(size, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t done = 0;
      while (done < size) {
        const ssize_t count = ::pread((int)file, p + target[i] + done, (size_t)(size - done), (off_t)(from[i] + done));
        if (count > 0) done += count;
        else if (count == 0 || errno != EINTR) break;
      }
      out[i] = done == size ? (int64_t)crc_of(0, p + target[i], size) : -1;
    }
  });
  return found;
}

}  // namespace
}  // namespace pikv

STABLE_TORCH_LIBRARY_IMPL(pikv, CPU, m) {
  m.impl("crc32", TORCH_BOX(&pikv::crc32));
  m.impl("read_file", TORCH_BOX(&pikv::read_file));
}
