// Whole records: copied, and summed.

namespace pikv {

// Grid: x = pair, y = part of the record.
__global__ void __launch_bounds__(kBlock) migrate_kernel(const Migrate m) {
  const int to = at(m.target_ids, blockIdx.x), from = at(m.source_ids, blockIdx.x);
  if (to < 0 || from < 0) return;
  unsigned char* target = m.target + to * m.record_bytes;
  const unsigned char* source = m.source + from * m.record_bytes;
  const long long first = (long long)blockIdx.y * kBlock + threadIdx.x, step = (long long)gridDim.y * kBlock;
  const bool aligned = (m.record_bytes | (long long)m.target | (long long)m.source) % 16 == 0;
  if (aligned) {
    for (long long i = first; i < m.record_bytes / 16; i += step) reinterpret_cast<uint4*>(target)[i] = reinterpret_cast<const uint4*>(source)[i];
  } else {
    for (long long i = first; i < m.record_bytes; i += step) target[i] = source[i];
  }
}

__global__ void __launch_bounds__(kBlock) checksum_kernel(const Checksum c) {
  unsigned long long x = 0;
  for (long long i = (long long)blockIdx.x * kBlock + threadIdx.x; i < c.count; i += (long long)gridDim.x * kBlock) x ^= c.words[i];
#pragma unroll
  for (int bit = 16; bit > 0; bit >>= 1) x ^= __shfl_xor_sync(kAll, x, bit);
  if (threadIdx.x % 32 == 0) atomicXor(c.result, x);
}

}  // namespace pikv
