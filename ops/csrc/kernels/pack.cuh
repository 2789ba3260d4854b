// Rows of several tensors into one buffer and back. Bytes only; values keep their bits.

namespace pikv {

// What rows without a source hold, from byte sizeof(*to) * i on: the 8 bytes of `padding`, again and again.
__device__ __forceinline__ void pad(uint4* to, unsigned long long padding, long long) {
  to->x = to->z = (unsigned)padding, to->y = to->w = (unsigned)(padding >> 32);
}
__device__ __forceinline__ void pad(unsigned* to, unsigned long long padding, long long i) { *to = (unsigned)(padding >> 32 * (i % 2)); }
__device__ __forceinline__ void pad(unsigned char* to, unsigned long long padding, long long i) { *to = (unsigned char)(padding >> 8 * (i % 8)); }

// Words of one size; every address and size here is a multiple of it. A block per row, so that no index is divided. `body` gets the row of
// the buffer, its word, and the word's number.
template <class Word, class Body>
__device__ __forceinline__ void for_words(const Packed& p, const PackedField& f, const Body& body) {
  const long long per_row = f.row_bytes / (long long)sizeof(Word);
  for (long long r = blockIdx.x; r < f.num_packed; r += gridDim.x) {
    Word* row = reinterpret_cast<Word*>(p.buffer + f.offset + r * f.stride);
    for (long long word = threadIdx.x; word < per_row; word += kBlock) body(r, row + word, word);
  }
}

template <class Word>
__device__ __forceinline__ void pack_words(const Packed& p, const PackedField& f) {
  for_words<Word>(p, f, [&](long long r, Word* to, long long word) {
    const long long from = p.index.data ? at(p.index, r) : r < f.rows ? r : -1;
    if (from >= 0) *to = reinterpret_cast<const Word*>(f.data + from * f.row_bytes)[word];
    else pad(to, f.padding, word);
  });
}

template <class Word>
__device__ __forceinline__ void unpack_words(const Packed& p, const PackedField& f) {
  for_words<Word>(p, f, [&](long long r, const Word* from, long long word) {
    const long long to = p.index.data ? at(p.index, r) : r;
    if (to >= 0) reinterpret_cast<Word*>(f.data + to * f.row_bytes)[word] = *from;
  });
}

__device__ __forceinline__ bool whole_words(const Packed& p, const PackedField& f, int size) {
  return (f.row_bytes | f.stride | f.offset | (long long)f.data | (long long)p.buffer) % size == 0;
}

// Grid: y = field, x = rows. 8 blocks per multiprocessor: left alone, NVRTC 13.5 spills to reach 16.
__global__ void __launch_bounds__(kBlock, 8) pack_kernel(const Packed p) {
  const PackedField& f = p.fields[blockIdx.y];
  if (whole_words(p, f, 16)) pack_words<uint4>(p, f);
  else if (whole_words(p, f, 4)) pack_words<unsigned>(p, f);
  else pack_words<unsigned char>(p, f);
}

__global__ void __launch_bounds__(kBlock, 8) unpack_kernel(const Packed p) {
  const PackedField& f = p.fields[blockIdx.y];
  if (whole_words(p, f, 16)) unpack_words<uint4>(p, f);
  else if (whole_words(p, f, 4)) unpack_words<unsigned>(p, f);
  else unpack_words<unsigned char>(p, f);
}

}  // namespace pikv
