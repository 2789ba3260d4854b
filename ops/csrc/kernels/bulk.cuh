// Bulk copies into shared memory that an mbarrier counts: PTX from sm_90 on, emu/async_copy.h under the emulation.

namespace pikv {

// Whether this code is compiled with them. PK_EMU_BULK=0: the emulation of older devices.
#if defined(PK_HOST_EMU)
#if !defined(PK_EMU_BULK)
#define PK_EMU_BULK 1
#endif
constexpr bool kBulkCopies = PK_EMU_BULK;
using Barrier = uint64_t;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;
using Barrier = unsigned long long;
#else
constexpr bool kBulkCopies = false;
using Barrier = unsigned long long;
#endif

#if defined(PK_HOST_EMU)
__device__ __forceinline__ void barrier_init(Barrier* b) { pk_barrier_init(b, 1); }
__device__ __forceinline__ void barrier_expect(Barrier* b, int bytes) { pk_barrier_arrive(b, bytes); }
__device__ __forceinline__ void barrier_wait(Barrier* b, unsigned parity) { pk_barrier_wait(b, parity); }
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, Barrier* b) { pk_bulk_copy(to, from, bytes, b); }
__device__ __forceinline__ void bulk_fence() {}
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// One thread arrives in a phase. By one thread, with a barrier of the block before others use it.
__device__ __forceinline__ void barrier_init(Barrier* b) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(b)) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// The one arrival of a phase, which ends when so many bytes have come.
__device__ __forceinline__ void barrier_expect(Barrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(Barrier* b, unsigned parity) {
  unsigned over = 0;
  while (!over)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(over) : "r"(shared_address(b)), "r"(parity) : "memory");
}
// Both places and the bytes are multiples of 16.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, Barrier* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(b)) : "memory");
}
// By a thread that has written what a copy will write next.
__device__ __forceinline__ void bulk_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
__device__ __forceinline__ void barrier_init(Barrier*) {}
__device__ __forceinline__ void barrier_expect(Barrier*, int) {}
__device__ __forceinline__ void barrier_wait(Barrier*, unsigned) {}
__device__ __forceinline__ void bulk_copy(void*, const void*, int, Barrier*) {}
__device__ __forceinline__ void bulk_fence() {}
#endif

}  // namespace pikv
